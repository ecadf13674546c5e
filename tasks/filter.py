"""Stage filter: which samples are worth learning from, and a ledger of why each was kept or dropped."""

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.config import FilterConfig, Quantile
from schemas.errors import StageError
from schemas.stage_key import StageKey
from schemas.tables import FILTER, GENERATE, ZONES, score_schema
from tasks.sequences import Source, sequence_lengths, side_by_side
from tasks.stage import StageJob

REASONS = (
    "kept",
    "not_scorable",
    "non_finite_delta_ifd",
    "below_min_delta_ifd",
    "above_max_delta_ifd",
    "too_long_for_pack",
)
"""Values of the ledger's ``reason``; of several that hold, the first after "kept" is given."""

_KEPT, _NOT_SCORABLE, _NON_FINITE, _BELOW, _ABOVE, _TOO_LONG = range(len(REASONS))
_LEARNABLE, _DEGENERATE, _DISCONNECT, _NO_ZONE = range(len(ZONES) + 1)

Float32 = NDArray[np.float32]

NO_SCORES: Float32 = np.empty(0, np.float32)
"""The delta-IFD of no sample."""


def run(job: StageJob) -> None:
    """Write the round's ledger: one row per scored sample, in the score table's order and shards.

    Memory holds one shard at a time; a bound that is a quantile takes the whole round's delta-IFD beside it, 4 bytes a
    sample.

    Raises:
        StageError: no sample is kept; says which bound dropped how many. Nothing stays written then.
        ArtifactError: the score and generate tables do not belong together.
    """
    store, config = job.store, job.config
    score = score_source(job, ["sample_id", "delta_ifd"])
    generate = Source(
        StageKey("generate", job.round), GENERATE, ["sample_id", "policy_step", "prompt_ids", "response_ids"]
    )
    total = score.rows(store)
    if not total:
        raise StageError(f"{job.key.label}: the score table is empty; there is nothing to keep")
    bounds = applied_bounds(read_delta_ifd(job) if takes_quantile(config.filter) else NO_SCORES, config.filter)
    begins = first_step(job)
    reasons, zones = dict.fromkeys(REASONS, 0), dict.fromkeys(ZONES, 0)
    done = kept_tokens = longest_lag = 0
    written: list[Path] = []
    for scores, rollouts in side_by_side(store, score, generate):
        tokens = np.add(*sequence_lengths(rollouts))
        lag = begins - rollouts.column("policy_step").to_numpy()
        delta_ifd = scores.column("delta_ifd").combine_chunks()
        table = ledger(scores.column("sample_id"), delta_ifd, tokens, bounds, config.pack.max_tokens, lag)
        written.append(store.part(job.key, len(written)))
        if not written[-1].is_file():
            store.write_table(written[-1], table, FILTER)
        _count(table, "reason", reasons)
        _count(table, "zone", zones)
        kept_tokens += int(tokens[table.column("keep").to_numpy()].sum())
        longest_lag = max(longest_lag, int(lag.max(initial=0)))
        done += table.num_rows
        job.progress(done, total, "samples")
    if not reasons["kept"]:
        for path in written:
            store.remove(path)
        delta_ifd = read_delta_ifd(job)
        raise StageError(f"{job.key.label}: {nothing_kept(reasons, delta_ifd, bounds, config.pack.max_tokens)}")
    low, high = (float(bound) for bound in bounds)
    job.counters |= {
        "samples": done,
        "kept": reasons["kept"],
        "kept_tokens": kept_tokens,
        "dropped": {reason: count for reason, count in reasons.items() if reason != "kept"},
        "zones": zones,
        "min_delta_ifd": low if math.isfinite(low) else None,
        "max_delta_ifd": high if math.isfinite(high) else None,
        "policy_lag": longest_lag,
    }


def score_source(job: StageJob, columns: list[str]) -> Source:
    """Return columns of the round's score table."""
    settings = job.config.score
    return Source(StageKey("score", job.round), score_schema(settings.top_k, settings.topk_dtype), columns)


def read_delta_ifd(job: StageJob) -> Float32:
    """Return the delta-IFD of every sample of the round; float32 [samples], NaN for null."""
    score = score_source(job, ["delta_ifd"])
    values, row = np.empty(score.rows(job.store), np.float32), 0
    for shard in score.shards(job.store):
        values[row : row + shard.num_rows] = _values(shard.column("delta_ifd").combine_chunks())
        row += shard.num_rows
    return values


def first_step(job: StageJob) -> int:
    """Return the optimizer steps of the weights that begin to learn from the round's samples."""
    if not job.round:
        return 0
    return int(job.store.finished(StageKey("train", job.round - 1)).counters["policy_step"])


def takes_quantile(config: FilterConfig) -> bool:
    """Say whether a bound depends on the whole round."""
    return isinstance(config.min_delta_ifd, Quantile) or isinstance(config.max_delta_ifd, Quantile)


