"""Which config a flow runs with: a file's, or what a run last ran with, and the changes to it."""

from pathlib import Path
from typing import TypeVar

from schemas.config import RunConfig, RunSettings, apply_overrides, kind_of, load_as, parse_as
from schemas.errors import ConfigError
from schemas.object_store import is_url
from schemas.run_store import RunStore

S = TypeVar("S", bound=RunSettings)


def read_config(config: str, overrides: list[str] | None = None) -> RunConfig:
    """Read the config of a distillation run; see ``read_as``."""
    return read_as(RunConfig, config, overrides)


def recorded_config(store: RunStore, overrides: list[str] | None = None) -> RunSettings:
    """Return what a run of any kind last ran with; see ``recorded_as``."""
    return recorded_as(kind_of(store.recorded_values()), store, overrides)


def read_as(kind: type[S], config: str, overrides: list[str] | None = None) -> S:
    """Read a config file, or what the run in folder or URL ``config`` last ran with; then apply ``overrides``.

    Raises:
        ConfigError: the config or an override is wrong.
        ArtifactError: ``config`` is a folder without a run.
    """
    if not (is_url(config) or Path(config).is_dir()):
        return load_as(kind, config, overrides or [])
    return recorded_as(kind, RunStore.open(config), overrides)


def recorded_as(kind: type[S], store: RunStore, overrides: list[str] | None = None) -> S:
    """Return what ``store`` last ran with, changed by ``overrides``; the run keeps its place, wherever it was moved.

    Raises:
        ConfigError: an override is wrong, or would move the run.
    """
    recorded = store.recorded_values()
    # Validated once they are applied: they may be what makes a config of an earlier version right.
    values = apply_overrides(recorded, overrides or [])
    changed = parse_as(kind, values, origin=f"{store.url}: recorded config")
    if (changed.name, changed.root) != (recorded.get("name"), recorded.get("root")):
        raise ConfigError("--set name, --set root: a run that exists keeps its name and place")
    if RunStore.at(changed).folder.resolve() == store.folder.resolve():
        return changed
    root, _, name = store.url.rpartition("/")
    return parse_as(kind, values | {"name": name, "root": root or "/"}, origin=f"{store.url}: recorded config")
