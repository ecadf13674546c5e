"""Training, evaluation and export against the packs, the schedule and the references they come from."""

import math

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.stage_key import WARMUP, StageKey
from schemas.tables import IGNORE_LABEL
from tasks.audit.epochs import Epochs, epochs_of, pack_costs, pack_key, student_width
from tasks.audit.findings import Audit
from tasks.audit.rollouts import policy_steps, require_models
from tasks.audit.tables import shards
from tasks.graph import MODELS, sampled_round, sampling_policy
from tasks.language_model.ragged import Ragged


def check_training(audit: Audit, key: StageKey) -> None:
    """Check a train stage's steps: one after another, as the schedule fixes them, over the tokens of its packs."""
    assert key.round is not None
    packs = pack_key(audit.config, key.round)
    if not audit.needs(key, key, packs, MODELS):
        return
    previous = StageKey("train", key.round - 1) if key.round > 0 else None
    start, before = 0.0, 0.0
    if previous is not None:
        counted = audit.counter(previous, "policy_step"), audit.counter(previous, "epochs_done")
        if counted[0] is None or counted[1] is None:
            return
        start, before = counted[0], counted[1]
    tokens, seq_lengths = _pack_tokens(audit, packs)
    epochs = epochs_of(audit.config, key.round, len(tokens), int(start), before)
    steps = pa.concat_tables([table for _, _, table in shards(audit, key, _COLUMNS)])
    _check_steps(audit, key, steps, epochs)
    _check_counters(audit, key, steps, epochs)
    costs = np.ones(len(tokens))
    if epochs.settings.packs_per_step > 1:
        width = student_width(audit.store)
        if width is None:
            audit.report.unchecked.append(f"{key.label}: tokens by step, since the student's width is not known")
            return
        costs = pack_costs(seq_lengths, width)
    _check_step_tokens(audit, key, steps, epochs, tokens, costs)


_COLUMNS = ["step", "epoch", "round", "loss", "ce", "learning_rate", "grad_norm", "response_tokens", "policy_lag"]


def _pack_tokens(audit: Audit, key: StageKey) -> tuple[NDArray[np.int64], Ragged]:
    """Return the tokens with loss of every pack, and the lengths of its sequences."""
    counts, lengths = [], []
    for _, _, table in shards(audit, key, ["labels", "seq_lengths"]):
        labels, sequences = Ragged.from_arrow(table.column("labels")), Ragged.from_arrow(table.column("seq_lengths"))
        labelled = labels.values != IGNORE_LABEL
        # Nothing before a sequence may predict its first token.
        labelled[np.cumsum(sequences.values, dtype=np.int64) - sequences.values] = False
        counts.append(np.diff(np.concatenate([[0], np.cumsum(labelled)])[labels.offsets]))
        lengths.append(sequences)
    return np.concatenate(counts), Ragged.concat(lengths)


def _check_steps(audit: Audit, key: StageKey, table: pa.Table, epochs: Epochs) -> None:
    assert key.round is not None
    ids = table.column("step")
    name = next(r.path for r in audit.manifests[key].outputs if r.path.endswith(".parquet"))
    steps = ids.to_numpy()
    expected = epochs.start_step + 1 + np.arange(len(steps))

    def expect(column: str, wanted: NDArray[np.float64] | NDArray[np.int64], why: str) -> bool:
        values = table.column(column).fill_null(-1).to_numpy().astype(np.float64)
        close = np.abs(values - wanted) <= 1e-9 * (1 + np.abs(wanted)) * (1 if column != "learning_rate" else 1e-3)
        return audit.expect_rows(name, 0, ids, column, close, lambda i: f"{values[i]:.9g}, {why} {wanted[i]:.9g}")

    if not expect("step", expected, "steps follow each other:"):
        return
    expect("round", np.full(len(steps), key.round), "should be")
    expect("epoch", epochs.before + (steps - epochs.start_step) / epochs.steps_per_epoch, "the schedule makes it")
    expect("learning_rate", epochs.learning_rates(steps), "the schedule makes it")
    if key.round != WARMUP:
        sampler = sampling_policy(audit.config, sampled_round(audit.config, key.round))
        sampled_at = policy_steps(audit, sampler)
        if sampled_at is not None:
            expect("policy_lag", steps - 1 - sampled_at, "the steps since its sampler's weights are")
    for column in ("loss", "ce", "grad_norm"):
        finite = np.isfinite(table.column(column).to_numpy())
        audit.expect_rows(name, 0, ids, column, finite, lambda i: "is not finite")


def _check_counters(audit: Audit, key: StageKey, steps: pa.Table, epochs: Epochs) -> None:
    last = int(steps.column("step")[-1].as_py()) if steps.num_rows else epochs.start_step
    guard = audit.config.train.guard
    may_end_early = key.round != WARMUP and guard.action == "refresh" and epochs.before + epochs.epochs < epochs.total
    if last > epochs.end_step or (last < epochs.end_step and not may_end_early):
        audit.broken(key.folder, f"ends at optimizer step {last}; the schedule ends the round at {epochs.end_step}")
    audit.expect_counter(key, "start_step", epochs.start_step)
    audit.expect_counter(key, "policy_step", last)
    audit.expect_counter(key, "packs", epochs.packs)
    audit.expect_counter(key, "response_tokens", int(steps.column("response_tokens").to_numpy().sum()))
    done = audit.counter(key, "epochs_done")
    expected = epochs.before + (last - epochs.start_step) / epochs.steps_per_epoch
    if done is not None and not math.isclose(done, expected, abs_tol=1e-9):
        audit.broken(f"{key.folder}/manifest.json", f"counters.epochs_done is {done}, the steps make {expected:.6g}")


def _check_step_tokens(
    audit: Audit,
    key: StageKey,
    steps: pa.Table,
    epochs: Epochs,
    tokens: NDArray[np.int64],
    costs: NDArray[np.float64],
) -> None:
    """Check every step's response tokens against those of the packs that the seed gives it."""
    name = next(r.path for r in audit.manifests[key].outputs if r.path.endswith(".parquet"))
    found, per_epoch = steps.column("response_tokens").to_numpy(), epochs.steps_per_epoch
    bounds = np.minimum(np.arange(per_epoch + 1) * epochs.settings.packs_per_step, epochs.packs)
    wanted = np.empty(0, np.int64)
    for epoch in range(math.ceil(len(found) / per_epoch)):
        in_order = np.cumsum(tokens[epochs.order(epoch, costs)])
        wanted = np.append(wanted, np.diff(np.append(0, in_order)[bounds]))
    audit.expect_rows(
        name,
        0,
        steps.column("step"),
        "response_tokens",
        found == wanted[: len(found)],
        lambda i: f"{found[i]}, the packs of this step have {wanted[i]} tokens with loss",
    )


def check_export(audit: Audit, key: StageKey) -> None:
    """Check that an export is a model, of the steps that its train stage counted."""
    require_models(audit, key)
    steps = policy_steps(audit, key)
    if steps is not None:
        audit.expect_counter(key, "policy_step", steps)
