"""YAML as plain values: what JSON could hold, each key once, and no more of it than a config needs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from schemas.errors import ConfigError
from schemas.untrusted_text import readable

MOST_BYTES = 1 << 18
"""Bytes of a config file; a longer one is something else."""

MOST_VALUES = 20_000
"""Values of a config, with every alias written out."""

DEEPEST = 50
"""Mappings and lists inside each other."""

_TAG = "tag:yaml.org,2002:"


def read_document(path: Path) -> dict[str, Any]:
    """Return what a YAML file holds.

    Raises:
        ConfigError: the file cannot be read, or is no YAML mapping of plain values; names it, and line and column.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path}: is longer than {MOST_BYTES} bytes, so it is no config")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start + 1} is not valid UTF-8; save the file as UTF-8") from None
    values = parse_document(text, f"{path}: cannot be read as YAML")
    if not isinstance(values, dict):
        found = {list: "a list", type(None): "nothing"}.get(type(values), "a single value")
        raise ConfigError(f"{path}: a config is a mapping of keys to values, found {found}")
    return values


def parse_document(text: str, origin: str) -> Any:
    """Return what YAML ``text`` holds: null, true, false, numbers, text, lists, and mappings with text as keys.

    Raises:
        ConfigError: it holds anything else, a key twice, or too much; begins with ``origin``.
    """
    try:
        return yaml.load(text, _PlainLoader)
    except yaml.MarkedYAMLError as error:
        what, mark = error.problem or error.context or "no YAML", error.problem_mark or error.context_mark
        if "could not find expected ':'" in what:
            what, mark = "expected `: ` (colon and space) after the key", error.context_mark or mark
        elif "'\\t'" in what:
            what = "a tab, where YAML takes spaces alone"
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ConfigError(f"{origin}: {readable(what)}{place}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: {readable(' '.join(str(error).split()))}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: nested more than {DEEPEST} deep") from None


def value_problems(value: Any, key: str = "", depth: int = 0) -> list[str]:
    """Say, by key, what no setting can be: text that is no text, numbers that JSON cannot hold, nesting without end."""
    if isinstance(value, str):
        what = _text_problem(value)
        return [f"{key}: {what}"] if what else []
    if isinstance(value, float):
        return [] if math.isfinite(value) else [f"{key}: {value} is not a finite number"]
    if isinstance(value, int):
        return [] if -(2**63) <= value < 2**63 else [f"{key}: is a number beyond 64 bits"]
    if not isinstance(value, dict | list):
        return []
    if depth == DEEPEST:
        return [f"{readable(key)}: nested more than {DEEPEST} deep"]
    problems = []
    for name, child in value.items() if isinstance(value, dict) else enumerate(value):
        path = readable(f"{key}.{name}" if key else str(name))
        if isinstance(name, str) and (what := _text_problem(name)):
            problems.append(f"{path}: the key {what}")
        problems += value_problems(child, path, depth + 1)
    return problems


def _text_problem(text: str) -> str | None:
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is no character"
    return None


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader without dates, sets, bytes and the like, and with limits."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in (f"{_TAG}timestamp", f"{_TAG}value")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._measure(node, {})
        return node

    def _measure(self, node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
        """Return how many values ``node`` holds with its aliases written out, and how deep they are."""
        if id(node) in known:
            measured = known[id(node)]
            if measured is None:
                raise _error("an alias inside the value it stands for", node)
            return measured
        known[id(node)] = None
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        parts = (
            [value for _, value in node.value]
            if isinstance(node, yaml.MappingNode)
            else node.value
            if isinstance(node, yaml.SequenceNode)
            else []
        )
        measures = [self._measure(part, known) for part in parts]
        size, height = 1 + sum(size for size, _ in measures), 1 + max((height for _, height in measures), default=0)
        if size > MOST_VALUES:
            raise _error(f"holds more than {MOST_VALUES} values", node)
        if height > DEEPEST:
            raise _error(f"nested more than {DEEPEST} deep", node)
        known[id(node)] = size, height
        return size, height


def _check_keys(node: yaml.MappingNode) -> None:
    found: set[str] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
            shown = f"`{readable(key.value, 60)}` " if isinstance(key, yaml.ScalarNode) else ""
            raise _error(f"the key {shown}is not text; put it into quotes", key)
        if key.value in found:
            raise _error(f"the key `{readable(key.value, 60)}` is there twice", key)
        found.add(key.value)


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _scalar(construct: Callable[[yaml.SafeLoader, Any], Any]) -> Callable[[yaml.SafeLoader, Any], Any]:
    def constructed(loader: yaml.SafeLoader, node: Any) -> Any:
        try:
            return construct(loader, node)
        except (ValueError, LookupError, ArithmeticError):
            raise _error(f"`{readable(str(node.value), 60)}` is not what its tag says", node) from None

    return constructed


_PlainLoader.yaml_constructors = {
    None: yaml.SafeLoader.construct_undefined,
    **{f"{_TAG}{kind}": yaml.SafeLoader.yaml_constructors[f"{_TAG}{kind}"] for kind in ("seq", "map", "str", "null")},
    **{
        f"{_TAG}{kind}": _scalar(yaml.SafeLoader.yaml_constructors[f"{_TAG}{kind}"])
        for kind in ("int", "float", "bool")
    },
}
