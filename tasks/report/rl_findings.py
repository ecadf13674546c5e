"""What the report draws of an RL run, read from its finished stages."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.config import RLConfig
from schemas.errors import ArtifactError
from schemas.manifest import RunRecord
from schemas.rl_tables import RL_METRICS, RL_ROLLOUTS
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import EVALUATE_RESPONSES, METRICS_FILE, RESPONSES_FILE
from tasks.comparison.intervals import Interval
from tasks.evaluate.means import right_shares
from tasks.report.evaluation import Metric, paired_change, read_metrics
from tasks.report.findings import spread
from tasks.report.histograms import Values
from tasks.report.samples import read_prompts, shortened
from tasks.report.stages import StageCost, costs
from tasks.report.training import thinned
from tasks.rl.graph import BASELINE, EVALUATE, RL, RL_LOOP
from tasks.stage import standing

SHOWN_ANSWERS = 3
"""Held-out prompts shown of those that became right, and of those that became wrong."""

SHOWN_PROMPTS = 2
"""Train prompts shown of the first step, and of the last."""

CURVE_POINTS = 12
"""Rows of the reward curve at most; each is a mean over as many steps as the others."""

RIGHT = 0.5
"""Share of a prompt's responses with score 1, as metric `accuracy` counts, from which the prompt counts as right."""


@dataclass(frozen=True)
class ShownResponse:
    """A response to read.

    Args:
        title: Whose it is, or of which step.
        text: Its text, a long one cut.
        tokens: How many it has.
        cut: Whether it reached the length limit.
        score: The verifier's, 0 to 1; None: nothing to check against.
        reward: What GRPO learned from; None: it did not.
    """

    title: str
    text: str
    tokens: int
    cut: bool
    score: float | None
    reward: float | None = None


@dataclass(frozen=True)
class ShownPrompt:
    """A prompt with two responses to compare.

    Args:
        prompt_id: Its id.
        kind: What the responses are an example of.
        prompt: Role and content of each message, long ones cut.
        responses: The responses; one where both would be the same.
    """

    prompt_id: str
    kind: str
    prompt: list[tuple[str, str]]
    responses: list[ShownResponse]


@dataclass(frozen=True)
class Answers:
    """How held-out prompts were answered before and after: ids of those of each kind."""

    became_right: pa.Array
    became_wrong: pa.Array
    stayed_right: pa.Array
    stayed_wrong: pa.Array


@dataclass(frozen=True)
class CurvePoint:
    """Means over the steps from ``first`` to ``last``; None where no response was sampled in them."""

    first: int
    last: int
    score: float | None
    reward: float | None
    response_tokens: float | None
    entropy: float | None


@dataclass(frozen=True)
class RLFindings:
    """An RL run as far as it has come.

    Args:
        record: The run's record.
        config: The config it last ran with.
        metrics: Held-out means of `start` and `rl`, those of its stages that have finished.
        accuracy_change: Prompt by prompt; None: one of the two is still to come.
        answers: How the held-out prompts were answered before and after; None: one of the two is still to come.
        curves: By column of the metrics table, float64 [points], means over the steps of a point; `step` is its last.
            None: not trained yet.
        shown: Prompts to read.
        stages: Every stage, finished or not.
    """

    record: RunRecord
    config: RLConfig
    metrics: list[Metric]
    accuracy_change: Interval | None
    answers: Answers | None
    curves: dict[str, Values] | None
    shown: list[ShownPrompt]
    stages: list[StageCost]


def read_rl_findings(store: RunStore, config: RLConfig) -> RLFindings:
    """Read what stands of an RL run (``standing``).

    Raises:
        ArtifactError: there is no run, or a manifest or table is damaged.
    """
    record = store.record()
    if record is None:
        raise ArtifactError(f"{store.url}: no run.json; start a run with `npd rl CONFIG`")
    done = standing(store, config)
    answered = BASELINE in done and EVALUATE in done
    answers = read_answers(store) if answered else None
    shown = [] if answers is None else _changed(store, answers)
    return RLFindings(
        record=record,
        config=config,
        metrics=read_metrics(store, done),
        accuracy_change=paired_change(store, (BASELINE, "start"), (EVALUATE, "rl")) if answered else None,
        answers=answers,
        curves=_curves(store) if RL in done else None,
        shown=shown + (_learned_from(store) if RL in done else []),
        stages=costs(RL_LOOP, done),
    )


def _curves(store: RunStore) -> dict[str, Values]:
    table = store.read_part(store.path(RL, METRICS_FILE), RL_METRICS)
    means = [name for name in table.column_names if name not in ("step", "learning_rate")]
    return thinned(table, means, np.ones(table.num_rows))


