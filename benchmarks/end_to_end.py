"""End to end: wall-clock time of near-policy distillation against TRL's on-policy trainers.

All sides take the same random student and teacher, the same prompts, as many epochs, responses of the same length
(random models hardly ever end one early), AdamW, the same precision and as many optimizer steps an epoch, so as many
response tokens in one. What each does:

- `here`: the stages of every round (generate, score, filter, pack, train, export) by `tasks.stage.execute` in this
  process, each loading its models and with all its Parquet, hashes and checkpoints. 10 epochs in 2 rounds of 5: 2
  samples a prompt, 2 teacher prefills a sample, 5 training passes over each. No filter bounds: all samples are kept.
- `here, every epoch`: the same in 10 rounds of 1: as many generated tokens as TRL.
- `DistillationTrainer`, `GKDTrainer` (lmbda 1): every optimizer step samples its batch with `transformers.generate`
  (no vLLM, here neither), runs the teacher over the samples and takes forward KL (beta 0) over the whole vocabulary; no
  sample is used twice. No gradient checkpointing, logging, saving or evaluation. Only `trainer.train()` is timed:
  models, prompts and trainer are ready.

Prompts, model checks and held-out references are made before and not timed; held-out evaluation is left out on all
sides. Each side runs once with one epoch before anything counts; then they take turns.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measure import Measurement, Sample, Work, alternate, at_least, ratios
from benchmarks.random_models import SHAPES, write_model
from benchmarks.report import BenchmarkParser, main
from benchmarks.runs import Models, Run, config_values, finish, write_prompts
from schemas.config import parse_config
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.graph import MODELS, PROMPTS, SAMPLING_STAGES
from tasks.stage import execute

HELD_OUT = 1
LOOP = (*SAMPLING_STAGES, "train", "export")
HERE, EVERY_EPOCH = "here", "here, every epoch"
DISTILLATION, GKD = "DistillationTrainer", "GKDTrainer"


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
    from datasets import Dataset
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    arguments = arguments_of_trl(setting, folder)
    return DistillationTrainer(
        **loaded(setting),
        args=DistillationConfig(**arguments, max_completion_length=setting.new_tokens),
        train_dataset=Dataset.from_dict({"prompt": messages}),
    )


def gkd_trainer(setting: Setting, messages: list[list[dict[str, str]]], folder: str) -> Any:
    """Prepare TRL's GKDTrainer, always on-policy; its collator wants replies, which it then replaces by samples."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    replies = [[*chat, {"role": "assistant", "content": "x" * setting.new_tokens}] for chat in messages]
    arguments = arguments_of_trl(setting, folder)
    return GKDTrainer(
        **loaded(setting),
        args=GKDConfig(**arguments, max_new_tokens=setting.new_tokens, lmbda=1.0),
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


def pack_tokens(setting: Setting, messages: list[list[dict[str, str]]]) -> int:
    """Return the least pack size with which an epoch takes as many steps here as ``step_prompts`` makes for TRL.

    Responses are taken to have all the tokens they may: models with random weights seldom end one.
    """
    from tasks.language_model.loading import load_tokenizer
    from tasks.pack.binning import best_fit_decreasing

    tokenizer = load_tokenizer(setting.models.student)
    prompt_tokens = [
        len(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))["input_ids"])
        for chat in messages
    ]
    lengths = np.array(prompt_tokens) + setting.new_tokens
    steps = setting.prompts // setting.step_prompts
    capacity = max(int(lengths.max()), -(-int(lengths.sum()) // steps))
    while len(best_fit_decreasing(lengths, capacity).offsets) - 1 > steps:
        capacity += 1
    return capacity


def prepare_setting(arguments: argparse.Namespace, folder: Path) -> Setting:
    """Write the models and return what all sides share.

    Raises:
        ValueError: the schedule does not come out even.
    """
    if arguments.epochs % arguments.rounds:
        raise ValueError(f"--epochs {arguments.epochs} is no multiple of --rounds {arguments.rounds}")
    if arguments.prompts % arguments.step_prompts:
        raise ValueError(
            f"--prompts {arguments.prompts} is no multiple of --step-prompts {arguments.step_prompts}: TRL would drop "
            "the last batch"
        )
    import torch

    on_gpu = arguments.device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    roles = {"teacher": (arguments.teacher, arguments.teacher_layers), "student": (arguments.student, arguments.layers)}
    written = {
        role: write_model(
            folder / role,
            replace(SHAPES[name], layers=layers or SHAPES[name].layers),
            seed=seed,
            device=arguments.device,
            dtype=dtype,
        )
        for seed, (role, (name, layers)) in enumerate(roles.items())
    }
    return Setting(
        folder=folder,
        models=Models(**written),
        prompts=arguments.prompts,
        step_prompts=arguments.step_prompts,
        pack_tokens=4_096,
        new_tokens=arguments.new_tokens,
        epochs=arguments.epochs,
        precision=arguments.precision or ("bf16" if on_gpu else "fp32"),
        device=arguments.device,
    )


def sides(setting: Setting, messages: list[list[dict[str, str]]], rounds: int) -> dict[str, Work[Outcome]]:
    """Return all sides."""
    return {
        HERE: partial(near_policy, setting, rounds),
        EVERY_EPOCH: partial(near_policy, setting, setting.epochs),
        DISTILLATION: partial(on_policy, setting, messages, distillation_trainer),
        GKD: partial(on_policy, setting, messages, gkd_trainer),
    }


def measure(arguments: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Run all sides in turn."""
    with tempfile.TemporaryDirectory() as name:
        setting = prepare_setting(arguments, Path(name))
        messages = chats(setting)
        setting = replace(setting, pack_tokens=pack_tokens(setting, messages))
        for side in sides(replace(setting, epochs=1), messages, 1).values():
            side()
        samples = alternate(
            sides(setting, messages, arguments.rounds), arguments.repeats, device=setting.device, warmup=0
        )
    notes = [
        f"Student `{arguments.student}` ({arguments.layers or 'all'} layers), teacher `{arguments.teacher}` "
        f"({arguments.teacher_layers or 'all'} layers), {setting.precision}; {setting.prompts} prompts, "
        f"{setting.new_tokens} new tokens at most, {setting.epochs} epochs; TRL: {setting.step_prompts} prompts a "
        f"step; here: a pack of {setting.pack_tokens:,} tokens a step.",
        f"`{HERE}`: {arguments.rounds} rounds of {setting.epochs // arguments.rounds} epochs; `{EVERY_EPOCH}`: "
        f"{setting.epochs} rounds of one. Every stage in this process, model loading, tables and checkpoints included.",
        "TRL: `trainer.train()` alone, models loaded before; no vLLM on any side.",
    ]
    return outcome_rows({side: outcomes(taken) for side, taken in samples.items()}), notes


def outcomes(samples: list[Sample[Outcome]]) -> list[Outcome]:
    """Return what the repeats of a side did."""
    return [taken.value for taken in samples]


def outcome_rows(done: dict[str, list[Outcome]]) -> list[Measurement]:
    """The ratios, then each side's time, counts and parts."""
    times = {name: Measurement(f"{name}: time", [o.seconds for o in values], "s") for name, values in done.items()}
    better = min((DISTILLATION, GKD), key=lambda name: times[name].median)
    rows = [
        Measurement(f"time of {better}, the better of TRL's, over {name}", ratios(values, times[name].values), "x", bar)
        for name, bar in ((HERE, at_least(8.1)), (EVERY_EPOCH, None))
        for values in [times[better].values]
    ]
    rows += times.values()
    for name, values in done.items():
        rows.append(Measurement(f"{name}: generated", [o.generated for o in values], "tokens"))
        rows.append(Measurement(f"{name}: trained on", [o.trained for o in values], "tokens"))
        rows.append(Measurement(f"{name}: optimizer", [o.steps for o in values], "steps"))
    rows += [
        Measurement(f"{name}: of it, {phase}", [o.phases[phase] for o in done[name]], "s")
        for name in done
        for phase in done[name][0].phases
    ]
    return rows


def parser() -> BenchmarkParser:
    """Return the command's arguments."""
    result = BenchmarkParser("end_to_end", "Wall-clock time of the whole loop against TRL's on-policy trainers.")
    result.add_size("--epochs", 10, 2, "epochs in all")
    result.add_size("--rounds", 2, 1, "rounds they are in; a refresh between two")
    result.add_size("--prompts", 16, 4, "train prompts")
    result.add_size("--step-prompts", 8, 2, "prompts in an optimizer step")
    result.add_size("--new-tokens", 48, 6, "longest response")
    result.add_size("--student", "smollm2-135m", "micro", "shape of the student (benchmarks.random_models.SHAPES)")
    result.add_size("--layers", 4, 2, "layers of it; 0: all")
    result.add_size("--teacher", "smollm2-135m", "micro", "shape of the teacher")
    result.add_size("--teacher-layers", 12, 2, "layers of it; 0: all")
    result.add_argument("--precision", choices=["bf16", "fp32"], help="by default fp32 on a CPU, bf16 on a GPU")
    return result


if __name__ == "__main__":
    main(parser(), measure)
