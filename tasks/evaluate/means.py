"""Means over observations that come in groups, with the standard error that the groups give them."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.tables import EVALUATE_METRICS

NGRAM = 4
"""Tokens in a row that count as one repetition."""


@dataclass(frozen=True)
class Mean:
    """A mean over observations with the standard error that prompts give it.

    Args:
        value: Mean, every observation with the same weight; NaN of none.
        stderr: Standard error, prompts as the independent units.
        n: Observations in the mean.
    """

    value: float
    stderr: float
    n: int


def grouped_mean(values: NDArray[np.float64], offsets: NDArray[np.int64]) -> Mean:
    """Return the mean of flat ``values`` [observations] in groups given by ``offsets`` [groups + 1].

    The standard error is that of a ratio estimator over groups (Cochran 1977, 6.4), since tokens of one response, or
    responses to one prompt, are not independent; NaN-free: 0 for fewer than two groups. With groups of one size it is
    the standard error of the groups' means.
    """
    lengths = np.diff(offsets)
    filled = lengths > 0
    sums = np.add.reduceat(values, offsets[:-1][filled]) if filled.any() else np.empty(0)
    counts = lengths[filled].astype(np.float64)
    if not len(sums):
        return Mean(float("nan"), 0.0, 0)
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Mean(mean, 0.0, int(counts.sum()))
    residuals = sums - mean * counts
    groups = len(sums)
    stderr = float(np.sqrt((residuals**2).sum() * groups / (groups - 1)) / counts.sum())
    return Mean(mean, stderr, int(counts.sum()))


def response_means(responses: pa.Table) -> dict[str, Mean]:
    """Return the metrics of one model's own responses.

    `accuracy`: share of the responses that can be checked whose score is 1; absent if none can be. `response_tokens`:
    mean length. `truncation_rate`: share that reached the longest length. `repetition`: mean of the column.

    Args:
        responses: Rows of table EVALUATE_RESPONSES, those of one prompt next to each other, of one model.
    """
    prompts = responses.column("prompt_id").to_numpy(zero_copy_only=False)
    scores = responses.column("score").to_numpy(zero_copy_only=False).astype(np.float64)
    values = {
        "accuracy": np.where(np.isnan(scores), np.nan, scores >= 1.0),
        "response_tokens": responses.column("response_tokens").to_numpy().astype(np.float64),
        "truncation_rate": (responses.column("finish_reason").to_numpy(zero_copy_only=False) == "length").astype(float),
        "repetition": responses.column("repetition").to_numpy(),
    }
    means = {}
    for name, column in values.items():
        known = ~np.isnan(column)
        if known.any():
            means[name] = grouped_mean(column[known], _group_offsets(prompts[known]))
    return means


def right_shares(responses: pa.Table) -> pa.Table:
    """Return the share of right responses to each prompt, columns `prompt_id` and `share`, in no order.

    As metric `accuracy` counts: verifiers that give a part of a score for a try find it no less wrong.

    Args:
        responses: Columns `prompt_id` and `score` of table EVALUATE_RESPONSES; rows that were not checked are left out.
    """
    checked = responses.filter(pc.is_valid(responses.column("score")))
    right = pc.cast(pc.greater_equal(checked.column("score"), 1.0), pa.float64())
    shares = checked.append_column("right", right).group_by("prompt_id").aggregate([("right", "mean")])
    return shares.rename_columns({"right_mean": "share"})


def metrics_table(metrics: dict[str, dict[str, Mean]], round_index: int) -> pa.Table:
    """Return the evaluate metrics table of these models' metrics; ``n`` counts response tokens, or responses."""
    rows = [(model, name, mean) for model, means in metrics.items() for name, mean in means.items()]
    return pa.table(
        {
            "round": [round_index] * len(rows),
            "metric": [name for _, name, _ in rows],
            "value": [mean.value for _, _, mean in rows],
            "n": [mean.n for _, _, mean in rows],
            "stderr": [mean.stderr for _, _, mean in rows],
            "model": [model for model, _, _ in rows],
        },
        schema=EVALUATE_METRICS.columns,
    )


def _group_offsets(names: NDArray[np.object_]) -> NDArray[np.int64]:
    starts = np.flatnonzero(np.concatenate([[True], names[1:] != names[:-1]]))
    return np.append(starts, len(names)).astype(np.int64)


def repetition(response: NDArray[np.int32]) -> float:
    """Return the share of a response's token 4-grams that stood there before: 1 − distinct / all; 0 without any.

    >>> repetition(np.array([7, 7, 7, 7, 7, 7], np.int32)), repetition(np.array([1, 2, 3], np.int32))
    (0.6666666666666667, 0.0)
    """
    if len(response) < NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(response, NGRAM)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)
