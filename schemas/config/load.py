"""From YAML and `--set` overrides to a validated config, with errors that name the key and the nearest known one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from schemas.config.base import Section
from schemas.config.document import parse_document, read_document, value_problems
from schemas.config.explain import explain
from schemas.config.prompts import DatasetSource, JsonlSource, ParquetSource, PromptsConfig, PromptSource
from schemas.config.rl import RLConfig
from schemas.config.run import RunConfig
from schemas.config.secrets import holds_secret
from schemas.config.settings import RunSettings
from schemas.errors import ConfigError
from schemas.untrusted_text import readable

_MOST_PROBLEMS = 8
"""Problems that one error lists."""

_COMMANDS = {
    "teacher": ("a distillation run", "npd run"),
    "methods": ("a comparison", "npd compare"),
    "grpo": ("an RL run", "npd rl"),
}
"""By a key that only its configs have: what a config is of, and the command that takes it."""

S = TypeVar("S", bound=Section)
R = TypeVar("R", bound=RunSettings)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the config of a distillation run; see ``load_as``."""
    return load_as(RunConfig, path, overrides)


def parse_config(values: dict[str, Any], *, origin: str = "config", folder: Path | None = None) -> RunConfig:
    """Validate the config of a distillation run; see ``parse_as``."""
    return parse_as(RunConfig, values, origin=origin, folder=folder)


def parse_settings(values: dict[str, Any], *, origin: str = "config") -> RunSettings:
    """Validate a recorded config, of whatever kind of run it says it is; see ``parse_as``."""
    return parse_as(kind_of(values), values, origin=origin)


def kind_of(values: dict[str, Any]) -> type[RunSettings]:
    """Return the kind of run that recorded settings say they are of."""
    return RLConfig if values.get("kind") == "rl" else RunConfig


def load_as(kind: type[R], path: str | Path, overrides: Sequence[str] = ()) -> R:
    """Read a YAML config, apply ``key.sub=value`` overrides, and resolve its relative paths.

    Paths of prompts, models, chat templates and `lm-eval` tasks are made absolute where they exist relative to the
    config file's folder, or else to the working directory; ``root`` (and ``run`` of an RL run) is relative to the
    working directory.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds an unknown or wrong value; names the key.
    """
    path = Path(path)
    return parse_as(kind, apply_overrides(read_document(path), overrides), origin=str(path), folder=path.parent)


def parse_as(kind: type[R], values: dict[str, Any], *, origin: str = "config", folder: Path | None = None) -> R:
    """Validate ``values``; with ``folder``, resolve relative paths against it.

    Raises:
        ConfigError: names every unknown key (and the nearest known one) and every value out of range; or it is the
            config of another command.
    """
    _require_kind(kind, values, origin)
    config = parse_section(values, kind, origin)
    if folder is None:
        return config
    try:
        return _resolve_paths(config, folder)
    except (OSError, RuntimeError) as error:
        # A home folder that nobody has, a name too long for the disk, links in a circle.
        raise ConfigError(f"{origin}: a path in it cannot be looked up: {readable(str(error))}") from None


def _require_kind(kind: type[RunSettings], values: dict[str, Any], origin: str) -> None:
    own = {"grpo", "model", "run"} if issubclass(kind, RLConfig) else {"teacher"}
    found = ["grpo"] if values.get("kind") == "rl" else [name for name in _COMMANDS if name in values]
    if found and not own & {*values, *found}:
        what, command = _COMMANDS[found[0]]
        raise ConfigError(f"{origin}: is the config of {what}, which `{command}` runs and continues")


def parse_section(values: dict[str, Any], kind: type[S], origin: str) -> S:
    """Validate ``values`` as the section ``kind``.

    Raises:
        ConfigError: names every unknown key (and the nearest known one) and every value out of range.
    """
    if problems := value_problems(values):
        raise _config_error(origin, problems)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise _config_error(
            origin, [explain(detail, kind) for detail in details[:_MOST_PROBLEMS]], len(details)
        ) from None


