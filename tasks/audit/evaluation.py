"""Evaluations against the held-out prompts, the references, and the responses that their means are of."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.stage_key import WARMUP, StageKey
from schemas.tables import AGREEMENT_METRICS, METRICS_FILE, RESPONSES_FILE
from tasks.audit.findings import Audit
from tasks.audit.tables import shards
from tasks.graph import BASELINE, PROMPTS, REFERENCE

_ROUNDING = 1e-9


def check_evaluation(audit: Audit, key: StageKey) -> None:
    """Check that an evaluation has its metrics, over the held-out references and the models' own responses."""
    if not audit.needs(key, key, PROMPTS, REFERENCE) or REFERENCE not in audit.rollouts or audit.prompts is None:
        return
    references = audit.rollouts[REFERENCE]
    tokens = int(references.response_tokens[references.held_out].sum())
    ((name, _, table),) = shards(audit, key, ["round", "metric", "value", "n", "stderr", "model"], METRICS_FILE)
    ids, models = table.column("metric"), table.column("model").to_pylist()
    rounds, counts = table.column("round").to_numpy(), table.column("n").to_numpy()
    round_index = WARMUP if key.round is None else key.round
    audit.expect_rows(name, 0, ids, "round", rounds == round_index, lambda i: f"{rounds[i]}, should be {round_index}")
    agreement = np.isin(ids.to_pylist(), AGREEMENT_METRICS)
    audit.expect_rows(
        name,
        0,
        ids,
        "n",
        ~agreement | (counts == tokens),
        lambda i: f"{counts[i]}, the held-out references have {tokens} tokens",
    )
    finite = np.isfinite(table.column("value").to_numpy()) & np.isfinite(table.column("stderr").to_numpy())
    audit.expect_rows(name, 0, ids, "value", finite, lambda i: "is not finite")
    expected: dict[tuple[str, str], tuple[float, int] | None] = {
        (model, metric): None
        for model in (("start",) if key == BASELINE else ("student",))
        for metric in AGREEMENT_METRICS
    }
    if audit.config.evaluate.generate:
        expected |= _response_means(audit, key, round_index)
    check_means(audit, name, table, expected, models)


def check_means(
    audit: Audit[Any],
    name: str,
    table: pa.Table,
    expected: dict[tuple[str, str], tuple[float, int] | None],
    models: list[str],
) -> None:
    """Check the means of a metrics table, ``models`` its model by row, against the ``expected`` by model and metric."""
    ids, values, counts = (table.column(column).to_pylist() for column in ("metric", "value", "n"))
    found = list(zip(models, ids, strict=True))
    wanted = [expected.get(each) for each in found]
    holds = np.array(
        [
            mean is None or (abs(value - mean[0]) <= _ROUNDING * (1 + abs(mean[0])) and count == mean[1])
            for mean, value, count in zip(wanted, values, counts, strict=True)
        ],
        bool,
    )
    audit.expect_rows(
        name,
        0,
        table.column("metric"),
        "value",
        holds,
        lambda i: f"{values[i]:.6g} over {counts[i]}, the {found[i][0]}'s responses make it {wanted[i]}",
    )
    missing = sorted(f"{metric} of the {model}" for model, metric in set(expected) - set(found))
    if missing:
        audit.broken(name, f"lacks {', '.join(missing)}")


def _response_means(audit: Audit, key: StageKey, round_index: int) -> dict[tuple[str, str], tuple[float, int] | None]:
    """Check a stage's responses against the held-out prompts; return what the metrics table should say of them."""
    assert audit.prompts is not None
    columns = [
        "model",
        "round",
        "prompt_id",
        "sample_index",
        "response_tokens",
        "finish_reason",
        "score",
        "repetition",
    ]
    ((name, _, table),) = shards(audit, key, columns, RESPONSES_FILE)
    ids, rounds = table.column("prompt_id"), table.column("round").to_numpy()
    held_out = audit.prompts.in_split(ids, held_out=True)
    audit.expect_rows(name, 0, ids, "prompt_id", held_out, lambda i: "is no held-out prompt of this run")
    audit.expect_rows(name, 0, ids, "round", rounds == round_index, lambda i: f"{rounds[i]}, should be {round_index}")
    models = np.array(table.column("model").to_pylist())
    expected_models = ["teacher", "start"] if key == BASELINE else ["student"]
    samples = audit.config.evaluate.samples_per_prompt
    found: dict[tuple[str, str], tuple[float, int] | None] = {}
    for model in expected_models:
        own = models == model
        _check_complete(audit, name, table.filter(pa.array(own)), model, samples)
        if own.any():
            found |= {(model, metric): mean for metric, mean in response_means(table.filter(pa.array(own))).items()}
    audit.expect_rows(
        name, 0, ids, "model", np.isin(models, expected_models), lambda i: f"{models[i]} is not evaluated by this stage"
    )
    return found


def _check_complete(audit: Audit, name: str, own: pa.Table, model: str, samples: int) -> None:
    """Check that each prompt that a model was asked has all its samples; prompts too long for it may be left out."""
    prompts = len(set(own.column("prompt_id").to_pylist()))
    assert audit.prompts is not None
    held_out = int(audit.prompts.held_out.sum())
    if own.num_rows != prompts * samples:
        audit.broken(name, f"has {own.num_rows} responses of the {model} to {prompts} prompts, {samples} each expected")
    if prompts != held_out and not (0 < prompts < held_out and audit.config.prompts.too_long == "drop"):
        audit.broken(name, f"has responses of the {model} to {prompts} prompts, {held_out} are held out")


def response_means(own: pa.Table) -> dict[str, tuple[float, int]]:
    """Return what one model's responses come to: mean and count by metric."""
    scores = own.column("score").drop_null().to_numpy()
    columns: dict[str, NDArray[np.float64]] = {
        "response_tokens": own.column("response_tokens").to_numpy().astype(np.float64),
        "truncation_rate": np.array([reason == "length" for reason in own.column("finish_reason").to_pylist()], float),
        "repetition": own.column("repetition").to_numpy(),
    }
    if scores.size:
        columns["accuracy"] = (scores >= 1.0).astype(np.float64)
    return {metric: (float(values.mean()), values.size) for metric, values in columns.items()}
