"""What the filter made of each round's samples, counted shard by shard."""

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from schemas.config import RunConfig
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import FILTER, ZONES, score_schema
from tasks.report.histograms import Counts, Grid

DELTA_IFD = Grid(-8.0, 8.0, 3200)
"""Where delta-IFD is counted."""

IFD = Grid(0.0, 8.0, 400)
"""Where IFD is counted, each model's."""

KEPT = "kept"


def by_frequency(reasons: dict[str, int]) -> dict[str, int]:
    """Return counts by reason, ``kept`` first, then the most frequent.

    >>> list(by_frequency({"empty": 1, "too_long": 2, "kept": 1}))
    ['kept', 'too_long', 'empty']
    """
    return dict(sorted(reasons.items(), key=lambda entry: (entry[0] != KEPT, -entry[1], entry[0])))


@dataclass(frozen=True)
class Ledger:
    """A round's samples.

    Args:
        round: The round that sampled them.
        samples: How many there are.
        low: Lower bound of delta-IFD as applied; -inf: none.
        high: Upper bound; inf: none.
        delta_ifd: Samples of each zone in each bin of DELTA_IFD, int64 [len(ZONES), bins].
        fates: Samples by reason and zone; zone None: no finite delta-IFD.
        policy_lag: Optimizer steps between sampling and training, of the round's first sample; None: no sample.
    """

    round: int
    samples: int
    low: float
    high: float
    delta_ifd: Counts
    fates: dict[tuple[str, str | None], int]
    policy_lag: int | None

    @property
    def kept(self) -> int:
        """Samples that went into training."""
        return sum(count for (reason, _), count in self.fates.items() if reason == KEPT)

    @property
    def reasons(self) -> dict[str, int]:
        """Samples by reason, ``kept`` first, then the most frequent."""
        totals: dict[str, int] = {}
        for (reason, _), count in self.fates.items():
            totals[reason] = totals.get(reason, 0) + count
        return by_frequency(totals)

    def zone(self, zone: str) -> int:
        """Return the samples of a zone."""
        return sum(count for (_, name), count in self.fates.items() if name == zone)


def read_ledger(store: RunStore, index: int) -> Ledger:
    """Count the ledger of round ``index``, whose filter has finished.

    Raises:
        ArtifactError: a table is damaged.
    """
    columns = ["delta_ifd", "zone", "reason", "min_delta_ifd", "max_delta_ifd", "policy_lag"]
    counts = np.zeros((len(ZONES), DELTA_IFD.bins), np.int64)
    fates: dict[tuple[str, str | None], int] = {}
    samples, low, high, lag = 0, -np.inf, np.inf, None
    for shard in store.iterate_table(StageKey("filter", index), FILTER, columns):
        if samples == 0 and shard.num_rows:
            low, high = (float(shard.column(name)[0].as_py()) for name in ("min_delta_ifd", "max_delta_ifd"))
            lag = int(shard.column("policy_lag")[0].as_py())
        samples += shard.num_rows
        for row in shard.group_by(["reason", "zone"]).aggregate([([], "count_all")]).to_pylist():
            fate = (row["reason"], row["zone"])
            fates[fate] = fates.get(fate, 0) + row["count_all"]
        for place, zone in enumerate(ZONES):
            of_zone = shard.filter(pc.equal(shard.column("zone"), zone))
            values = of_zone.column("delta_ifd").to_numpy().astype(np.float64)
            counts[place] += DELTA_IFD.count(values[np.isfinite(values)])
    return Ledger(index, samples, low, high, counts, fates, lag)


def read_reasons(store: RunStore, index: int) -> dict[str, int]:
    """Return the samples of round ``index`` by reason, ``kept`` first, then the most frequent; its filter has finished.

    Raises:
        ArtifactError: the ledger is damaged.
    """
    counts: dict[str, int] = {}
    for shard in store.iterate_table(StageKey("filter", index), FILTER, ["reason"]):
        for row in shard.column("reason").value_counts().to_pylist():
            counts[row["values"]] = counts.get(row["values"], 0) + row["counts"]
    return by_frequency(counts)


def read_ifd(store: RunStore, config: RunConfig, index: int) -> Counts:
    """Count round ``index``'s samples by both models' IFD, int64 [student bins, teacher bins] of IFD.

    Raises:
        ArtifactError: a table is damaged.
    """
    schema = score_schema(config.score.top_k, config.score.topk_dtype)
    counts = np.zeros(IFD.bins * IFD.bins, np.int64)
    for shard in store.iterate_table(StageKey("score", index), schema, ["student_ifd", "teacher_ifd"]):
        student, teacher = (shard.column(name).to_numpy().astype(np.float64) for name in ("student_ifd", "teacher_ifd"))
        both = np.isfinite(student) & np.isfinite(teacher)
        cells = IFD.places(student[both]) * IFD.bins + IFD.places(teacher[both])
        counts += np.bincount(cells, minlength=counts.size)
    return counts.reshape(IFD.bins, IFD.bins)
