"""Resolving both models of a run."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from schemas.config import RunConfig
from schemas.errors import ModelError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS
from tasks.language_model import hub
from tasks.language_model.adapters import check_adapters
from tasks.language_model.chat import encode_prompts, end_ids, preset_template, require_chat_template
from tasks.language_model.context_limit import context_limit
from tasks.language_model.fingerprint import folder_fingerprint, model_files
from tasks.language_model.loading import (
    UNREADABLE,
    model_class,
    require_no_adapters,
    require_plain_weights,
    resolve_device,
)
from tasks.language_model.quantization import require_full_weights, require_loadable
from tasks.language_model.sources import ResolvedModels, SourcePath, find_source
from tasks.models import read_template
from tasks.models.prune import prune_layers, require_same_model
from tasks.models.tokenizers import check_same_tokenizer
from tasks.packages import check_packages
from tasks.rollout.context import prompts_that_fit, source_in
from tasks.stage import StageJob
from tasks.trackers import check_trackers


def resolve_models(job: StageJob) -> None:
    """See ``tasks.models.run``."""
    store, config = job.store, job.config
    job.progress(0, 3, "steps")
    check_packages(config)
    check_trackers(config.train.report_to, "train.report_to")
    if config.warmup is not None:
        check_trackers(config.warmup.report_to, "warmup.report_to")
    _check_devices(config)
    found = _find(config)
    _check_files(job, found)
    tokenizers = fitting_tokenizers(job, found)
    _tell_of_dates(job, tokenizers.student)
    teacher_config = _config(found.teacher, found.trust_teacher)
    same = found.student == found.teacher
    student_config = teacher_config if same else _config(found.student, found.trust_student)
    for key, own, trusted in (
        ("teacher.model", teacher_config, found.trust_teacher),
        ("student.model", student_config, found.trust_student),
    ):
        model_class(own, key)
        if trusted:
            _tell_of_others_code(job, key, own)
    if config.train.lora is not None:
        check_adapters(config.train.lora, student_config, "student.model", trust_remote_code=found.trust_student)
    require_loadable(teacher_config, config.teacher.quantization)
    require_full_weights(student_config, "teacher.model" if config.student.model is None else "student.model")
    teacher_context = _context(job, teacher_config, found.teacher)
    student_context = teacher_context if same else _context(job, student_config, found.student)
    _check_prompts(job, tokenizers.student, min(teacher_context, student_context))
    job.progress(1, 3, "steps")

    teacher = found.teacher
    if teacher.gguf_file is not None:
        teacher = _convert(teacher, teacher_config, tokenizers.teacher, store, store.path(job.key, "teacher"))
    job.progress(2, 3, "steps")

    source = teacher if same else found.student
    _write_student(job, source, found.trust_student, tokenizers.student, end_ids(tokenizers.teacher, _folder(teacher)))
    ResolvedModels(
        teacher_path=None if teacher == found.teacher else store.relative(_folder(teacher)),
        teacher_commit=_folder(teacher).name if find_source(teacher.name, "teacher.model").folder is None else None,
        teacher_version=folder_fingerprint(_folder(teacher), None)[:16],
        teacher_context=teacher_context,
        student_context=student_context,
        shared_vocab=len(tokenizers.student),
    ).write(store, store.path(job.key, "models.json"))
    job.progress(3, 3, "steps")


def _check_devices(config: RunConfig) -> None:
    """Check that devices are here that later stages name; an actor of Ray has those of its own machine."""
    for key in ("trainer",) if config.ray is not None else ("sampler", "teacher", "trainer"):
        try:
            resolve_device(getattr(config.devices, key))
        except ModelError as error:
            raise ModelError(f"devices.{key}: {str(error).removeprefix('device: ')}") from None


@dataclass(frozen=True)
class Found:
    """Where both models are, and whether their own code may run."""

    teacher: SourcePath
    student: SourcePath
    trust_teacher: bool
    trust_student: bool


@dataclass(frozen=True)
class Tokenizers:
    """Both tokenizers, found to fit; the student's as it will be written."""

    teacher: PreTrainedTokenizerBase
    student: PreTrainedTokenizerBase


