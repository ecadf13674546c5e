"""From YAML and `--set` overrides to a validated RunConfig, with errors that name the key and the nearest known one."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from schemas.config.base import Section
from schemas.config.prompts import DatasetSource, JsonlSource, ParquetSource, PromptSource
from schemas.config.run import RunConfig
from schemas.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config, apply ``key.sub=value`` overrides, and resolve its relative paths.

    Paths of prompts, models and chat templates that exist relative to the config file's folder are made absolute;
    ``root`` is relative to the working directory.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds an unknown or wrong value; names the key.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, found {type(values).__name__}")
    return parse_config(apply_overrides(values, overrides), origin=str(path), folder=path.parent)


def parse_config(values: dict[str, Any], *, origin: str = "config", folder: Path | None = None) -> RunConfig:
    """Validate ``values``; with ``folder``, resolve relative paths against it.

    Raises:
        ConfigError: names every unknown key (and the nearest known one) and every value out of range.
    """
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_explain(detail)}" for detail in error.errors(include_url=False)]
        raise ConfigError("\n".join([f"{origin}:", *lines])) from None
    return config if folder is None else _resolve_paths(config, folder)


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``values`` with each ``a.b=value`` set; values are read as YAML.

    >>> apply_overrides({"train": {"kd_weight": 0.9}}, ["train.kd_weight=0.5"])
    {'train': {'kd_weight': 0.5}}

    Raises:
        ConfigError: an override without `=`, one whose value is not YAML, or one that reaches into a plain value.
    """
    result: dict[str, Any] = yaml.safe_load(yaml.safe_dump(values))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise ConfigError(f"--set {override}: write it as key.sub=value, for example train.kd_weight=0.5")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override}: the value is not YAML: {error}") from None
        *parents, last = key.split(".")
        node: Any = result
        for depth, name in enumerate([*parents, last]):
            if isinstance(node, list):
                node = _list_item(node, name, override)
                continue
            if not isinstance(node, dict):
                raise ConfigError(f"--set {override}: {'.'.join(parents[:depth])} is not a section")
            if depth == len(parents):
                node[last] = value
            elif node.get(name) is None:
                node[name] = {}
                node = node[name]
            else:
                node = node[name]
    return result


def _list_item(node: list[Any], name: str, override: str) -> Any:
    if not name.isdecimal() or int(name) >= len(node):
        raise ConfigError(f"--set {override}: `{name}` is not one of the list's {len(node)} entries (from 0)")
    return node[int(name)]


def _explain(detail: ErrorDetails) -> str:
    location = [part for part in detail["loc"] if not _is_union_tag(part)]
    key = ".".join(str(part) for part in location) or "config"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        known = _known_keys(detail["loc"][:-1])
        nearest = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.0)
        hint = f"did you mean `{nearest[0]}`?" if nearest else ""
        return f"{key}: unknown key; {hint} Known here: {', '.join(known)}"
    if detail["type"] == "missing":
        return f"{key}: missing; it has no default"
    return f"{key}: {message} (got {detail['input']!r})"


_TAGS = {"jsonl", "parquet", "dataset", "reasoning_gym", "float", "Quantile", "int", "list[int]"}


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and part in _TAGS


def _known_keys(location: Sequence[int | str]) -> list[str]:
    """Return the field names of the section at ``location``, following lists and tagged unions."""
    candidates: list[type[Section]] = [RunConfig]
    for part in location:
        if isinstance(part, int):
            continue
        if _is_union_tag(part):
            tagged = [c for c in candidates if _is_tagged(c, str(part))]
            candidates = tagged or candidates
            continue
        annotations = [c.model_fields[part].annotation for c in candidates if part in c.model_fields]
        candidates = [section for annotation in annotations for section in _sections(annotation)]
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def _is_tagged(section: type[Section], tag: str) -> bool:
    field = section.model_fields.get("type")
    return section.__name__ == tag or (field is not None and tag in get_args(field.annotation))


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated, list):
        return [section for argument in get_args(annotation) for section in _sections(argument)]
    return []


def _resolve_paths(config: RunConfig, folder: Path) -> RunConfig:
    def resolved(text: str | None) -> str | None:
        if text is None or "://" in text:
            return text
        path = Path(text).expanduser()
        local = path if path.is_absolute() else folder / path
        return str(local.resolve()) if local.exists() else text

    def beside(source: PromptSource) -> PromptSource:
        if isinstance(source, DatasetSource):
            return source.model_copy(update={"dataset": resolved(source.dataset)})
        if isinstance(source, JsonlSource | ParquetSource):
            # Always a path, so a missing file is reported where it was looked for.
            return source.model_copy(update={"path": str((folder / Path(source.path).expanduser()).resolve())})
        return source

    return config.model_copy(
        update={
            "teacher": config.teacher.model_copy(update={"model": resolved(config.teacher.model)}),
            "student": config.student.model_copy(
                update={
                    "model": resolved(config.student.model),
                    "chat_template": resolved(config.student.chat_template),
                }
            ),
            "prompts": config.prompts.model_copy(update={"sources": [beside(s) for s in config.prompts.sources]}),
        }
    )
