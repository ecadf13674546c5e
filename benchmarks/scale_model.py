"""What a run costs, predicted: each stage has a fixed cost and one per unit of its work, and rounds follow each other.

Pure functions: rates come from finished runs' manifests (`observe`, `fit`), or are written down for other machines
(`benchmarks.sizing`). `benchmarks.simulate` holds predictions against measured runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.runs import Run
from schemas.manifest import Manifest
from schemas.stage_key import StageKey
from tasks.graph import SAMPLING_STAGES, TRAINING_STAGES

ROUND_STAGES = (*SAMPLING_STAGES, *TRAINING_STAGES)


@dataclass(frozen=True)
class Workload:
    """What a run works on.

    Args:
        prompts: Train prompts.
        rounds: Rounds; each samples every prompt.
        prompt_tokens: Tokens of a prompt, on average.
        response_tokens: Tokens of a response, on average.
        samples_per_prompt: Responses to a prompt in a round.
        kept: Share of the samples that the filter keeps.
        epochs_per_round: Passes over a round's packs.
    """

    prompts: float
    rounds: int = 2
    prompt_tokens: float = 150.0
    response_tokens: float = 500.0
    samples_per_prompt: int = 1
    kept: float = 1.0
    epochs_per_round: int = 5

    @property
    def samples(self) -> float:
        """Samples of a round."""
        return self.prompts * self.samples_per_prompt

    @property
    def packed_tokens(self) -> float:
        """Tokens of a round's packs."""
        return self.samples * self.kept * (self.prompt_tokens + self.response_tokens)


WORK: dict[str, Callable[[Workload], float]] = {
    "prompts": lambda load: load.prompts,
    "generate": lambda load: load.samples * load.response_tokens,
    "score": lambda load: load.samples * (load.prompt_tokens + load.response_tokens),
    "filter": lambda load: load.samples,
    "pack": lambda load: load.packed_tokens,
    "train": lambda load: load.packed_tokens * load.epochs_per_round,
    "export": lambda load: 0.0,
    "evaluate": lambda load: 0.0,
}
"""A stage's units of work in one round: prompts, response tokens, tokens, samples, or none where it costs the same."""

WRITTEN: dict[str, Callable[[Workload], float]] = WORK | {
    "score": WORK["generate"],
    "pack": lambda load: load.samples * load.kept * load.response_tokens,
    "train": lambda load: 0.0,
}
"""What a stage's bytes grow with: targets belong to response tokens, a checkpoint to the model."""


@dataclass(frozen=True)
class Line:
    """A cost: ``fixed + each * work``."""

    fixed: float
    each: float

    def at(self, work: float) -> float:
        """Return the cost of some work."""
        return self.fixed + self.each * work


@dataclass(frozen=True)
class Rates:
    """What stages cost.

    Args:
        seconds: Of a stage in one round, by its work.
        bytes: It writes in one round, by its work.
        between: Seconds of a round that are in no stage: process starts, hashes, orchestration.
    """

    seconds: Mapping[str, Line]
    bytes: Mapping[str, Line]
    between: float


@dataclass(frozen=True)
class Observed:
    """One round of a finished run.

    Args:
        load: What it worked on.
        seconds: Of each stage.
        bytes: Each stage wrote.
        wall: Seconds of all its stages, their starts and ends included.
    """

    load: Workload
    seconds: Mapping[str, float]
    bytes: Mapping[str, float]
    wall: float


def observe(run: Run, walls: Sequence[float]) -> list[Observed]:
    """Return every round of a finished run, from its manifests; ``walls``: what each round took in all, seconds."""
    rounds = []
    for index, wall in enumerate(walls):
        manifests = {stage: run.store.finished(StageKey(stage, index)) for stage in ROUND_STAGES}
        rounds.append(
            Observed(
                load_of(manifests, run.config.rounds, run.config.train.epochs_per_round),
                {stage: float(manifest.counters["seconds"]) for stage, manifest in manifests.items()},
                {stage: sum(record.bytes for record in manifest.outputs) for stage, manifest in manifests.items()},
                wall,
            )
        )
    return rounds