def _find(config: RunConfig) -> Found:
    teacher, student = config.teacher, config.student
    found = _download(
        find_source(teacher.model, "teacher.model"), teacher.revision, "teacher", teacher.trust_remote_code
    )
    if student.model is None:
        return Found(found, found, teacher.trust_remote_code, teacher.trust_remote_code)
    own = _download(find_source(student.model, "student.model"), student.revision, "student", student.trust_remote_code)
    return Found(found, own, teacher.trust_remote_code, student.trust_remote_code)


def _check_files(job: StageJob, found: Found) -> None:
    """Check how weights are stored, and say whose code may run here."""
    trusted = {"teacher": found.trust_teacher, "student": found.trust_student}
    for key, source in {"teacher": found.teacher, "student": found.student}.items():
        if key == "student" and (source, trusted[key]) == (found.teacher, trusted["teacher"]):
            continue
        if source.gguf_file is None:
            require_plain_weights(_folder(source))
        else:
            require_no_adapters(_folder(source))
        if trusted[key]:
            job.warn(f"{key}.trust_remote_code: code that comes with {source.name} runs on this machine")


def _tell_of_others_code(job: StageJob, key: str, config: PreTrainedConfig) -> None:
    places = [str(place) for place in (getattr(config, "auto_map", None) or {}).values()]
    others = sorted({place.partition("--")[0] for place in places if "--" in place})
    if others:
        job.warn(
            f"{key}: its code is not in its folder but the newest in {', '.join(others)} on the Hub, which may change "
            "between stages, and which no fingerprint covers: take that code into the folder, and `OTHER--` out of "
            "`auto_map` in its config.json"
        )


def fitting_tokenizers(job: StageJob, found: Found) -> Tokenizers:
    """Load both tokenizers and check that the teacher can score what the student writes.

    The student takes the teacher's EOS where they differ (a base model's often does): a reply must end for both at the
    same token. It takes the teacher's chat template where it has none.

    Raises:
        ModelError: no chat template or no EOS.
        TokenizerMismatchError: see ``check_same_tokenizer``.
    """
    teacher = _tokenizer(found.teacher, found.trust_teacher)
    student = teacher if found.student == found.teacher else _tokenizer(found.student, found.trust_student)
    if student is not teacher:
        check_same_tokenizer(teacher, student)
    config = job.config
    if config.student.chat_template is not None:
        student.chat_template = read_template(config.student.chat_template)
    elif student.chat_template is None and teacher.chat_template is not None:
        job.warn("student.model: its tokenizer has no chat template; it takes the teacher's")
        student.chat_template = teacher.chat_template
    require_chat_template(student, "student.model")
    if config.student.chat_template_kwargs:
        student.chat_template = preset_template(
            student.get_chat_template(), config.student.chat_template_kwargs, "student.chat_template_kwargs"
        )
    if teacher.eos_token_id is None:
        raise ModelError("teacher.model: its tokenizer names no EOS token, so no reply could end")
    if student.eos_token_id != teacher.eos_token_id:
        student.eos_token = teacher.eos_token
    return Tokenizers(teacher, student)


