"""How full the packs are, and what training did step by step."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.config import RunConfig
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import TRAIN_METRICS, pack_schema
from tasks.language_model.ragged import Ragged
from tasks.report.histograms import Values

FULL = 0.95
"""Fill from which a pack counts as full."""

SHOWN_STEPS = 240
"""Points of a curve; of more optimizer steps, as many in a row are averaged as it takes."""

_MEANS = ("loss", "ce", "kd", "policy_kl")


@dataclass(frozen=True)
class PackFill:
    """The packs of a round.

    Args:
        round: The round; WARMUP for the warm-up.
        packs: How many there are.
        sequences: Whole sequences in them.
        tokens: Tokens in them.
        capacity: Tokens that one can hold.
        least: Fill of the emptiest, 0 to 1.
        full: Packs whose fill is at least FULL.
    """

    round: int
    packs: int
    sequences: int
    tokens: int
    capacity: int
    least: float
    full: int

    @property
    def fill(self) -> float:
        """Share of all places that hold a token."""
        return self.tokens / (self.packs * self.capacity) if self.packs else 0.0


def read_packs(store: RunStore, config: RunConfig, index: int) -> PackFill:
    """Count the packs of round ``index``, one shard at a time.

    Raises:
        ArtifactError: a table is damaged.
    """
    schema = pack_schema(None) if index == WARMUP else pack_schema(config.score.top_k, config.score.topk_dtype)
    packs, sequences, tokens, least, full = 0, 0, 0, 1.0, 0
    for shard in store.iterate_table(StageKey("pack", index), schema, ["seq_lengths"]):
        lengths = Ragged.from_arrow(shard.column("seq_lengths"))
        ends = np.concatenate([[0], np.cumsum(lengths.values, dtype=np.int64)])
        sizes = np.diff(ends[lengths.offsets])
        packs, sequences, tokens = packs + len(sizes), sequences + len(lengths.values), tokens + int(sizes.sum())
        if sizes.size:
            fills = sizes / config.pack.max_tokens
            least, full = min(least, float(fills.min())), full + int((fills >= FULL).sum())
    return PackFill(index, packs, sequences, tokens, config.pack.max_tokens, least, full)


@dataclass(frozen=True)
class Curves:
    """Training of one round, at most SHOWN_STEPS points.

    Args:
        round: The round; WARMUP for the warm-up.
        steps: Optimizer steps it took.
        last_step: The last of them.
        values: By column, float64 [points]: `step` (the last averaged), token-weighted means of `loss`, `ce`, `kd` and
            `policy_kl` (NaN where there are none), and the last `learning_rate`.
        most_policy_kl: The largest policy KL; None: none was measured.
    """

    round: int
    steps: int
    last_step: int
    values: dict[str, Values]
    most_policy_kl: float | None


def read_curves(store: RunStore, index: int) -> Curves | None:
    """Return the curves of round ``index``'s training; None if it took no step.

    Args:
        store: The run.
        index: The round; WARMUP for the warm-up.

    Raises:
        ArtifactError: the table is damaged.
    """
    columns = ["step", "learning_rate", "response_tokens", *_MEANS]
    table = store.read_table(StageKey("train", index), TRAIN_METRICS, columns)
    return curves_of(table, index) if table.num_rows else None


def curves_of(table: pa.Table, index: int) -> Curves:
    """Return the curves of a train metrics table with at least one row; see ``read_curves``."""
    weights = np.maximum(table.column("response_tokens").to_numpy().astype(np.float64), 1.0)
    values = thinned(table, _MEANS, weights)
    return Curves(index, table.num_rows, int(values["step"][-1]), values, pc.max(table.column("policy_kl")).as_py())


def thinned(table: pa.Table, means: Iterable[str], weights: Values) -> dict[str, Values]:
    """Return columns of a metrics table with at least one row at SHOWN_STEPS points at most, float64 [points].

    Of `step` and `learning_rate` a point has the last step's value.

    Args:
        table: One row an optimizer step.
        means: Columns of which it has the weighted mean over its steps; NaN where none of them has a value.
        weights: Of the steps, [rows].
    """
    rows = table.num_rows
    starts = np.unique(np.arange(min(rows, SHOWN_STEPS)) * rows // min(rows, SHOWN_STEPS))
    ends = np.append(starts[1:], rows) - 1
    values = {name: table.column(name).to_numpy().astype(np.float64)[ends] for name in ("step", "learning_rate")}
    for name in means:
        column = table.column(name).to_numpy().astype(np.float64)
        known = np.isfinite(column)
        total = np.add.reduceat(np.where(known, column * weights, 0.0), starts)
        weight = np.add.reduceat(np.where(known, weights, 0.0), starts)
        values[name] = np.divide(total, weight, out=np.full(len(starts), np.nan), where=weight > 0)
    return values