def load_of(manifests: Mapping[str, Manifest], rounds: int, epochs_per_round: int) -> Workload:
    """Return what a round worked on, from its stages' counters."""
    generate, pack = manifests["generate"].counters, manifests["pack"].counters
    return Workload(
        prompts=generate["prompts"],
        rounds=rounds,
        prompt_tokens=(pack["tokens"] - pack["response_tokens"]) / pack["sequences"],
        response_tokens=generate["tokens"] / generate["samples"],
        samples_per_prompt=generate["samples"] // generate["prompts"],
        kept=manifests["filter"].counters["kept"] / generate["samples"],
        epochs_per_round=epochs_per_round,
    )


def fit(rounds: Sequence[Observed]) -> Rates:
    """Fit the costs of stages to rounds of at least two sizes, by least squares; no cost is negative."""

    def lines(
        work: Mapping[str, Callable[[Workload], float]], costs: Callable[[Observed], Mapping[str, float]]
    ) -> dict[str, Line]:
        return {
            stage: _line([work[stage](one.load) for one in rounds], [costs(one)[stage] for one in rounds])
            for stage in ROUND_STAGES
        }

    between = [one.wall - sum(one.seconds.values()) for one in rounds]
    times, sizes = lines(WORK, lambda one: one.seconds), lines(WRITTEN, lambda one: one.bytes)
    return Rates(times, sizes, float(np.median(between)))


def _line(work: Sequence[float], costs: Sequence[float]) -> Line:
    """Fit a line with no negative part.

    >>> _line([1.0, 3.0], [5.0, 9.0])
    Line(fixed=3.0, each=2.0)
    """
    if len(set(work)) == 1:
        return Line(float(np.median(costs)), 0.0)
    each, fixed = np.polyfit(work, costs, 1)
    if fixed < 0:
        return Line(0.0, float(np.dot(work, costs) / np.dot(work, work)))
    return Line(round(float(fixed), 9), max(0.0, round(float(each), 15)))


@dataclass(frozen=True)
class Simulated:
    """A predicted run.

    Args:
        seconds: Of each stage, by round.
        bytes: Each stage writes, by round.
        walls: Seconds from the end of one round to that of the next.
    """

    seconds: list[dict[str, float]]
    bytes: list[dict[str, float]]
    walls: list[float]

    @property
    def wall(self) -> float:
        """Seconds of all rounds."""
        return sum(self.walls)


def simulate(
    load: Workload, rates: Rates, *, overlap: bool = False, workers: Mapping[str, int] | None = None
) -> Simulated:
    """Predict a run.

    With ``overlap`` a round is generated and scored from when the round before it begins to train, as flow `npd-round`
    does it; both then have devices of their own.

    Args:
        load: What it works on.
        rates: What stages cost on one worker.
        overlap: The config's `overlap`.
        workers: Devices that share a stage's work (not its fixed cost); 1 where a stage is not named.
    """
    workers = workers or {}
    seconds = {
        stage: line.fixed + line.each * WORK[stage](load) / workers.get(stage, 1)
        for stage, line in rates.seconds.items()
    }
    size = {stage: line.at(WRITTEN[stage](load)) for stage, line in rates.bytes.items()}
    ahead = seconds["generate"] + seconds["score"]
    then = seconds["filter"] + seconds["pack"]
    training = sum(seconds[stage] for stage in TRAINING_STAGES)
    # A round that is sampled beside the training of the one before waits only for what that did not cover.
    waits = max(0.0, ahead - training) if overlap else ahead
    walls = [rates.between + wait + then + training for wait in [ahead] + [waits] * (load.rounds - 1)]
    return Simulated([seconds] * load.rounds, [size] * load.rounds, walls)
