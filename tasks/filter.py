"""Stage filter: which samples are worth learning from, and a ledger of why each was kept or dropped."""

import math

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.config import FilterConfig, Quantile
from schemas.errors import StageError
from schemas.stage_key import StageKey
from schemas.tables import FILTER, GENERATE, ZONES, score_schema
from tasks.sequences import locate, read_lengths
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


def run(job: StageJob) -> None:
    """Write the round's ledger: one row per scored sample, in the score table's order and shards.

    Raises:
        StageError: no sample is kept; says which bound dropped how many. Nothing is written then.
        ArtifactError: the score and generate tables do not belong together.
    """
    store, config = job.store, job.config
    score, generate = StageKey("score", job.round), StageKey("generate", job.round)
    schema = score_schema(config.score.top_k, config.score.topk_dtype)
    shards = list(store.iterate_table(score, schema, ["sample_id", "delta_ifd"]))
    if not sum(shard.num_rows for shard in shards):
        raise StageError(f"{job.key.label}: the score table is empty; there is nothing to keep")
    scores = pa.concat_tables(shards)
    lengths = read_lengths(store, generate)
    rows = locate(scores.column("sample_id"), lengths.sample_id, generate.label)
    tokens = (lengths.prompt_tokens + lengths.response_tokens)[rows]
    delta_ifd = scores.column("delta_ifd").combine_chunks()
    bounds = applied_bounds(delta_ifd, config.filter)
    lag = policy_lag(job)[rows]
    table = ledger(scores.column("sample_id"), delta_ifd, tokens, bounds, config.pack.max_tokens, lag)
    counts = dict.fromkeys(REASONS, 0) | _counts(table, "reason")
    if not counts["kept"]:
        raise StageError(f"{job.key.label}: {nothing_kept(counts, delta_ifd, bounds, config.pack.max_tokens)}")
    start = 0
    for index, shard in enumerate(shards):
        if not store.part(job.key, index).is_file():
            store.write_table(store.part(job.key, index), table.slice(start, shard.num_rows), FILTER)
        start += shard.num_rows
        job.progress(start, table.num_rows, "samples")
    low, high = (float(bound) for bound in bounds)
    job.counters |= {
        "samples": table.num_rows,
        "kept": counts["kept"],
        "kept_tokens": int(tokens[table.column("keep").to_numpy()].sum()),
        "dropped": {reason: count for reason, count in counts.items() if reason != "kept"},
        "zones": dict.fromkeys(ZONES, 0) | _counts(table, "zone"),
        "min_delta_ifd": low if math.isfinite(low) else None,
        "max_delta_ifd": high if math.isfinite(high) else None,
        "policy_lag": int(lag.max()),
    }


def policy_lag(job: StageJob) -> NDArray[np.int64]:
    """Return the lag of every sample of the round's generate table, in its order; int64 [samples].

    Lag: optimizer steps between the weights that sampled and those that begin to learn from the samples.
    """
    store = job.store
    begins = int(store.finished(StageKey("train", job.round - 1)).counters["policy_step"]) if job.round > 0 else 0
    steps = store.read_table(StageKey("generate", job.round), GENERATE, ["policy_step"]).column("policy_step")
    lag: NDArray[np.int64] = begins - steps.to_numpy()
    return lag


def applied_bounds(delta_ifd: pa.Array, config: FilterConfig) -> tuple[np.float32, np.float32]:
    """Return the bounds as float32, the type of what they are compared with.

    A quantile is taken over the finite values, in float64 (linear interpolation); no bound is an infinity, and so
    is a quantile where no value is finite.

    Args:
        delta_ifd: float32 [samples], with nulls.
        config: The section `filter`.
    """
    values = _values(delta_ifd)
    finite = values[np.isfinite(values)].astype(np.float64)

    def applied(bound: float | Quantile | None, unbounded: float) -> np.float32:
        if isinstance(bound, Quantile):
            bound = float(np.quantile(finite, bound.quantile)) if finite.size else None
        return np.float32(unbounded if bound is None else bound)

    return applied(config.min_delta_ifd, -np.inf), applied(config.max_delta_ifd, np.inf)


def ledger(
    sample_id: pa.ChunkedArray,
    delta_ifd: pa.Array,
    sequence_tokens: NDArray[np.int64],
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
        sequence_tokens: int64 [samples], prompt and response together.
        bounds: Lowest and highest delta-IFD to keep, as ``applied_bounds`` gives them.
        max_tokens: Longest sequence that fits into a bin.
        lag: int64 [samples]; see ``policy_lag``.

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
    counts: dict[str, int], delta_ifd: pa.Array, bounds: tuple[np.float32, np.float32], max_tokens: int
) -> str:
    """Return what to tell a user whose every sample was dropped: by what, the round's delta-IFD, what to change."""
    values = _values(delta_ifd)
    finite = values[np.isfinite(values)].astype(np.float64)
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
        f"delta-IFD of the {finite.size} finite: min {finite.min():.6g}, median {np.median(finite):.6g}, "
        f"max {finite.max():.6g}"
        if finite.size
        else "no delta-IFD is finite"
    )
    return (
        f"none of {len(values)} samples is kept: {', '.join(f'{counts[r]} {what}' for r, (what, _) in met.items())}. "
        f"{spread}. To go on: {'; '.join(remedy for _, remedy in met.values())}."
    )


def _values(delta_ifd: pa.Array) -> Float32:
    values: Float32 = delta_ifd.fill_null(float("nan")).to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
    return values


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    pairs = table.column(column).drop_null().value_counts().to_pylist()
    return {pair["values"]: pair["counts"] for pair in pairs}
