"""Drawings of an RL run: held-out answers before and after, and the training step by step."""

from dataclasses import dataclass

import numpy as np

from tasks.comparison.intervals import Interval
from tasks.report.drawing import LEFT, RIGHT, WIDTH, Axes, Figure, Scale, around, drawing
from tasks.report.evaluation import Metric, change_text, kind_of
from tasks.report.histograms import Values
from tasks.report.outcome_plots import bars
from tasks.report.rl_findings import Answers
from tasks.report.text import number_text
from tasks.report.training_plots import TABLE_ROWS

START, TRAINED = "start", "rl"
_PLACES = {START: (0, "before"), TRAINED: (1, "after")}
"""Where a model stands along the axis, and its name there."""

_SMOOTHED = 12
"""Points of a curve, from twice as many, of which a running mean is drawn."""


def before_after_figure(name: str, metrics: list[Metric], change: Interval | None = None) -> Figure:
    """Return a held-out metric before and after.

    Args:
        name: The metric.
        metrics: All metrics of the run.
        change: Its change, prompt by prompt, where that is known.
    """
    kind, own = kind_of(name), [metric for metric in metrics if metric.name == name]
    ends = np.array([end for metric in own for end in metric.interval])
    axes = Axes.of((-0.5, 1.5), around(ends, margin=0.12), "", kind.unit)
    places = [(*_PLACES[metric.model], metric) for metric in own]
    line = axes.line(np.array([float(x) for x, _, _ in places]), np.array([m.value for m in own]), "line-student")
    points = [
        axes.point(x, metric.value, *metric.interval, "student", f"{label}: {number_text(metric.value)}")
        for x, label, metric in places
    ]
    frame = axes.frame([(float(x), label) for x, label, _ in places])
    return Figure(
        key=f"metric-{name.replace('_', '-')}",
        title=kind.title,
        caption=change_text(own, change),
        svg=drawing(kind.title, frame, line, *points),
        legend=[("student", "held-out prompts, with 95 % interval")],
        header=["model", kind.unit, "standard error", "n"],
        rows=[
            [label, number_text(metric.value, 5), number_text(metric.stderr, 2), f"{metric.n:,}"]
            for _, label, metric in places
        ],
    )


def answers_figure(answers: Answers) -> Figure:
    """Return how many held-out prompts became right, became wrong, and stayed what they were."""
    counts = {
        "became right": len(answers.became_right),
        "became wrong": len(answers.became_wrong),
        "stayed right": len(answers.stayed_right),
        "stayed wrong": len(answers.stayed_wrong),
    }
    words = {name: f"{count:,}" for name, count in counts.items()}
    x = Scale(0.0, max(*counts.values(), 1), LEFT + 76, WIDTH - RIGHT - 50)
    title = "Held-out prompts by what became of them"
    return Figure(
        key="answers",
        title=title,
        caption="Right: at least half of its responses have score 1.",
        svg=bars(title, {name: float(count) for name, count in counts.items()}, words, x),
        legend=[],
        header=["prompts", "count"],
        rows=[[name, words[name]] for name in counts],
    )


@dataclass(frozen=True)
class _Curve:
    """A drawing of training: of which column, and in which CSS class."""

    column: str
    title: str
    y_title: str
    caption: str
    class_: str = "line-student"


_CURVES = (
    _Curve("reward", "Reward", "mean over responses", "What is learned from."),
    _Curve("score", "Verified score", "mean over responses", "What the verifiers say, 0 to 1."),
    _Curve("response_tokens", "Response length", "tokens", "Mean over the step's responses."),
    _Curve("truncation_rate", "Responses cut at the limit", "share", "At `grpo.max_new_tokens`.", "line-ce"),
    _Curve(
        "equal_rewards",
        "Prompts without a signal",
        "share",
        "Every response had the same reward: no gradient.",
        "line-ce",
    ),
    _Curve("entropy", "Entropy", "nats per token", "Mean over response tokens.", "line-loss"),
    _Curve("kl", "KL to the start model", "nats per token", "Measured where `grpo.beta` is above 0.", "line-kd"),
    _Curve("clip_ratio", "Clipped ratios", "share of tokens", "Where the policy left `grpo.epsilon`.", "line-kd"),
    _Curve("grad_norm", "Gradient norm", "", "Before clipping.", "line-loss"),
    _Curve("learning_rate", "Learning rate", "", "That each step was taken with.", "line-loss"),
)


def curve_figures(curves: dict[str, Values]) -> list[Figure]:
    """Return a drawing of everything that training measured; see ``RLFindings.curves``."""
    figures = []
    for curve in _CURVES:
        values = curves[curve.column]
        known = np.isfinite(values)
        if curve.column == "score":
            told = not np.array_equal(values, curves["reward"], equal_nan=True)
        else:
            # Nothing can be clipped while each step learns from responses of its own weights.
            told = curve.column != "clip_ratio" or bool(values[known].any())
        if known.any() and told:
            figures.append(_curve_figure(curve, curves["step"][known], values[known]))
    return figures


def _curve_figure(curve: _Curve, steps: Values, values: Values) -> Figure:
    x = (min(float(steps[0]), 1.0) - 1, float(steps[-1]) + 0.5)
    y = around(values, zero=True, margin=0.12) if values.any() else (0.0, 1.0)
    axes = Axes.of(x, y, "optimizer step", curve.y_title)
    smooth = len(steps) >= 2 * _SMOOTHED
    lines = [axes.line(steps, values, f"{curve.class_} pale" if smooth else curve.class_)]
    if smooth:
        lines.append(axes.line(steps, running_mean(values, _SMOOTHED), curve.class_))
    name = curve.column.replace("_", " ")
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), TABLE_ROWS)).round().astype(int))
    return Figure(
        key=f"curve-{curve.column.replace('_', '-')}",
        title=curve.title,
        caption=f"{curve.caption} Bold: running mean of {_SMOOTHED} points." if smooth else curve.caption,
        svg=drawing(curve.title, axes.frame(), *lines),
        legend=[(curve.class_, name)],
        header=["step", name],
        rows=[[f"{steps[place]:,.0f}", number_text(float(values[place]))] for place in chosen],
    )


def running_mean(values: Values, window: int) -> Values:
    """Return the mean of each value and the ``window`` - 1 before it, as many as there are.

    >>> running_mean(np.array([1.0, 3.0, 5.0]), 2).tolist()
    [1.0, 2.0, 4.0]
    """
    sums = np.cumsum(values)
    sums[window:] -= sums[:-window].copy()
    found: Values = sums / np.minimum(np.arange(1, len(values) + 1), window)
    return found