def _config_error(origin: str, problems: Sequence[str], count: int | None = None) -> ConfigError:
    more = (len(problems) if count is None else count) - _MOST_PROBLEMS
    lines = [f"{origin}:", *(f"  {problem}" for problem in problems[:_MOST_PROBLEMS])]
    return ConfigError("\n".join([*lines, f"  and {more} more"] if more > 0 else lines))


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``values`` with each ``a.b=value`` set, the value read as YAML; a mapping changes the keys it names alone.

    >>> apply_overrides({"train": {"kd_weight": 0.9, "loss_chunk": 64}}, ["train={kd_weight: 0.5}"])
    {'train': {'kd_weight': 0.5, 'loss_chunk': 64}}

    Raises:
        ConfigError: an override without `=`, one whose value is not YAML, or one that reaches into a plain value.
    """
    result: dict[str, Any] = _copied(values)
    for override in overrides:
        key, separator, text = override.partition("=")
        # Not the value: it may be a secret.
        shown = "…" if holds_secret(key) else readable(f"{key}=…" if separator else key)
        if not separator or not all(key.split(".")):
            raise ConfigError(f"--set {shown}: write it as key.sub=value, for example train.kd_weight=0.5")
        _put(result, key, parse_document(text, f"--set {shown}: the value is not YAML"), f"--set {shown}")
    return result


def with_values(values: dict[str, Any], changes: dict[str, Any], origin: str) -> dict[str, Any]:
    """Return ``values`` with each ``a.b: value`` of ``changes`` set.

    Raises:
        ConfigError: a key reaches into a plain value, or a mapping would replace a section at the config's top; begins
            with ``origin``.
    """
    result: dict[str, Any] = _copied(values)
    for key, value in changes.items():
        if not all(key.split(".")):
            raise ConfigError(f"{origin}: {readable(key)}: write it as key.sub, for example train.kd_weight")
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            raise ConfigError(
                f"{origin}: {readable(key)}: a mapping would replace the whole section; set its keys one by one, as in "
                "`train.kd_weight: 0.5`"
            )
        _put(result, key, _copied(value), f"{origin}: {readable(key)}")
    return result


def _put(result: dict[str, Any], key: str, value: Any, shown: str) -> None:
    """Set one ``a.b`` in place, of a mapping its keys; an entry of a list is replaced. ``shown`` begins errors."""
    *parents, last = key.split(".")
    node: Any = result
    for depth, name in enumerate([*parents, last]):
        if isinstance(node, list):
            entry = _list_item(node, name, shown)
            if depth == len(parents):
                node[int(name)] = value
            node = entry
            continue
        if not isinstance(node, dict):
            raise ConfigError(f"{shown}: {readable('.'.join(parents[:depth]))} is not a section")
        if depth == len(parents):
            node[last] = _merged(node.get(last), value)
        elif node.get(name) is None:
            node[name] = {}
            node = node[name]
        else:
            node = node[name]


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {name: _merged(old.get(name), child) for name, child in new.items()}


def _copied(value: Any) -> Any:
    """Copy mappings and lists; one that two aliases share becomes two."""
    if isinstance(value, dict):
        return {name: _copied(child) for name, child in value.items()}
    return [_copied(child) for child in value] if isinstance(value, list) else value


def _list_item(node: list[Any], name: str, shown: str) -> Any:
    if not name.isdecimal() or len(name) > 9 or int(name) >= len(node):
        raise ConfigError(f"{shown}: `{readable(name)}` is not one of the list's {len(node)} entries (from 0)")
    return node[int(name)]


def _resolve_paths(config: R, folder: Path) -> R:
    def existing(text: str) -> Path | None:
        path = Path(text).expanduser()
        # Also from the working directory, which is not that of every process of the run.
        return next((local.resolve() for local in (folder / path, path) if local.exists()), None)

    def resolved(text: str | None) -> str | None:
        if text is None or "://" in text:
            return text
        return str(existing(text) or text)

    def beside(source: PromptSource) -> PromptSource:
        if isinstance(source, DatasetSource):
            return source.model_copy(update={"dataset": resolved(source.dataset)})
        if isinstance(source, JsonlSource | ParquetSource):
            # Always a path, so a missing file is reported where it was looked for first.
            path = existing(source.path) or (folder / Path(source.path).expanduser()).resolve()
            return source.model_copy(update={"path": str(path)})
        return source

    def beside_all(prompts: PromptsConfig) -> PromptsConfig:
        return prompts.model_copy(update={"sources": [beside(source) for source in prompts.sources]})

    update: dict[str, Any] = {}
    if isinstance(config, RunConfig):
        student = {"model": resolved(config.student.model), "chat_template": resolved(config.student.chat_template)}
        update = {
            "teacher": config.teacher.model_copy(update={"model": resolved(config.teacher.model)}),
            "student": config.student.model_copy(update=student),
            "prompts": beside_all(config.prompts),
            "evaluate": config.evaluate.model_copy(
                update={
                    "lm_eval": config.evaluate.lm_eval
                    and config.evaluate.lm_eval.model_copy(
                        update={"include_path": resolved(config.evaluate.lm_eval.include_path)}
                    )
                }
            ),
        }
    elif isinstance(config, RLConfig):
        update = {
            "model": resolved(config.model),
            "prompts": None if config.prompts is None else beside_all(config.prompts),
        }
    return config.model_copy(update=update)