def _tell_of_dates(job: StageJob, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of a chat template that asks for the date: stages that run on other days would ask other prompts."""
    if "strftime_now" in tokenizer.get_chat_template() and "date_string" not in job.config.student.chat_template_kwargs:
        job.warn(
            "the chat template may write today's date into every prompt, so that what runs on another day is asked "
            "otherwise; fix the date with `student.chat_template_kwargs: {date_string: ...}` if the template reads "
            "that, or in a template of your own, `student.chat_template`"
        )


def _convert(
    source: SourcePath, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, store: RunStore, target: Path
) -> SourcePath:
    """Write a GGUF model as a plain folder, once: reading GGUF takes many times as long."""
    if not target.is_dir():
        with store.writing_folder(target) as temporary:
            _load(source, trust_remote_code=False, config=config).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    return SourcePath(source.name, target)


def _download(source: SourcePath, revision: str | None, key: str, trust_remote_code: bool) -> SourcePath:
    """Fetch a Hub model into the Hub's own cache; local sources stay as they are."""
    if source.folder is not None:
        return source
    folder = hub.fetch(source.name, revision, f"{key}.model", trust_remote_code=trust_remote_code)
    return SourcePath(source.name, folder)


def _folder(source: SourcePath) -> Path:
    assert source.folder is not None, "downloaded first"
    return source.folder


def _tokenizer(source: SourcePath, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            _folder(source), trust_remote_code=trust_remote_code, **options
        )
    except UNREADABLE as error:
        raise ModelError(f"{source.name}: its tokenizer cannot be loaded: {type(error).__name__}: {error}") from error
    return tokenizer


def _config(source: SourcePath, trust_remote_code: bool) -> PreTrainedConfig:
    options = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            _folder(source), trust_remote_code=trust_remote_code, **options
        )
    except UNREADABLE as error:
        raise ModelError(f"{source.name}: its config cannot be loaded: {type(error).__name__}: {error}") from error
    return config


def _context(job: StageJob, config: PreTrainedConfig, source: SourcePath) -> int:
    limit, longest = context_limit(config, source.name), config.get_text_config().max_position_embeddings
    if limit < longest:
        job.warn(
            f"{source.name}: its context is {limit} tokens in this run, not {longest}: with a longer sequence in the "
            "same pack its rotary embedding (longrope) would change all others too"
        )
    return limit


def _load(
    source: SourcePath, trust_remote_code: bool, config: PreTrainedConfig | None = None
) -> transformers.PreTrainedModel:
    """Load weights as stored; of GGUF, with the ``config`` read before, since every look into the file takes long."""
    options: dict[str, Any] = {"dtype": "auto", "use_safetensors": True}
    if source.gguf_file is not None:
        # Without `dequantize` transformers may keep the weights packed, which cannot be trained.
        unpacked = GgufConfig(dequantize=True)
        options = {"gguf_file": source.gguf_file, "quantization_config": unpacked, "dtype": torch.float32}
        if config is not None:
            options["config"] = config
    try:
        auto = model_class(config or _config(source, trust_remote_code), source.name)
        model: transformers.PreTrainedModel = auto.from_pretrained(
            _folder(source), trust_remote_code=trust_remote_code, **options
        )
    except (*UNREADABLE, RuntimeError) as error:
        raise ModelError(f"{source.name}: its weights cannot be loaded: {error}") from error
    return model


def _check_prompts(job: StageJob, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    for table in job.store.iterate_table(StageKey("prompts"), PROMPTS, ["messages", "source", "source_row"]):
        prompts = encode_prompts(tokenizer, table.column("messages").to_pylist())
        prompts_that_fit(
            np.fromiter((len(ids) for ids in prompts), np.int32, len(prompts)),
            context,
            too_long=job.config.prompts.too_long,
            source_of=source_in(table),
        )


def _write_student(
    job: StageJob, source: SourcePath, trust_remote_code: bool, tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> None:
    """Write the starting student as a plain model folder: its own files, or pruned or converted weights."""
    target = job.store.path(job.key, "student")
    if target.is_dir():
        return
    config = job.config.student
    folder = _folder(source)
    with job.store.writing_folder(target) as temporary:
        if config.init == "pretrained" and source.gguf_file is None:
            for pattern in model_files(code=trust_remote_code):
                for file in folder.glob(pattern):
                    shutil.copyfile(file, temporary / file.name)
        else:
            model = _load(source, trust_remote_code)
            if config.init == "prune":
                assert config.keep_layers is not None
                model = prune_layers(model, config.keep_layers)
            model.save_pretrained(temporary)
            if config.init == "prune":
                require_same_model(model, _load(SourcePath(source.name, temporary), trust_remote_code))
        tokenizer.save_pretrained(temporary)
        GenerationConfig(
            eos_token_id=ends, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id
        ).save_pretrained(temporary)
