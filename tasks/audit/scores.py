"""Scores against the responses they are of, and the ledger against the scores."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.config import Quantile
from schemas.stage_key import StageKey
from schemas.tables import SCORES
from tasks.audit.digests import TARGET_IDS, TARGET_LOGPROBS, fixed_lists, row_digests
from tasks.audit.findings import Audit
from tasks.audit.rollout_index import RolloutIndex
from tasks.audit.tables import shards
from tasks.language_model.ragged import offsets_of

_TARGETS = ("teacher_topk_ids", "teacher_topk_logprobs")

_ROUNDING = 1e-4
"""Relative and absolute difference that float32 columns explain, where one is computed from the others."""


def check_scores(audit: Audit, key: StageKey) -> None:
    """Check that the score table has the rollouts' rows, in their order, each scored and with targets of its length."""
    generate = StageKey("generate", key.round)
    if not audit.needs(key, key, generate) or generate not in audit.rollouts:
        return
    index, rows = audit.rollouts[generate], 0
    for name, first, table in shards(audit, key, ["sample_id", "response_tokens", *SCORES, *_TARGETS]):
        rows = first + table.num_rows
        if rows <= len(index):
            _check_scored(audit, name, table, index, slice(first, rows))
    if rows != len(index):
        audit.broken(key.folder, f"scores {rows:,} samples, `{generate.label}` has {len(index):,}")


def _check_scored(audit: Audit, name: str, table: pa.Table, index: RolloutIndex, place: slice) -> None:
    ids, expected = table.column("sample_id"), index.sample_ids.slice(place.start, table.num_rows)
    same = np.asarray(pc.equal(ids, expected))
    in_order = audit.expect_rows(
        name, 0, ids, "sample_id", same, lambda i: f"stage generate has {expected[i].as_py()} in this place"
    )
    if not in_order:
        return
    tokens = index.response_tokens[place]
    counted = table.column("response_tokens").to_numpy()
    audit.expect_rows(
        name, 0, ids, "response_tokens", counted == tokens, lambda i: f"{counted[i]}, the response has {tokens[i]}"
    )
    lengths = pc.list_value_length(table.column(_TARGETS[0])).to_numpy()
    aligned = audit.expect_rows(
        name, 0, ids, _TARGETS[0], lengths == tokens, lambda i: f"{lengths[i]} rows for {tokens[i]} response tokens"
    )
    _check_arithmetic(audit, name, table, index.nll[place])
    if aligned:
        _take_targets(audit, name, table, index, place, offsets_of(lengths.astype(np.int64)))


def _check_arithmetic(audit: Audit, name: str, table: pa.Table, sampled_nll: NDArray[np.float64]) -> None:
    """Check what of a row follows from the rest of it: IFD, delta-IFD, and the student's mean from its sampling."""
    ids, settings = table.column("sample_id"), audit.config.score
    value = {column: table.column(column).to_numpy().astype(np.float64) for column in SCORES}
    known = np.asarray(table.column("delta_ifd").is_valid())

    def agree(column: str, expected: NDArray[np.float64], what: str, scale: NDArray[np.float64] | float = 0.0) -> None:
        found = value[column]
        close = np.abs(found - expected) <= _ROUNDING * (1 + np.abs(found) + scale)
        holds = close | ~known | ~(np.isfinite(found) & np.isfinite(expected))
        audit.expect_rows(name, 0, ids, column, holds, lambda i: f"{found[i]:.6g}, but {what} make {expected[i]:.6g}")

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for model in ("student", "teacher"):
            conditional, alone = value[f"{model}_nll"], value[f"{model}_nll_uncond"]
            ratio = conditional / alone if settings.ifd_form == "loss_ratio" else np.exp(conditional - alone)
            # A small mean is rounded by more, relative to itself, than a large one.
            scale = np.nan_to_num(np.abs(ratio) / np.maximum(np.abs(alone), 1e-9), posinf=np.inf)
            agree(f"{model}_ifd", ratio, "its negative log-likelihoods", np.minimum(scale, 1e6) * 1e-2)
        teacher, student = value["teacher_ifd"], value["student_ifd"]
        agree("delta_ifd", teacher - student, "the two IFD values", np.abs(teacher) + np.abs(student))
        own = settings.student_logprobs == "sampled" and audit.config.generate.policy == "student"
        if own and settings.context == "header":
            agree("student_nll", sampled_nll, "the sampler's own log-probabilities")


def _take_targets(
    audit: Audit, name: str, table: pa.Table, index: RolloutIndex, place: slice, offsets: NDArray[np.int64]
) -> None:
    """Check the order of the targets of every token, and add them to the digests of their samples."""
    ids, logprobs = (fixed_lists(table.column(column)) for column in _TARGETS)
    falling = (np.diff(logprobs.astype(np.float32), axis=1) <= 0).all(axis=1) & (logprobs[:, 0] <= 0)
    falling &= (ids >= 0).all(axis=1)
    wrong = np.concatenate([[0], np.cumsum(~falling)])
    audit.expect_rows(
        name,
        0,
        table.column("sample_id"),
        _TARGETS[1],
        np.diff(wrong[offsets]) == 0,
        lambda i: "a token's targets are not ids with log-probabilities up to 0, the most likely first",
    )
    index.digest[place] += row_digests(ids, offsets, TARGET_IDS) + row_digests(logprobs, offsets, TARGET_LOGPROBS)


