"""Which config a flow runs with: a file's, or what a run last ran with, and the changes to it."""

from pathlib import Path

from schemas.config import RunConfig, apply_overrides, load_config, parse_config
from schemas.errors import ConfigError
from schemas.object_store import is_url
from schemas.run_store import RunStore


def read_config(config: str, overrides: list[str] | None = None) -> RunConfig:
    """Read a config file, or what the run in folder or URL ``config`` last ran with; then apply ``overrides``.

    Raises:
        ConfigError: the config or an override is wrong.
        ArtifactError: ``config`` is a folder without a run.
    """
    if not (is_url(config) or Path(config).is_dir()):
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
    if RunStore.at(recorded).folder.resolve() != store.folder.resolve():
        root, _, name = store.url.rpartition("/")
        values |= {"name": name, "root": root or "/"}
    return parse_config(values, origin=f"{store.url}: recorded config")
