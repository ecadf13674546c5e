"""Overhead: seconds that one more round takes when the models are next to nothing.

`npd run` with three rounds and with one, in turn: half of the difference is one more round without the start of the
command. What remains of model work in it (a tiny model loaded, a few steps) counts as overhead here, so the result is
an upper bound. Where the time goes is told by the manifests, and by doing again what can be done again alone.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq

from benchmarks.measure import Measurement, alternate, at_most, sample
from benchmarks.report import BenchmarkParser, main
from benchmarks.runs import Models, Run, config_values, run_apart, run_command, write_models
from schemas.manifest import Manifest
from schemas.stage_key import StageKey
from tasks.graph import SAMPLING_STAGES, STAGES, TRAINING_STAGES

STAGES_OF_ROUND = (*SAMPLING_STAGES, *TRAINING_STAGES)
ROUND_SECONDS = 600


class Timed(NamedTuple):
    """A finished run, and when its command began and ended (seconds since the epoch)."""

    run: Run
    began: float
    ended: float


def run_rounds(folder: Path, models: Models, rounds: int, arguments: argparse.Namespace) -> Timed:
    """Run so many rounds from nothing."""
    place = Path(tempfile.mkdtemp(dir=folder))
    values = config_values(
        place,
        models,
        arguments.prompts,
        device=arguments.device,
        rounds=rounds,
        generate={"max_new_tokens": 8},
        pack={"max_tokens": 512},
        train={"epochs_per_round": 1, "gradient_checkpointing": False},
    )
    began = time.time()
    run = run_command(values, folder / "prefect")
    return Timed(run, began, time.time())


def round_manifests(run: Run, index: int) -> list[Manifest]:
    """Return the manifests of one round's stages."""
    return [run.store.finished(StageKey(stage, index)) for stage in STAGES_OF_ROUND]


def round_wall(run: Run, index: int) -> float:
    """Return the seconds from the end of the round before to the end of round ``index``."""
    before, last = (run.store.finished(StageKey("evaluate", i)) for i in (index - 1, index))
    return moment(last.finished) - moment(before.finished)


def moment(text: str) -> float:
    """Return a manifest's time in seconds since the epoch."""
    return datetime.fromisoformat(text).timestamp()


def hash_again(run: Run, index: int) -> None:
    """Hash everything a round wrote, as its stages did."""
    for stage in STAGES_OF_ROUND:
        run.store.outputs(StageKey(stage, index))


def tables_again(run: Run, index: int) -> None:
    """Read every table a round wrote and write it again."""
    with tempfile.TemporaryDirectory() as folder:
        for manifest in round_manifests(run, index):
            for record in manifest.outputs:
                if record.rows is not None:
                    table = pq.read_table(run.store.folder / record.path, partitioning=None)
                    pq.write_table(table, Path(folder, "again.parquet"), compression="zstd")


def process_seconds(run: Run) -> float:
    """Return what a process of its own adds to a stage: start, plan, hashes, manifest, end."""
    taken = sample(partial(run_apart, run, StageKey("filter", run.config.rounds - 1)))
    own: float = taken.value.counters["seconds"]
    return taken.seconds - own


def measure(arguments: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Run the command with one and with three rounds in turn, then take the long run apart."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = write_models(folder, "micro", "micro", device=arguments.device)
        sides = {
            f"{rounds}": partial(run_rounds, folder, models, rounds, arguments) for rounds in (1, arguments.rounds)
        }
        samples = alternate(sides, arguments.repeats, warmup=arguments.warmup)
        one, many = [taken.value for taken in samples["1"]], [taken.value for taken in samples[f"{arguments.rounds}"]]
        last = many[-1].run
        run_apart(last, StageKey("filter", arguments.rounds - 1))
        again = {
            "hashing of what a round writes": [sample(partial(hash_again, last, 1)).seconds for _ in many],
            "reading and writing a round's tables": [sample(partial(tables_again, last, 1)).seconds for _ in many],
            "a process of its own for one stage": [process_seconds(last) for _ in many],
        }
        rows = [*whole_rows(one, many), *part_rows(many)]
    rows += [Measurement(f"of it, measured alone: {what}", values, "s") for what, values in again.items()]
    own = sum(STAGES[stage].own_process for stage in STAGES_OF_ROUND)
    notes = [
        f"{arguments.prompts} prompts, models `micro`. {len(STAGES_OF_ROUND)} stages a round, {own} of them in "
        "processes of their own.",
        "Between stages: Prefect, process starts, plans, hashes and manifests.",
    ]
    return rows, notes


def whole_rows(one: Sequence[Timed], many: Sequence[Timed]) -> list[Measurement]:
    """The commands, and what one more round adds."""
    rounds = many[0].run.config.rounds
    walls = [[timed.ended - timed.began for timed in runs] for runs in (one, many)]
    more = [(b - a) / (rounds - 1) for a, b in zip(*walls, strict=True)]
    return [
        Measurement("`npd run`, 1 round", walls[0], "s"),
        Measurement(f"`npd run`, {rounds} rounds", walls[1], "s"),
        Measurement("one more round", more, "s", at_most(10)),
        Measurement(
            "one more round, of a round of 10 minutes", [100 * s / ROUND_SECONDS for s in more], "%", at_most(2)
        ),
    ]


def part_rows(many: Sequence[Timed]) -> list[Measurement]:
    """Where the time of a round goes, and that of the command's start and end."""
    rounds = range(1, many[0].run.config.rounds)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    def inside(run: Run, index: int) -> float:
        return float(sum(manifest.counters["seconds"] for manifest in round_manifests(run, index)))

    parts: dict[str, list[float]] = {
        "a round, from the manifests": [mean([round_wall(t.run, i) for i in rounds]) for t in many],
        "of it, in stages": [mean([inside(t.run, i) for i in rounds]) for t in many],
        "of it, between stages": [mean([round_wall(t.run, i) - inside(t.run, i) for i in rounds]) for t in many],
    }
    for stage in STAGES_OF_ROUND:
        parts[f"of it, in stage {stage}"] = [
            mean([t.run.store.finished(StageKey(stage, i)).counters["seconds"] for i in rounds]) for t in many
        ]
    first, end = StageKey("prompts"), StageKey("evaluate", rounds[-1])
    parts["once a run: from the command to the first stage"] = [
        moment(t.run.store.finished(first).started) - t.began for t in many
    ]
    parts["once a run: from the last stage to the end of the command"] = [
        t.ended - moment(t.run.store.finished(end).finished) for t in many
    ]
    return [Measurement(what, values, "s") for what, values in parts.items()]


def parser() -> BenchmarkParser:
    """Return the command's arguments."""
    result = BenchmarkParser("overhead", "Seconds a round that are not model work.")
    result.add_size("--rounds", 3, 2, "rounds of the longer run")
    result.add_size("--prompts", 16, 4, "train prompts")
    return result


if __name__ == "__main__":
    main(parser(), measure)
