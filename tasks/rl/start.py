"""Where an RL run starts: the weights, and what stands for them in fingerprints."""

from dataclasses import dataclass
from pathlib import Path

from schemas.config import RLConfig
from schemas.errors import ArtifactError, ModelError
from schemas.manifest import Manifest
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.graph import PROMPTS
from tasks.language_model.fingerprint import folder_fingerprint
from tasks.language_model.sources import exported_folder, find_source, standing_exports


@dataclass(frozen=True)
class SourceRun:
    """The distillation run that an RL run continues.

    Args:
        store: Its files.
        export: Stage whose model is the start.
        manifest: Of that stage.
    """

    store: RunStore
    export: StageKey
    manifest: Manifest


def source_run(config: RLConfig) -> SourceRun:
    """Return the run that ``config.run`` names, and the export to start from.

    Raises:
        RunNotFoundError: there is no run.
        ArtifactError: it has not exported the wanted round, or no round at all; or it is no distillation run.
    """
    assert config.run is not None, "checked by the config"
    store = RunStore.open(config.run)
    exports = standing_exports(store)
    key = next(reversed(exports), None) if config.round is None else StageKey("export", config.round)
    if key in exports:
        return SourceRun(store, key, exports[key])
    wanted = "any student" if config.round is None else f"the student of round {config.round}"
    raise ArtifactError(f"{config.run}: has not exported {wanted} yet; finish it first: npd run {config.run}")


def check_start(config: RLConfig) -> None:
    """Check, before anything runs, that the start model is there, and the prompts of the run it comes from.

    Raises:
        ConfigError: ``root`` cannot hold a run.
        ModelError: ``model`` is no model folder.
        ArtifactError: see ``source_run``; or that run has no prompts.
    """
    RunStore.at(config)
    start_fingerprint(config)
    if config.run is not None:
        source_run(config).store.finished(PROMPTS)


def start_folder(config: RLConfig) -> Path:
    """Return the model folder to start from, every byte of an export as its manifest says.

    Raises:
        ModelError: ``model`` is no model folder.
        ArtifactError: see ``source_run``; or a file of the export is damaged.
    """
    if config.model is not None:
        return _model_folder(config.model)
    source = source_run(config)
    folder = source.store.fetch(exported_folder(source.store, source.export))
    damage = source.store.first_damage(source.manifest)
    if damage is not None:
        raise ArtifactError(f"{config.run}: {damage}; export it again: npd run {config.run}")
    return folder


def start_fingerprint(config: RLConfig) -> str:
    """Return what stands for the content of the weights to start from.

    Raises:
        ModelError: ``model`` is no model folder.
        ArtifactError: see ``source_run``.
    """
    if config.model is not None:
        return folder_fingerprint(_model_folder(config.model), None, code=config.trust_remote_code)
    return source_run(config).manifest.outputs_fingerprint


def start_label(config: RLConfig) -> str:
    """Return the start in words, for the model's card."""
    if config.model is not None:
        return Path(config.model).name
    source = source_run(config)
    return f"{source.store.config.name}, {source.export.label}"


def _model_folder(model: str) -> Path:
    source = find_source(model, "model")
    if source.folder is None or source.gguf_file is not None:
        raise ModelError(f"model: {model}: RL starts from a local Hugging Face model folder")
    return source.folder
