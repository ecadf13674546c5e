"""Which config a flow runs with: a file's, or what a run last ran with, and the changes to it."""

from pathlib import Path

from schemas.config import RunConfig, apply_overrides, load_config, parse_config
from schemas.errors import ConfigError
from schemas.run_store import RunStore


def read_config(config: str, overrides: list[str] | None = None) -> RunConfig:
    """Read a config file, or what the run in folder ``config`` last ran with; then apply ``overrides``.

    Raises:
        ConfigError: the config or an override is wrong.
        ArtifactError: ``config`` is a folder without a run.
    """
    if not Path(config).is_dir():
        return load_config(config, overrides or [])
    return recorded_config(RunStore.open(config), overrides)


def recorded_config(store: RunStore, overrides: list[str] | None = None) -> RunConfig:
    """Return what ``store`` last ran with, changed by ``overrides``; the run keeps its place, wherever it was moved.

    Raises:
        ConfigError: an override is wrong, or would move the run.
    """
    recorded = store.config
    values = apply_overrides(recorded.model_dump(mode="json"), overrides or [])
    if (values["name"], values["root"]) != (recorded.name, recorded.root):
        raise ConfigError("--set name, --set root: a run that exists keeps its name and place")
    if RunStore(Path(recorded.root) / recorded.name).folder.resolve() != store.folder.resolve():
        values |= {"name": store.folder.name, "root": str(store.folder.parent)}
    return parse_config(values, origin=f"{store.folder}: recorded config")