def read_curve(store: RunStore) -> list[CurvePoint]:
    """Return what training came to, in CURVE_POINTS points at most; stage `rl` has finished.

    Raises:
        ArtifactError: the metrics table is damaged.
    """
    table = store.read_part(store.path(RL, METRICS_FILE), RL_METRICS)
    columns = {
        name: table.column(name).to_numpy(zero_copy_only=False).astype(float)
        for name in ("score", "reward", "response_tokens", "entropy")
    }
    parts = np.array_split(np.arange(table.num_rows), min(CURVE_POINTS, table.num_rows))
    steps = table.column("step").to_numpy()

    def mean(name: str, part: Any) -> float | None:
        values = columns[name][part]
        return None if np.isnan(values).all() else float(np.nanmean(values))

    return [
        CurvePoint(int(steps[part[0]]), int(steps[part[-1]]), **{name: mean(name, part) for name in columns})
        for part in parts
    ]


def read_answers(store: RunStore) -> Answers:
    """Compare what stages baseline and evaluate say of each held-out prompt.

    Raises:
        ArtifactError: a table is damaged.
    """
    before, after = _right(store, BASELINE), _right(store, EVALUATE)
    both = before.join(after, "prompt_id", right_suffix="_after", join_type="inner").sort_by("prompt_id")
    ids, was, now = both.column("prompt_id").combine_chunks(), both.column("right"), both.column("right_after")

    def of(chosen: pa.ChunkedArray) -> pa.Array:
        return ids.filter(chosen.combine_chunks())

    return Answers(
        became_right=of(pc.and_not(now, was)),
        became_wrong=of(pc.and_not(was, now)),
        stayed_right=of(pc.and_(was, now)),
        stayed_wrong=of(pc.and_not(pc.invert(was), now)),
    )


def _right(store: RunStore, key: StageKey) -> pa.Table:
    """Return each prompt that was checked and whether at least a share RIGHT of its responses is right."""
    table = store.read_part(store.path(key, RESPONSES_FILE), EVALUATE_RESPONSES, ["prompt_id", "score"])
    shares = right_shares(table)
    return pa.table({"prompt_id": shares.column("prompt_id"), "right": pc.greater_equal(shares.column("share"), RIGHT)})


def _changed(store: RunStore, answers: Answers) -> list[ShownPrompt]:
    """Return held-out prompts whose answer became right or wrong, with both models' first response."""
    kinds = [("became right", answers.became_right), ("became wrong", answers.became_wrong)]
    chosen = {ids[place].as_py(): kind for kind, ids in kinds for place in spread(range(len(ids)), SHOWN_ANSWERS)}
    if not chosen:
        return []
    wanted = pa.array(chosen, pa.string())
    prompts = read_prompts(store, wanted)
    responses: dict[str, list[ShownResponse]] = {name: [] for name in chosen}
    for key, title in ((BASELINE, "before"), (EVALUATE, "after")):
        table = store.read_part(store.path(key, RESPONSES_FILE), EVALUATE_RESPONSES)
        first = pc.and_(pc.equal(table.column("sample_index"), 0), pc.is_in(table.column("prompt_id"), wanted))
        for row in table.filter(first).to_pylist():
            responses[row["prompt_id"]].append(_response(title, row))
    return [ShownPrompt(name, kind, prompts.get(name, []), responses[name]) for name, kind in chosen.items()]


def _learned_from(store: RunStore) -> list[ShownPrompt]:
    """Return prompts of the first step and of the last that sampled, each with its best and worst response."""
    paths = sorted(path for path in store.table_files(RL) if path.parent.name == "rollouts")
    shown: dict[int, list[ShownPrompt]] = {}
    for path, of_step in ((paths[0], pc.min), (paths[-1], pc.max)):
        table = store.read_part(path, RL_ROLLOUTS)
        step = of_step(table.column("step"))
        rows = table.filter(pc.equal(table.column("step"), step)).to_pylist()
        chosen = spread(list(dict.fromkeys(row["prompt_id"] for row in rows)), SHOWN_PROMPTS)
        prompts = read_prompts(store, pa.array(chosen, pa.string()))
        shown[step.as_py()] = [
            ShownPrompt(name, f"step {step.as_py():,}", prompts.get(name, []), _extremes(rows, name)) for name in chosen
        ]
    return [prompt for of_step in shown.values() for prompt in of_step]


def _extremes(rows: list[dict[str, Any]], name: str) -> list[ShownResponse]:
    """Return the responses to a prompt with the highest and the lowest reward; one if all rewards are alike."""
    group = sorted((row for row in rows if row["prompt_id"] == name), key=lambda row: -row["reward"])
    if group[0]["reward"] == group[-1]["reward"]:
        return [_response("all rewards alike", group[0])]
    return [_response("highest reward", group[0]), _response("lowest reward", group[-1])]


def _response(title: str, row: dict[str, Any]) -> ShownResponse:
    return ShownResponse(
        title=title,
        text=shortened(row["response"]),
        tokens=row["response_tokens"],
        cut=row["finish_reason"] == "length",
        score=row["score"],
        reward=row.get("reward"),
    )
