"""The simulation beside measured runs: rates from runs at 1x and 4x prompts predict every round of one at 16x.

The runs are the loop's stages in processes of their own, without Prefect, which adds the same few seconds to every
round (`benchmarks.overhead`).

With `--prompts` it measures nothing and prints what a run of so many prompts takes, from the rates in
`benchmarks.sizing`; docs/scale.md holds those tables.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.measure import Bar, Measurement, at_most
from benchmarks.report import BenchmarkParser, main
from benchmarks.runs import Models, Run, make_run, write_models
from benchmarks.scale_model import ROUND_STAGES, Observed, Simulated, fit, observe, simulate
from benchmarks.sizing import run_table
from flows.process import run_in_process
from schemas.stage_key import WARMUP
from tasks.graph import loop

FACTORS = (1, 4, 16)
BAR = at_most(15)


def run_sizes(folder: Path, models: Models, arguments: argparse.Namespace) -> dict[int, list[Observed]]:
    """Run the loop at all sizes, stage by stage in turn, so that what else the machine does meets all of them."""
    runs = {factor: make_sized(folder, models, factor * arguments.size, arguments) for factor in FACTORS}
    walls = {factor: [0.0] * arguments.rounds for factor in FACTORS}
    for key in loop(runs[1].config):
        for factor, run in runs.items():
            began = time.perf_counter()
            run_in_process(*run, key)
            if key.round is not None and key.round != WARMUP:
                walls[factor][key.round] += time.perf_counter() - began
    return {factor: observe(run, walls[factor]) for factor, run in runs.items()}


def make_sized(folder: Path, models: Models, prompts: int, arguments: argparse.Namespace) -> Run:
    """Create a run whose every file is full, at 1x too."""
    return make_run(
        Path(tempfile.mkdtemp(dir=folder)),
        models,
        prompts,
        device=arguments.device,
        rounds=arguments.rounds,
        devices={"cpu_threads": 1},
        generate={"max_new_tokens": arguments.new_tokens, "shard_prompts": arguments.size},
        score={"shard_samples": arguments.size},
        pack={"max_tokens": 1_024, "shard_bins": 4},
        train={"epochs_per_round": arguments.epochs, "gradient_checkpointing": False},
    )


def measure(arguments: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Run all sizes, fit the rates to the smaller two, and predict the largest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = write_models(folder, arguments.model, arguments.model, device=arguments.device)
        passes = [run_sizes(folder, models, arguments) for _ in range(arguments.repeats)]
    rounds = {factor: [sizes[factor] for sizes in passes] for factor in FACTORS}
    known = [one for factor in FACTORS[:2] for run in rounds[factor] for one in run]
    load = replace(rounds[4][0][0].load, prompts=FACTORS[-1] * arguments.size)
    rows = compare(simulate(load, fit(known)), rounds[FACTORS[-1]])
    notes = [
        f"1x is {arguments.size:,} prompts, {arguments.rounds} rounds of {arguments.epochs} epoch(s), responses of "
        f"{arguments.new_tokens} tokens at most; random models `{arguments.model}`, one CPU thread a stage.",
        f"Fitted to 1x and 4x ({arguments.repeats} runs each), predicted for 16x; measured is the median of "
        f"{arguments.repeats} runs at 16x. Off by: predicted over measured, less 100%.",
    ]
    return rows, notes


def compare(predicted: Simulated, runs: Sequence[Sequence[Observed]]) -> list[Measurement]:
    """Set a prediction beside several runs of the same work: each round, all of them, and a round's stages."""
    rows: list[Measurement] = []

    def beside(what: str, unit: str, found: float, measured: Sequence[float], bar: Bar | None) -> None:
        middle = float(np.median(measured))
        rows.append(Measurement(f"{what}: measured", list(measured), unit))
        rows.append(Measurement(f"{what}: predicted", [found], unit))
        rows.append(Measurement(f"{what}: off by", [100 * abs(found / middle - 1)], "%", bar))

    count = range(len(predicted.walls))
    for index in count:
        beside(f"round {index}, wall-clock", "s", predicted.walls[index], [run[index].wall for run in runs], BAR)
    beside("all rounds, wall-clock", "s", predicted.wall, [sum(one.wall for one in run) for run in runs], BAR)
    for stage in ROUND_STAGES:
        taken = [run[index].seconds[stage] for run in runs for index in count]
        beside(f"{stage}, time of a round", "s", predicted.seconds[0][stage], taken, None)
    for stage in ROUND_STAGES:
        written = [run[index].bytes[stage] / 1e6 for run in runs for index in count]
        beside(f"{stage}, size of a round", "MB", predicted.bytes[0][stage] / 1e6, written, BAR)
    return rows


def parser() -> BenchmarkParser:
    """Return the command's arguments."""
    result = BenchmarkParser("simulate", "Predicted beside measured: time and bytes of a run's rounds.")
    result.add_size("--size", 64, 8, "prompts at 1x")
    result.add_size("--rounds", 2, 1, "rounds")
    result.add_size("--new-tokens", 64, 8, "longest response")
    result.add_size("--epochs", 1, 1, "epochs a round")
    result.add_argument("--model", default="micro", help="shape of both models (benchmarks.random_models.SHAPES)")
    result.add_argument("--prompts", type=float, help="measure nothing: print what a run of so many prompts takes")
    result.add_argument("--prompt-tokens", type=float, default=150, help="with --prompts: tokens of a prompt")
    result.add_argument("--response-tokens", type=float, default=500, help="with --prompts: tokens of a response")
    result.add_argument("--gpus", type=int, default=8, help="with --prompts: devices")
    return result


if __name__ == "__main__":
    asked = parser().read()
    if asked.prompts is None:
        main(parser(), measure)
    else:
        sys.stdout.write(run_table(asked.prompts, asked.prompt_tokens, asked.response_tokens, asked.gpus))
