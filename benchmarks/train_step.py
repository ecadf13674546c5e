"""Training step: tokens/s and peak memory of NearPolicyTrainer beside plain TRL SFTTrainer on the very same packs.

Both train the same random student on the same rows with the same boundaries, one pack a micro-batch, with the same
precision, AdamW and gradient clipping. Neither saves, evaluates or checkpoints gradients. What differs is what each
does for its purpose:

- `here`: CE + top-k KL from targets read with the pack from Parquet, attention by `packed_sequences`, a log of every
  step (`tasks.train.optimize.trainer_arguments`, which the stage trains with too). A run also measures the policy KL,
  every `train.guard.every_steps` steps at no more than a third of a step's cost: that is left out.
- `SFTTrainer`: CE alone, by its fused head that also takes entropy and accuracy; rows in memory, collated with
  `padding_free=True`, so that position ids restart with each sequence; a log every 10 steps. With sdpa (where there is
  no flash attention) transformers then makes a block-diagonal mask [tokens x tokens]: sequences do not see each other,
  and a row costs its tokens squared.

Each repeat is a process of its own: its peak memory is what the process or the GPU held at most while it trained. The
first steps are left out of the time.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.measure import Measurement, Prepare, Work, alternate_in_children, at_least, at_most, ratios
from benchmarks.random_packs import pack_table
from benchmarks.report import BenchmarkParser, main

TOP_K = 10
HERE, TRL = "here", "SFTTrainer"


class Layout(NamedTuple):
    """Sequences of a pack: what to call them, and their lengths (int64, tokens)."""

    name: str
    lengths: NDArray[np.int64]


class Setting(NamedTuple):
    """What both sides train: see the command's arguments."""

    student: str
    layers: int
    device: str
    precision: str
    packs_per_step: int
    steps: int
    warmup: int


def layouts(tokens: int, short: int) -> list[Layout]:
    """Return packs of many sequences, a quarter to seven quarters of ``short`` long, and of one."""
    count = tokens // short
    lengths = np.linspace(short // 4, 2 * short - short // 4, count).astype(np.int64)
    return [Layout(f"{count} short", lengths), Layout("one long", np.array([lengths.sum()]))]


def step_clock(warmup: int, device: str) -> Any:
    """Return a callback whose ``seconds`` is the time of the steps after the first ``warmup``."""
    import torch
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        started = seconds = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step not in (warmup, state.max_steps):
                return
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
            if state.global_step == warmup:
                self.started = time.perf_counter()
            else:
                self.seconds = time.perf_counter() - self.started

    return StepClock()


def student(setting: Setting) -> Any:
    """Return the random student with float32 weights, in the cut of ``layers`` layers (0: whole)."""
    from benchmarks.random_models import SHAPES, make_model

    shape = SHAPES[setting.student]
    shape = replace(shape, layers=setting.layers or shape.layers)
    model = make_model(shape, device=setting.device)
    model.config.use_cache = False
    return model


def timed(trainer: Any, clock: Any, tokens: int, folder: tempfile.TemporaryDirectory[str]) -> Work[float]:
    """Train; return tokens per second."""

    def work() -> float:
        # Standard output is the table's.
        with folder, redirect_stdout(sys.stderr):
            trainer.train()
        return tokens / float(clock.seconds)

    return work


def timed_tokens(setting: Setting, lengths: NDArray[np.int64]) -> int:
    """Return the tokens of the steps that are timed."""
    return (setting.steps - setting.warmup) * setting.packs_per_step * int(lengths.sum())


def here(setting: Setting, lengths: NDArray[np.int64]) -> Work[float]:
    """Prepare this project's trainer."""
    import torch
    from transformers.trainer_utils import SaveStrategy

    from benchmarks.random_models import make_tokenizer
    from schemas.config import TrainConfig
    from tasks.language_model.loading import prefer_packed_attention
    from tasks.train.loss import Objective, choose_kernel
    from tasks.train.optimize import trainer_arguments
    from tasks.train.packs import PackReader
    from tasks.train.schedule import RoundSchedule
    from tasks.train.trainer import NearPolicyTrainer

    folder = tempfile.TemporaryDirectory()
    model, path = student(setting), Path(folder.name, "packs.parquet")
    assert prefer_packed_attention(model), "the student cannot attend by `packed_sequences`"
    vocab = model.config.vocab_size
    pq.write_table(pack_table(setting.packs_per_step, lengths, vocab, TOP_K), path, compression="zstd")
    config = TrainConfig(
        packs_per_step=setting.packs_per_step,
        precision=setting.precision,
        gradient_checkpointing=False,
    )
    schedule = RoundSchedule(0, setting.packs_per_step, setting.packs_per_step, 0, setting.steps, setting.steps)
    device = torch.device(setting.device)
    arguments = trainer_arguments(config, schedule, Path(folder.name), "train-step", 0, device, 1)
    arguments.save_strategy = SaveStrategy.NO
    trainer = NearPolicyTrainer(
        model=model,
        args=arguments,
        tokenizer=make_tokenizer(vocab),
        reader=PackReader([path]),
        schedule=schedule,
        optimizer_config=config,
        objective=Objective(
            config.kd_weight, config.kd_form, config.loss_chunk, choose_kernel(config.loss_kernel, device)
        ),
    )
    clock = step_clock(setting.warmup, setting.device)
    trainer.add_callback(clock)
    return timed(trainer, clock, timed_tokens(setting, lengths), folder)


def sft(setting: Setting, lengths: NDArray[np.int64]) -> Work[float]:
    """Prepare TRL's trainer."""
    folder = tempfile.TemporaryDirectory()
    model = student(setting)
    trainer = sft_trainer(model, setting, lengths, Path(folder.name))
    clock = step_clock(setting.warmup, setting.device)
    trainer.add_callback(clock)
    return timed(trainer, clock, timed_tokens(setting, lengths), folder)


def sft_trainer(model: Any, setting: Setting, lengths: NDArray[np.int64], folder: Path) -> Any:
    """Return TRL's trainer with the packs as its dataset."""
    import datasets
    import torch
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from benchmarks.random_models import make_tokenizer
    from schemas.config import TrainConfig
    from tasks.trainer_settings import on_device

    vocab, config = model.config.vocab_size, TrainConfig()
    packs = pack_table(setting.packs_per_step, lengths, vocab, TOP_K)
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=setting.steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=setting.packs_per_step,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        max_grad_norm=config.max_grad_norm,
        bf16=setting.precision == "bf16",
        gradient_checkpointing=False,
        use_cpu=not setting.device.startswith("cuda"),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        # The rows are packs already.
        dataset_kwargs={"skip_prepare_dataset": True},
        padding_free=True,
        max_length=None,
        dataloader_pin_memory=setting.device.startswith("cuda"),
    )
    return SFTTrainer(
        model=model,
        args=on_device(arguments, torch.device(setting.device)),
        train_dataset=datasets.Dataset(packs.select(["input_ids", "labels", "seq_lengths"])),
        processing_class=make_tokenizer(vocab),
    )


