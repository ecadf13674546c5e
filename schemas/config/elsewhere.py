"""Where a key belongs that a section of the config does not know."""

import difflib
from collections.abc import Iterator, Sequence

from schemas.config.base import Section, sections_in

_LONGEST_NAME = 60
"""Characters of a name that are compared with those there are."""

_MOST_PLACES = 3

CALLED_HERE = {
    "bf16": "train.precision",
    "dataset_name": "prompts.sources",
    "dataset_path": "prompts.sources",
    "eval_dataset": "prompts.held_out",
    "eval_temperature": "evaluate.temperature",
    "epochs": "train.epochs_per_round",
    "fp16": "train.precision",
    "fsdp": "train.launch.strategy",
    "gradient_accumulation_steps": "train.packs_per_step",
    "lambda": "train.kd_weight",
    "lmbda": "generate.policy",
    "load_in_4bit": "teacher.quantization",
    "load_in_8bit": "teacher.quantization",
    "lora_alpha": "train.lora.alpha",
    "lora_dropout": "train.lora.dropout",
    "lora_r": "train.lora.r",
    "lora_rank": "train.lora.r",
    "lora_target_modules": "train.lora.target_modules",
    "lr": "train.learning_rate",
    "max_completion_length": "generate.max_new_tokens",
    "max_length": "pack.max_tokens",
    "max_prompt_length": "prompts.too_long",
    "max_seq_length": "pack.max_tokens",
    "max_steps": "train.steps_per_round",
    "model_name_or_path": "student.model",
    "model_revision": "student.revision",
    "num_epochs": "train.epochs_per_round",
    "num_generations": "generate.samples_per_prompt",
    "num_train_epochs": "train.epochs_per_round",
    "output_dir": "root",
    "peft": "train.lora",
    "peft_config": "train.lora",
    "per_device_train_batch_size": "train.packs_per_step",
    "rank": "train.lora.r",
    "run_name": "name",
    "save_steps": "train.save_every_steps",
    "seq_kd": "generate.policy",
    "system_prompt": "prompts.sources",
    "tau": "filter.max_delta_ifd",
    "teacher_model": "teacher.model",
    "teacher_model_name_or_path": "teacher.model",
    "teacher_model_revision": "teacher.revision",
    "train_dataset": "prompts.sources",
    "use_liger_kernel": "train.liger_kernels",
    "use_peft": "train.lora",
    "use_vllm": "generate.engine",
    "vllm_gpu_memory_utilization": "generate.vllm.gpu_memory_utilization",
    "vllm_server_base_url": "generate.server.urls",
    "vllm_tensor_parallel_size": "generate.vllm.tensor_parallel_size",
    "warmup_steps": "train.warmup_ratio",
}
"""By the names that TRL, `transformers`, PEFT and papers have for settings: what says the same in a run's config."""

CALLED_HERE_IN_RL = {
    "bf16": "grpo.precision",
    "gradient_accumulation_steps": "grpo.sequences_per_batch",
    "max_completion_length": "grpo.max_new_tokens",
    "max_steps": "grpo.steps",
    "model_name_or_path": "model",
    "output_dir": "root",
    "per_device_train_batch_size": "grpo.sequences_per_batch",
    "save_steps": "grpo.save_every_steps",
    "use_vllm": "grpo.engine",
}
"""And in that of an RL run."""


def hint(key: str, known: Sequence[str], kind: type[Section]) -> str:
    """Return a sentence that says what an unknown key may have been meant to be; empty where nothing is like it.

    Args:
        key: The unknown key, without the sections it stands in.
        known: The keys of its section.
        kind: The whole config.
    """
    name = key[:_LONGEST_NAME].lower()
    places = dict(_fields(kind))
    for called in (CALLED_HERE.get(name), CALLED_HERE_IN_RL.get(name)):
        if called in places:
            return f"see `{called}`."
    same = sorted((path for path, field in places.items() if field == name), key=lambda path: path.count("."))
    if same:
        return f"it belongs elsewhere: {', '.join(f'`{path}`' for path in same[:_MOST_PLACES])}."
    if near := difflib.get_close_matches(name, known, n=1):
        return f"did you mean `{near[0]}`?"
    if near := difflib.get_close_matches(name, list(dict.fromkeys(places.values())), n=1, cutoff=0.8):
        return f"did you mean `{next(path for path, field in places.items() if field == near[0])}`?"
    return ""


def _fields(section: type[Section], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the place of every field below a section, as `--set` would name it, and the field's name."""
    for name, field in section.model_fields.items():
        place = f"{path}{name}"
        yield place, name
        inside = f"{place}.0." if str(field.annotation).startswith("list[") else f"{place}."
        for below in sections_in(field.annotation):
            yield from _fields(below, inside)
