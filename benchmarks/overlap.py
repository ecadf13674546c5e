"""Overlap: wall-clock time of the rounds with `overlap: true` against `overlap: false`, beside the ideal.

`npd run` on the same config, in turn. The ideal saving is, for each round that can run ahead, the shorter of its
generate and score and of the training before it, as they took without overlap. On a CPU each stage gets one thread, so
that two stages side by side have a core each, as if they were devices; give `--sampler` and `--trainer` for two GPUs.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.measure import Measurement, alternate, ratios
from benchmarks.report import BenchmarkParser, main
from benchmarks.runs import Models, Run, config_values, run_command, span, write_models
from schemas.stage_key import StageKey
from tasks.graph import SAMPLING_STAGES, TRAINING_STAGES


def run_rounds(folder: Path, models: Models, overlap: bool, arguments: argparse.Namespace) -> Run:
    """Run the command from nothing."""
    place = Path(tempfile.mkdtemp(dir=folder))
    sampler, trainer = (device or arguments.device for device in (arguments.sampler, arguments.trainer))
    values = config_values(
        place,
        models,
        arguments.prompts,
        rounds=arguments.rounds,
        devices={"sampler": sampler, "teacher": sampler, "trainer": trainer, "cpu_threads": arguments.threads or None},
        generate={"max_new_tokens": arguments.new_tokens},
        pack={"max_tokens": arguments.pack_tokens},
        train={"epochs_per_round": arguments.epochs, "gradient_checkpointing": False},
    )
    return run_command(values, folder / "prefect", f"overlap={str(overlap).lower()}")


def wall(run: Run) -> float:
    """Return the seconds from the start of the first round to the end of the last."""
    stages = (*SAMPLING_STAGES, *TRAINING_STAGES)
    keys = [StageKey(stage, index) for index in range(run.config.rounds) for stage in stages]
    return span(run.store.finished(key) for key in keys)


def ideal_saving(run: Run) -> float:
    """Return what a run without overlap could have saved: min(generate + score, train) of each round but the first."""
    saved = 0.0
    for index in range(1, run.config.rounds):
        ahead = sum(span([run.store.finished(StageKey(stage, index))]) for stage in ("generate", "score"))
        saved += min(ahead, span([run.store.finished(StageKey("train", index - 1))]))
    return saved


def measure(arguments: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Run both ways in turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = write_models(folder, arguments.teacher, arguments.student, device=arguments.device)
        sides = {f"{way}": partial(run_rounds, folder, models, way, arguments) for way in (False, True)}
        samples = alternate(sides, arguments.repeats, warmup=arguments.warmup)
        without, overlapped = ([wall(taken.value) for taken in samples[f"{way}"]] for way in (False, True))
        ideal = [ideal_saving(taken.value) for taken in samples["False"]]
    saved = [a - b for a, b in zip(without, overlapped, strict=True)]
    rows = [
        Measurement("rounds without overlap", without, "s"),
        Measurement("rounds with overlap", overlapped, "s"),
        Measurement("saved", saved, "s"),
        Measurement("ideal: min(generate + score, train) of each round but the first", ideal, "s"),
        Measurement("saved, of the ideal", [100 * share for share in ratios(saved, ideal)], "%"),
        Measurement("saved, of the time without overlap", [100 * x for x in ratios(saved, without)], "%"),
    ]
    threads = f"{arguments.threads} thread(s) a stage" if arguments.threads else "as many threads as cores"
    notes = [
        f"{arguments.rounds} rounds of {arguments.prompts} prompts, {arguments.new_tokens} new tokens at most, "
        f"{arguments.epochs} epochs; random models `{arguments.teacher}` and `{arguments.student}`; {threads}.",
    ]
    return rows, notes


def parser() -> BenchmarkParser:
    """Return the command's arguments."""
    result = BenchmarkParser("overlap", "Wall-clock time that sampling ahead saves, beside the ideal.")
    result.add_size("--rounds", 3, 2, "rounds")
    result.add_size("--prompts", 192, 6, "train prompts")
    result.add_size("--new-tokens", 64, 8, "longest response")
    result.add_size("--epochs", 2, 1, "epochs a round")
    result.add_size("--pack-tokens", 1_024, 512, "tokens in a bin")
    result.add_argument("--threads", type=int, default=1, help="CPU threads of a stage; 0: as many as cores")
    result.add_argument("--sampler", help="device that samples and scores; by default --device")
    result.add_argument("--trainer", help="device that trains; by default --device")
    result.add_size("--teacher", "mini", "micro", "shape of the teacher (benchmarks.random_models.SHAPES)")
    result.add_size("--student", "mini", "micro", "shape of the student")
    return result


if __name__ == "__main__":
    main(parser(), measure)