def layout_rows(layout: Layout, setting: Setting, repeats: int) -> list[Measurement]:
    """Both sides on one kind of pack."""
    sides: Mapping[str, Prepare[float]] = {
        HERE: partial(here, setting, layout.lengths),
        TRL: partial(sft, setting, layout.lengths),
    }
    samples = alternate_in_children(sides, repeats, device=setting.device)
    rate = {name: [taken.value for taken in samples[name]] for name in samples}
    peak = {name: [float(taken.peak_bytes) for taken in samples[name]] for name in samples}
    extra = {name: [float(taken.extra_bytes) for taken in samples[name]] for name in samples}
    label = f"{layout.name} of {int(layout.lengths.sum()):,} tokens"
    rows = [Measurement(f"{label}: {name}", values, "tokens/s") for name, values in rate.items()]
    rows += [
        Measurement(f"{label}: peak memory, {name}", [value / 2**20 for value in values], "MiB")
        for name, values in peak.items()
    ]
    return [
        *rows,
        Measurement(f"{label}: tokens/s over SFTTrainer's", ratios(rate[HERE], rate[TRL]), "x", at_least(0.95)),
        Measurement(f"{label}: peak memory over SFTTrainer's", ratios(peak[HERE], peak[TRL]), "x", at_most(1.05)),
        Measurement(f"{label}: memory beside the model, over SFTTrainer's", ratios(extra[HERE], extra[TRL]), "x"),
    ]


def measure(arguments: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Measure both kinds of pack."""
    precision = arguments.precision or ("bf16" if arguments.device.startswith("cuda") else "fp32")
    setting = Setting(
        arguments.student,
        arguments.layers,
        arguments.device,
        precision,
        arguments.packs_per_step,
        arguments.steps,
        arguments.warmup_steps,
    )
    rows = []
    for layout in layouts(arguments.tokens, arguments.short):
        rows += layout_rows(layout, setting, arguments.repeats)
    notes = [
        f"`{setting.student}`, {setting.layers or 'all'} layers, {precision}; {setting.packs_per_step} pack(s) a step, "
        f"{setting.steps} steps, the first {setting.warmup} left out. A quarter of each sequence is prompt.",
        "`here` trains on CE and top-k KL with stored targets, `SFTTrainer` on CE alone; see the docstring for what "
        "else they do.",
        "SFTTrainer isolates the sequences of a row too: with sdpa by a mask of tokens x tokens.",
    ]
    return rows, notes


def parser() -> BenchmarkParser:
    """Return the command's arguments."""
    result = BenchmarkParser("train_step", "Tokens/s and peak memory of the training step beside TRL's SFTTrainer.")
    result.add_size("--tokens", 2_048, 128, "tokens of a pack")
    result.add_size("--short", 128, 32, "mean length of the short sequences")
    result.add_size("--packs-per-step", 1, 1, "packs in one optimizer step")
    result.add_size("--steps", 5, 3, "optimizer steps")
    result.add_size("--warmup-steps", 1, 1, "of them, not timed")
    result.add_size("--student", "smollm2-135m", "micro", "shape of the student (benchmarks.random_models.SHAPES)")
    result.add_size("--layers", 4, 2, "layers of it; 0: all")
    result.add_argument("--precision", choices=["bf16", "fp32"], help="by default fp32 on a CPU, bf16 on a GPU")
    return result


if __name__ == "__main__":
    main(parser(), measure)
