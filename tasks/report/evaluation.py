"""Held-out metrics of the student after each round, of the teacher, and of the student before all training."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import EVALUATE_METRICS, METRICS_FILE
from tasks.comparison.intervals import Interval, crossed_interval
from tasks.comparison.outcome import read_scores
from tasks.evaluate.resolution import TARGET
from tasks.graph import BASELINE
from tasks.report.text import number_text

STUDENT, TEACHER, START = "student", "teacher", "start"


STANDARD_ERRORS = 1.96
"""On either side of a mean: its 95 % interval."""


@dataclass(frozen=True)
class MetricKind:
    """How a metric is shown: its title, the axis's words, and whether the teacher's value is 0 or 1 by definition."""

    title: str
    unit: str
    of_teacher: float | None = None


KINDS = {
    "kl_teacher_student": MetricKind("KL(teacher‖student)", "nats per token", 0.0),
    "accuracy": MetricKind("Verified accuracy", "share of answers"),
    "top1_agreement": MetricKind("Top-1 agreement", "share of tokens", 1.0),
    "kl_student_teacher": MetricKind("KL(student‖teacher)", "nats per token", 0.0),
    "response_tokens": MetricKind("Response length", "tokens"),
    "truncation_rate": MetricKind("Responses cut at the limit", "share of responses"),
    "repetition": MetricKind("Repetition", "share"),
}
"""Metrics in the order to show them; others follow by name."""


@dataclass(frozen=True)
class Metric:
    """A mean over held-out prompts.

    Args:
        name: Which metric.
        model: `student` after ``round``, `teacher`, or `start`: the student before all training.
        round: The round, WARMUP for what the rounds start from.
        value: The mean.
        stderr: Its standard error.
        n: Observations.
    """

    name: str
    model: str
    round: int
    value: float
    stderr: float
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of its 95 % interval."""
        return self.value - STANDARD_ERRORS * self.stderr, self.value + STANDARD_ERRORS * self.stderr


def read_metrics(store: RunStore, done: Iterable[StageKey]) -> list[Metric]:
    """Return every metric of the evaluations among the finished stages ``done``, in their order.

    Raises:
        ArtifactError: a table is damaged.
    """
    found: list[Metric] = []
    for key in done:
        if key.stage in ("evaluate", BASELINE.stage):
            found += metrics_of(store.read_part(store.path(key, METRICS_FILE), EVALUATE_METRICS))
    return found


def metrics_of(table: pa.Table) -> list[Metric]:
    """Return a metrics table's rows with finite values."""
    return [
        Metric(row["metric"], row["model"], row["round"], row["value"], row["stderr"], row["n"])
        for row in table.to_pylist()
        if math.isfinite(row["value"])
    ]


def shown_names(metrics: list[Metric]) -> list[str]:
    """Return the metrics to draw: those of KINDS, then others by name."""
    found = {metric.name for metric in metrics}
    return [name for name in KINDS if name in found] + sorted(found - set(KINDS))


def kind_of(name: str) -> MetricKind:
    """Return how a metric is shown."""
    return KINDS.get(name, MetricKind(name, "mean"))


def paired_change(store: RunStore, before: tuple[StageKey, str], after: tuple[StageKey, str]) -> Interval | None:
    """Return the change of accuracy between two evaluations, prompt by prompt; None where they share no checked prompt.

    Args:
        store: The run.
        before: The stage that evaluated the model before, and the model's name there.
        after: The same of the model after.

    Raises:
        ArtifactError: a table is damaged.
    """
    first, last = (read_scores(store, *each) for each in (before, after))
    shared = frozenset(first.prompt_ids) & frozenset(last.prompt_ids)
    if not shared:
        return None
    found = crossed_interval((last.of(shared).values - first.of(shared).values)[None])
    return found if math.isfinite(found.low) else None


def change_text(values: Sequence[Metric], paired: Interval | None = None, span: str = "") -> str:
    """Return how a metric changed from first to last, and whether that can be told from noise, in words.

    Args:
        values: The metric, in the order of time.
        paired: The change prompt by prompt, where it is known: what both models find hard is then no noise.
        span: What the change is over.
    """
    if len(values) < 2:
        return "Held-out prompts only."
    first, last = values[0], values[-1]
    change = last.value - first.value
    least, how = told_apart(first, last), "unpaired"
    if paired is not None:
        # The longer side: the other may be cut short, since no share changes by more than 1.
        least, how = max(paired.high - paired.mean, paired.mean - paired.low), "prompt by prompt"
    if least == 0:
        # As of benchmarks without a standard error: 0 stands for none.
        return f"No change{span}." if change == 0 else f"Change{span} {change:+.4f}; how much is noise is not known."
    verdict = "beyond" if abs(change) > least else "within"
    amount = f"{100 * least:.1f} points" if first.name == "accuracy" else number_text(least, 2)
    said = f"Differences below {amount} cannot be told from noise here ({how}, at 95 %)"
    if first.name == "accuracy" and least > TARGET:
        said += f"; {100 * TARGET:.0f} points cannot: more held-out prompts would tell"
    return f"Change{span} {change:+.4f}: {verdict} noise. {said}."


def told_apart(first: Metric, last: Metric) -> float:
    """Return the smallest difference of two means that is beyond noise: at 95 %, taken unpaired."""
    return STANDARD_ERRORS * math.hypot(first.stderr, last.stderr)