def applied_bounds(delta_ifd: Float32, config: FilterConfig) -> tuple[np.float32, np.float32]:
    """Return the bounds as float32, the type of what they are compared with.

    A quantile is taken over the finite values, in float64 (linear interpolation); no bound is an infinity, and so
    is a quantile where no value is finite.

    Args:
        delta_ifd: float32 [samples]; NaN where there is none. Read only where a bound is a quantile.
        config: The section `filter`.
    """

    def applied(bound: float | Quantile | None, unbounded: float) -> np.float32:
        if isinstance(bound, Quantile):
            bound = _quantile(delta_ifd, bound.quantile)
        return np.float32(unbounded if bound is None else bound)

    return applied(config.min_delta_ifd, -np.inf), applied(config.max_delta_ifd, np.inf)


def ledger(
    sample_id: pa.ChunkedArray,
    delta_ifd: pa.Array,
    sequence_tokens: NDArray[np.integer],
    bounds: tuple[np.float32, np.float32],
    max_tokens: int,
    lag: NDArray[np.int64],
) -> pa.Table:
    """Place every sample in a zone and say whether it is kept, and if not, why.

    Kept: min <= delta_ifd <= max and sequence_tokens <= max_tokens, all inclusive. With bounds (0.0, 0.8) and 8 tokens
    at most:

        delta_ifd  tokens   zone                   keep   reason
        0.3        8        learnable              true   kept
        -0.1       9        degenerate             false  below_min_delta_ifd
        0.9        5        cognitive_disconnect   false  above_max_delta_ifd
        0.3        9        learnable              false  too_long_for_pack
        null       4        null                   false  not_scorable
        inf        4        null                   false  non_finite_delta_ifd

    Args:
        sample_id: strings [samples].
        delta_ifd: float32 [samples]; null where the response had no token to score.
        sequence_tokens: int32 or int64 [samples], prompt and response together.
        bounds: Lowest and highest delta-IFD to keep, as ``applied_bounds`` gives them.
        max_tokens: Longest sequence that fits into a bin.
        lag: int64 [samples]; optimizer steps between the weights that sampled and those that begin to learn from it.

    Returns:
        The filter table (schema FILTER), in the order of the arguments.
    """
    low, high = bounds
    values = _values(delta_ifd)
    scorable = np.asarray(delta_ifd.is_valid())
    below, above = values < low, values > high
    holds = [~scorable, ~np.isfinite(values), below, above, sequence_tokens > max_tokens]
    reason = np.select(holds, [_NOT_SCORABLE, _NON_FINITE, _BELOW, _ABOVE, _TOO_LONG], _KEPT)
    zone = np.select([~np.isfinite(values), below, above], [_NO_ZONE, _DEGENERATE, _DISCONNECT], _LEARNABLE)
    return pa.table(
        {
            "sample_id": sample_id,
            "delta_ifd": delta_ifd,
            "zone": pa.array([*ZONES, None], pa.string()).take(pa.array(zone)),
            "keep": pa.array(reason == _KEPT),
            "reason": pa.array(REASONS, pa.string()).take(pa.array(reason)),
            "min_delta_ifd": pa.array(np.full(len(values), low, np.float32)),
            "max_delta_ifd": pa.array(np.full(len(values), high, np.float32)),
            "policy_lag": pa.array(lag),
        },
        schema=FILTER.columns,
    )


def nothing_kept(
    counts: dict[str, int], delta_ifd: Float32, bounds: tuple[np.float32, np.float32], max_tokens: int
) -> str:
    """Return what to tell a user whose every sample was dropped: by what, the round's delta-IFD, what to change."""
    finite = delta_ifd[np.isfinite(delta_ifd)]
    low, high = bounds
    remedies = {
        "below_min_delta_ifd": (f"below the lower bound {low:.6g}", "lower `filter.min_delta_ifd`"),
        "above_max_delta_ifd": (f"above the upper bound {high:.6g}", "raise `filter.max_delta_ifd`"),
        "too_long_for_pack": (f"longer than {max_tokens} tokens", "raise `pack.max_tokens`"),
        "not_scorable": ("with no scorable response token", "see what stage generate wrote"),
        "non_finite_delta_ifd": ("with a delta-IFD that is not finite", "see the NLL columns stage score wrote"),
    }
    met = {reason: remedy for reason, remedy in remedies.items() if counts[reason]}
    spread = (
        f"delta-IFD of the {finite.size} finite: min {finite.min():.6g}, median {_quantile(finite, 0.5):.6g}, "
        f"max {finite.max():.6g}"
        if finite.size
        else "no delta-IFD is finite"
    )
    return (
        f"none of {delta_ifd.size} samples is kept: "
        f"{', '.join(f'{counts[reason]} {what}' for reason, (what, _) in met.items())}. "
        f"{spread}. To go on: {'; '.join(remedy for _, remedy in met.values())}."
    )


def _values(delta_ifd: pa.Array) -> Float32:
    values: Float32 = delta_ifd.fill_null(float("nan")).to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return values


def _quantile(values: Float32, share: float) -> float | None:
    """Return a quantile of the finite values in float64 (linear interpolation); None if there are none.

    Sorted as float32, so that beside ``values`` only one copy of them is held.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return None
    finite.sort()
    below, between = divmod(share * (finite.size - 1), 1)
    neighbours = finite[int(below) : int(below) + 2].astype(np.float64)
    return float(np.quantile(neighbours, between if neighbours.size > 1 else 0.0))


def _count(table: pa.Table, column: str, counts: dict[str, int]) -> None:
    for pair in table.column(column).drop_null().value_counts().to_pylist():
        counts[pair["values"]] += pair["counts"]
