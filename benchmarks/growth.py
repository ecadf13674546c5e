"""Growth: 1x, 4x and 16x prompts through generate, score, filter and pack: time linear, peak memory flat.

Each stage runs in a process of its own, as in a run. The models are random and tiny by default: what grows with the
prompts must show beside what does not. Shards are small, so that 1x already fills several.
"""

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.measure import Measurement, alternate, at_most, memory_growth
from benchmarks.report import BenchmarkParser, main
from benchmarks.runs import Run, finish, make_run, run_apart, write_models
from schemas.manifest import Manifest
from schemas.stage_key import StageKey
from tasks.graph import MODELS, SAMPLING_STAGES

FACTORS = (1, 4, 16)
LINEAR = at_most(1.10)


def pass_through(run: Run) -> dict[str, Manifest]:
    """Run the stages from generate to pack, each again from its start; return their manifests."""
    return {stage: run_apart(run, StageKey(stage, 0)) for stage in SAMPLING_STAGES}


def marginal_ratio(times: Sequence[float], factors: Sequence[int] = FACTORS) -> float:
    """Return how much dearer one more prompt is in the upper step than in the lower; fixed costs cancel.

    >>> marginal_ratio([12.0, 18.0, 42.0])  # 10 s to load a model, then 2 s for each 1x
    1.0
    """
    (a, b, c), (low, middle, high) = times, factors
    return ((c - b) / (high - middle)) / ((b - a) / (middle - low))


def measure(arguments: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Run every size in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = write_models(folder, arguments.teacher, arguments.student, device=arguments.device)
        runs = {
            factor: make_run(
                folder / f"{factor}x",
                models,
                factor * arguments.prompts,
                device=arguments.device,
                generate={"max_new_tokens": arguments.new_tokens, "shard_prompts": arguments.shard},
                score={"shard_samples": arguments.shard},
                pack={"max_tokens": 2_048, "shard_bins": 4},
            )
            for factor in FACTORS
        }
        for run in runs.values():
            finish(run, MODELS)
        sides = {f"{factor}x": partial(pass_through, run) for factor, run in runs.items()}
        samples = alternate(sides, arguments.repeats, warmup=arguments.warmup)
    passes = [[taken.value for taken in samples[f"{factor}x"]] for factor in FACTORS]
    rows: list[Measurement] = []
    for stages in [list(SAMPLING_STAGES), *([stage] for stage in SAMPLING_STAGES)]:
        rows += time_rows(stages, passes)
    for stage in SAMPLING_STAGES:
        rows += memory_rows(stage, passes, arguments.prompts)
    notes = [
        f"1x is {arguments.prompts:,} prompts of {arguments.new_tokens} new tokens at most, in shards of "
        f"{arguments.shard}; models `{arguments.teacher}` and `{arguments.student}`, random weights.",
        "One more prompt, 4x to 16x over 1x to 4x: what it takes beyond the fixed cost of a stage (loading a model).",
        "Memory is of the stage's process, the imported libraries in it included.",
    ]
    return rows, notes


def time_rows(stages: Sequence[str], passes: Sequence[Sequence[dict[str, Manifest]]]) -> list[Measurement]:
    """Time of some stages together: a pass at each size, and one more prompt."""
    name = "all four stages" if len(stages) > 1 else stages[0]
    times = [[sum(one[stage].counters["seconds"] for stage in stages) for one in size] for size in passes]
    rows = [
        Measurement(f"{name}: time at {factor}x", values, "s") for factor, values in zip(FACTORS, times, strict=True)
    ]
    ratio = [marginal_ratio(each) for each in zip(*times, strict=True)]
    bar = LINEAR if len(stages) > 1 else None
    rows.append(Measurement(f"{name}: one more prompt, 4x to 16x over 1x to 4x", ratio, "x", bar))
    return rows


def memory_rows(stage: str, passes: Sequence[Sequence[dict[str, Manifest]]], prompts: int) -> list[Measurement]:
    """Peak memory of a stage: at 1x, at 16x over 1x, and what each more sample adds."""
    peaks = [[one[stage].counters["peak_memory_bytes"] for one in size] for size in passes]
    low, high = peaks[0], peaks[-1]
    added = (FACTORS[-1] - FACTORS[0]) * prompts
    return memory_growth(stage, low, high, FACTORS[-1], added)


def parser() -> BenchmarkParser:
    """Return the command's arguments."""
    result = BenchmarkParser("growth", "Time and memory of generate, score, filter and pack as prompts grow.")
    result.add_size("--prompts", 256, 8, "prompts at 1x")
    result.add_size("--new-tokens", 64, 8, "longest response")
    result.add_size("--shard", 64, 4, "prompts in a file of generate, samples in one of score")
    result.add_argument("--teacher", default="micro", help="shape of the teacher (benchmarks.random_models.SHAPES)")
    result.add_argument("--student", default="micro", help="shape of the student")
    return result


if __name__ == "__main__":
    main(parser(), measure)