def check_ledger(audit: Audit, key: StageKey) -> None:
    """Check the ledger row by row: its score, its bounds as the config gives them, and what zone and reason follow."""
    generate, score = StageKey("generate", key.round), StageKey("score", key.round)
    if not audit.needs(key, key, generate, score) or generate not in audit.rollouts:
        return
    index = audit.rollouts[generate]
    scored = [table for _, _, table in shards(audit, score, ["sample_id", "delta_ifd"])]
    delta = pa.concat_tables(scored).combine_chunks()
    bounds = _bounds(audit, delta.column("delta_ifd"))
    begins = None if not key.round else audit.counter(StageKey("train", key.round - 1), "policy_step")
    lag = int(begins or 0) - index.policy_step
    kept, rows = np.zeros(len(index), bool), 0
    columns = ["sample_id", "delta_ifd", "zone", "keep", "reason", "min_delta_ifd", "max_delta_ifd", "policy_lag"]
    for name, first, table in shards(audit, key, columns):
        rows = first + table.num_rows
        if rows > min(len(index), delta.num_rows):
            break
        place = slice(first, rows)
        tokens = (index.prompt_tokens + index.response_tokens)[place]
        _check_placed(audit, name, table, delta.slice(first, table.num_rows), bounds, tokens, lag[place])
        kept[place] = np.asarray(table.column("keep"))
    if rows != delta.num_rows:
        audit.broken(key.folder, f"has {rows:,} rows, `{score.label}` has {delta.num_rows:,}")
    else:
        audit.kept[key] = kept
        audit.expect_counter(key, "kept", int(kept.sum()))
        audit.expect_counter(key, "samples", rows)


def _bounds(audit: Audit, delta_ifd: pa.ChunkedArray) -> tuple[np.float32, np.float32]:
    """Return the bounds as the config gives them: numbers, or quantiles over the round's finite values."""
    values = delta_ifd.drop_null().to_numpy()
    finite = values[np.isfinite(values)].astype(np.float64)

    def of(bound: float | Quantile | None, unbounded: float) -> np.float32:
        if isinstance(bound, Quantile):
            return np.float32(np.quantile(finite, bound.quantile) if finite.size else unbounded)
        return np.float32(unbounded if bound is None else bound)

    section = audit.config.filter
    return of(section.min_delta_ifd, -np.inf), of(section.max_delta_ifd, np.inf)


def _check_placed(
    audit: Audit,
    name: str,
    table: pa.Table,
    scored: pa.Table,
    bounds: tuple[np.float32, np.float32],
    tokens: NDArray[np.int64],
    lag: NDArray[np.int64],
) -> None:
    ids = table.column("sample_id")

    def equal(column: str, expected: pa.ChunkedArray | pa.Array, because: str) -> bool:
        found, wanted = (
            table.column(column),
            pa.chunked_array([expected]) if isinstance(expected, pa.Array) else expected,
        )
        nulls = np.asarray(found.is_null()), np.asarray(wanted.is_null())
        same = np.asarray(pc.equal(found, wanted).fill_null(False)) | (nulls[0] & nulls[1])
        if pa.types.is_floating(found.type):
            same |= np.asarray(pc.is_nan(found).fill_null(False)) & np.asarray(pc.is_nan(wanted).fill_null(False))
        return audit.expect_rows(
            name, 0, ids, column, same, lambda i: f"{found[i].as_py()!r}, {because} {wanted[i].as_py()!r}"
        )

    if not equal("sample_id", scored.column("sample_id"), "stage score has in this place"):
        return
    equal("delta_ifd", scored.column("delta_ifd"), "the score table has")
    for column, bound in zip(("min_delta_ifd", "max_delta_ifd"), bounds, strict=True):
        equal(column, pa.array(np.full(len(ids), bound, np.float32)), "the config makes it")
    equal("policy_lag", pa.array(lag.astype(np.int64)), "the steps of sampler and training make it")

    values = scored.column("delta_ifd").fill_null(float("nan")).to_numpy()
    low, high = bounds
    finite = np.isfinite(values)
    zones = np.where(
        ~finite, "", np.where(values < low, "degenerate", np.where(values > high, "cognitive_disconnect", "learnable"))
    )
    equal("zone", pa.array(zones.astype(object), pa.string(), mask=~finite), "its bounds make it")
    reasons = np.full(len(ids), "kept", object)
    reasons[tokens > audit.config.pack.max_tokens] = "too_long_for_pack"
    reasons[values > high] = "above_max_delta_ifd"
    reasons[values < low] = "below_min_delta_ifd"
    reasons[~finite] = "non_finite_delta_ifd"
    reasons[np.asarray(scored.column("delta_ifd").is_null())] = "not_scorable"
    equal("reason", pa.array(reasons, pa.string()), "its score, its length and the bounds make it")
    equal("keep", pa.array(reasons == "kept"), "its reason makes it")
