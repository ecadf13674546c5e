"""What the report draws of a run, read from its finished stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from schemas.config import RunConfig
from schemas.errors import ArtifactError
from schemas.manifest import RunRecord
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.comparison.intervals import Interval
from tasks.graph import loop
from tasks.report.evaluation import STUDENT, Metric, paired_change, read_metrics
from tasks.report.histograms import Counts
from tasks.report.ledger import Ledger, read_ifd, read_ledger
from tasks.report.stages import StageCost, costs, sampler_of
from tasks.report.training import Curves, PackFill, read_curves, read_packs
from tasks.stage import standing

T = TypeVar("T")

SHOWN_ROUNDS = 12
"""Rounds that get drawings of their own; of more, as many from first to last."""


@dataclass(frozen=True)
class RunFindings:
    """A run as far as it has come; a list holds what its finished stages have, in the order of the loop.

    Args:
        record: The run's record.
        config: The config it last ran with.
        ledgers: Of each round that sampled.
        ifd: By round, samples by both models' IFD; see ``read_ifd``. Rounds that are shown only.
        packs: Of the warm-up and each round that packed.
        curves: Of the warm-up and each round that trained.
        metrics: Held-out metrics.
        accuracy_change: Of the student over the rounds, prompt by prompt; None: it was not evaluated twice.
        stages: Every stage, finished or not.
        samplers: By round, the policy version that sampled and its optimizer steps.
    """

    record: RunRecord
    config: RunConfig
    ledgers: list[Ledger]
    ifd: dict[int, Counts]
    packs: list[PackFill]
    curves: list[Curves]
    metrics: list[Metric]
    accuracy_change: Interval | None
    stages: list[StageCost]
    samplers: dict[int, tuple[str, int]]

    @property
    def shown_rounds(self) -> list[int]:
        """Rounds whose samples get drawings of their own."""
        return spread([ledger.round for ledger in self.ledgers], SHOWN_ROUNDS)


def read_findings(store: RunStore, *, through: int | None = None) -> RunFindings:
    """Read what stands of a run (``standing``), shard by shard: memory holds one shard of one table, and counts.

    Args:
        store: The run.
        through: Leave out rounds after this one; None: none.

    Raises:
        ArtifactError: there is no run, or a manifest or table is damaged.
    """
    record = store.record()
    if record is None:
        raise ArtifactError(f"{store.url}: no run.json; start a run with `npd run CONFIG`")
    config = store.config
    done = standing(store, config, through=through)

    def rounds(stage: str) -> list[int]:
        return [key.round for key in done if key.stage == stage and key.round is not None]

    filtered, metrics = rounds("filter"), read_metrics(store, done)
    return RunFindings(
        record=record,
        config=config,
        ledgers=[read_ledger(store, index) for index in filtered],
        ifd={index: read_ifd(store, config, index) for index in spread(filtered, SHOWN_ROUNDS)},
        packs=[read_packs(store, config, index) for index in rounds("pack")],
        curves=[found for index in rounds("train") if (found := read_curves(store, index)) is not None],
        metrics=metrics,
        accuracy_change=_accuracy_change(store, metrics),
        stages=costs(loop(config), done),
        samplers={index: sampler for index in rounds("generate") if (sampler := sampler_of(store, index)) is not None},
    )


def _accuracy_change(store: RunStore, metrics: list[Metric]) -> Interval | None:
    rounds = [metric.round for metric in metrics if (metric.name, metric.model) == ("accuracy", STUDENT)]
    if len(rounds) < 2:
        return None
    first, last = ((StageKey("evaluate", index), STUDENT) for index in (rounds[0], rounds[-1]))
    return paired_change(store, first, last)


def spread(values: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` of ``values``, evenly from the first to the last.

    >>> spread([0, 1, 2, 3, 4], 3), spread([0, 1], 3)
    ([0, 2, 4], [0, 1])
    """
    if len(values) <= count:
        return list(values)
    return [values[round(place * (len(values) - 1) / (count - 1))] for place in range(count)]


def start_name(config: RunConfig) -> str:
    """Return what the model that the rounds start from is called."""
    return "warm-up" if config.warmup is not None else "start"
