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
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.end_to_end_sides import (
    Outcome,
    Setting,
    chats,
    distillation_trainer,
    gkd_trainer,
    near_policy,
    on_policy,
)
from benchmarks.measure import Measurement, Work, alternate, at_least, ratios
from benchmarks.random_models import SHAPES, write_model
from benchmarks.report import BenchmarkParser, main
from benchmarks.runs import Models

HERE, EVERY_EPOCH = "here", "here, every epoch"
DISTILLATION, GKD = "DistillationTrainer", "GKDTrainer"


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
    return outcome_rows({side: [one.value for one in taken] for side, taken in samples.items()}), notes


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
