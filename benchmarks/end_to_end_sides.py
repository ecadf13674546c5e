"""The sides of `benchmarks.end_to_end`: the stages of this project's rounds, and TRL's on-policy trainers."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.runs import Models, Run, config_values, finish, write_prompts
from schemas.config import parse_config
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.graph import MODELS, PROMPTS, SAMPLING_STAGES
from tasks.stage import execute

HELD_OUT = 1
LOOP = (*SAMPLING_STAGES, "train", "export")


@dataclass(frozen=True)
class Outcome:
    """What one side did.

    Args:
        seconds: Wall-clock time, set-up left out.
        generated: Response tokens sampled.
        trained: Response tokens in losses, each as often as it was in one.
        steps: Optimizer steps.
        phases: Seconds of each part.
    """

    seconds: float
    generated: int
    trained: int
    steps: int
    phases: dict[str, float]


@dataclass(frozen=True)
class Setting:
    """What all sides share.

    Args:
        folder: For everything that is written.
        models: Teacher and student.
        prompts: Train prompts.
        step_prompts: Prompts in an optimizer step.
        pack_tokens: Tokens of a pack, one of which makes an optimizer step here.
        new_tokens: Longest response.
        epochs: In all.
        precision: `bf16` or `fp32`.
        device: Where everything computes.
    """

    folder: Path
    models: Models
    prompts: int
    step_prompts: int
    pack_tokens: int
    new_tokens: int
    epochs: int
    precision: str
    device: str


def new_run(setting: Setting, rounds: int) -> Run:
    """Create a run of its own, brought to where its first round begins."""
    folder = Path(tempfile.mkdtemp(dir=setting.folder))
    values = config_values(
        folder,
        setting.models,
        setting.prompts,
        device=setting.device,
        rounds=rounds,
        held_out=HELD_OUT,
        generate={"max_new_tokens": setting.new_tokens},
        pack={"max_tokens": setting.pack_tokens},
        train={
            "epochs_per_round": setting.epochs // rounds,
            "precision": setting.precision,
            "gradient_checkpointing": False,
            "guard": {"max_policy_kl": None},
        },
    )
    # Short ones: what on-policy distillation spends most of its time on is responses.
    write_prompts(Path(values["prompts"]["sources"][0]["path"]), setting.prompts + HELD_OUT, words=(2, 8))
    config = parse_config(values)
    run = Run(RunStore.create(config), config)
    finish(run, MODELS)
    return run


def near_policy(setting: Setting, rounds: int) -> Outcome:
    """Run every round's loop."""
    run = new_run(setting, rounds)
    keys = [StageKey(stage, index) for index in range(rounds) for stage in LOOP]
    started = time.perf_counter()
    with redirect_stdout(sys.stderr):
        manifests = [execute(*run, key) for key in keys]
    seconds = time.perf_counter() - started
    shutil.rmtree(run.store.folder)  # a checkpoint a round
    phases = {stage: sum(m.counters["seconds"] for m in manifests if m.stage == stage) for stage in LOOP}
    by_stage = {stage: [m.counters for m in manifests if m.stage == stage] for stage in LOOP}
    return Outcome(
        seconds,
        generated=sum(counters["tokens"] for counters in by_stage["generate"]),
        trained=sum(counters["response_tokens"] for counters in by_stage["train"]),
        steps=by_stage["train"][-1]["policy_step"],
        phases=phases | {"plans, hashes, manifests": seconds - sum(phases.values())},
    )


def chats(setting: Setting) -> list[list[dict[str, str]]]:
    """Return the messages of the train prompts, as the near-policy side has them."""
    run = new_run(replace(setting, epochs=1), 1)
    table = run.store.read_table(PROMPTS, PROMPTS_TABLE, ["split", "messages"])
    return [
        [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
        for row in table.to_pylist()
        if row["split"] == "train"
    ]


def arguments_of_trl(setting: Setting, folder: str) -> dict[str, Any]:
    """Return what both TRL trainers are told."""
    on_gpu = setting.device.startswith("cuda")
    return {
        "output_dir": folder,
        "num_train_epochs": setting.epochs,
        "per_device_train_batch_size": setting.step_prompts,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "bf16": setting.precision == "bf16",
        "gradient_checkpointing": False,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "temperature": 1.0,
        "beta": 0.0,
    }


def distillation_trainer(setting: Setting, messages: list[list[dict[str, str]]], folder: str) -> Any:
    """Prepare TRL's DistillationTrainer."""
    import torch
    from datasets import Dataset
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    from tasks.trainer_settings import on_device

    arguments = DistillationConfig(**arguments_of_trl(setting, folder), max_completion_length=setting.new_tokens)
    return DistillationTrainer(
        **loaded(setting),
        args=on_device(arguments, torch.device(setting.device)),
        train_dataset=Dataset.from_dict({"prompt": messages}),
    )


def gkd_trainer(setting: Setting, messages: list[list[dict[str, str]]], folder: str) -> Any:
    """Prepare TRL's GKDTrainer, always on-policy; its collator wants replies, which it then replaces by samples."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import torch
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from tasks.trainer_settings import on_device

    replies = [[*chat, {"role": "assistant", "content": "x" * setting.new_tokens}] for chat in messages]
    arguments = GKDConfig(**arguments_of_trl(setting, folder), max_new_tokens=setting.new_tokens, lmbda=1.0)
    return GKDTrainer(
        **loaded(setting),
        args=on_device(arguments, torch.device(setting.device)),
        train_dataset=Dataset.from_dict({"messages": replies}),
    )


def loaded(setting: Setting) -> dict[str, Any]:
    """Load what a TRL trainer needs: float32 weights to train, the teacher as it lies in its folder."""
    from tasks.language_model.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(setting.models.student)
    tokenizer.padding_side = "left"
    return {
        "model": load_model(setting.models.student, dtype="float32", device=setting.device),
        "teacher_model": load_model(setting.models.teacher, device=setting.device),
        "processing_class": tokenizer,
    }


Trainer = Callable[[Setting, list[list[dict[str, str]]], str], Any]


def on_policy(setting: Setting, messages: list[list[dict[str, str]]], prepare: Trainer) -> Outcome:
    """Train with a TRL trainer."""
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder, redirect_stdout(sys.stderr):
        trainer = prepare(setting, messages, folder)
        calls = note_generation(trainer.model, trainer.processing_class.eos_token_id)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    tokens, sampling = sum(call.tokens for call in calls), sum(call.seconds for call in calls)
    phases = {"generate": sampling, "teacher and training": seconds - sampling}
    return Outcome(seconds, tokens, tokens, trainer.state.global_step, phases)


class Generation(NamedTuple):
    """One call of ``generate``: response tokens, and seconds."""

    tokens: int
    seconds: float


def note_generation(model: Any, end_id: int) -> list[Generation]:
    """Let ``model.generate`` note each of its calls, responses counted up to their end; return the notes."""
    original, notes = model.generate, list[Generation]()

    def generate(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        output = original(*args, **kwargs)
        sequences = output if not hasattr(output, "sequences") else output.sequences
        ends = sequences[:, kwargs["input_ids"].shape[1] :] == end_id
        tokens = int((ends.cumsum(1) - ends.long() == 0).sum())
        notes.append(Generation(tokens, time.perf_counter() - started))
        return output

    model.generate = generate
    return notes
