"""Drawings of what came out and what it cost: held-out metrics round by round, and time by stage."""

import numpy as np
from markupsafe import Markup

from schemas.config import RunConfig
from schemas.stage_key import WARMUP
from tasks.comparison.intervals import Interval
from tasks.report.drawing import LEFT, RIGHT, TOP, WIDTH, Axes, Figure, Scale, around, drawing, element, text, tip
from tasks.report.evaluation import START, STUDENT, TEACHER, Metric, change_text, kind_of
from tasks.report.findings import start_name
from tasks.report.stages import StageCost, mean_rate
from tasks.report.text import bytes_text, count_text, duration_text, number_text, round_name

_NAMED_ROUNDS = 6
"""Rounds named along an axis at most."""


def metric_figure(name: str, metrics: list[Metric], config: RunConfig, change: Interval | None = None) -> Figure:
    """Return a metric of the student from where the rounds start to the last, beside the teacher's and the start's.

    Args:
        name: The metric.
        metrics: All metrics of the run.
        config: The run's config.
        change: Its change over the rounds, prompt by prompt, where that is known.
    """
    kind = kind_of(name)
    own = [metric for metric in metrics if metric.name == name]
    student = [metric for metric in own if metric.model == STUDENT]
    others = [metric for metric in own if metric.model in (TEACHER, START)]
    values = np.array([end for metric in own for end in metric.interval])
    if kind.of_teacher is not None:
        values = np.append(values, kind.of_teacher)
    rounds = [metric.round for metric in student] or [WARMUP]
    low, high = around(values, margin=0.12)
    axes = Axes.of((min(rounds) - 0.35, max(rounds) + 0.35), (low, high), "after", kind.unit)
    step = max(1, -(-len(rounds) // _NAMED_ROUNDS))
    ticks = [(float(index), student_name(index, config)) for index in rounds[::step]]
    levels = [
        (metric.value, "teacher" if metric.model == TEACHER else "start", other_name(metric.model)) for metric in others
    ]
    if kind.of_teacher is not None and not any(metric.model == TEACHER for metric in others):
        levels.append((kind.of_teacher, "teacher", "teacher"))
    xs = np.array([metric.round for metric in student], np.float64)
    line = axes.line(xs, np.array([metric.value for metric in student]), "line-student")
    points = [
        axes.point(
            metric.round,
            metric.value,
            *metric.interval,
            "student",
            f"{student_name(metric.round, config)}: {number_text(metric.value)} ± {number_text(metric.stderr, 2)}",
        )
        for metric in student
    ]
    legend = [("student", "student, with 95 % interval"), ("teacher", "teacher")]
    if any(metric.model == START for metric in others):
        legend.append(("start", "student before all training"))
    rows = [
        [
            student_name(metric.round, config) if metric.model == STUDENT else other_name(metric.model),
            number_text(metric.value, 5),
            number_text(metric.stderr, 2),
            f"{metric.n:,}",
        ]
        for metric in [*student, *others]
    ]
    return Figure(
        key=f"metric-{''.join(c if c.isascii() and c.isalnum() else '-' for c in name)}",
        title=kind.title,
        caption=change_text(student, change, " over the rounds"),
        svg=drawing(kind.title, axes.frame(ticks), axes.levels(levels), line, *points),
        legend=legend,
        header=["model", kind.unit, "standard error", "n"],
        rows=rows,
    )


def student_name(index: int, config: RunConfig) -> str:
    """Return what the student after a round is called."""
    return start_name(config) if index == WARMUP else round_name(index)


def other_name(model: str) -> str:
    """Return what a model that is no round's student is called."""
    return {TEACHER: "teacher", START: "untouched student"}.get(model, model)


def time_figure(stages: list[StageCost]) -> Figure:
    """Return seconds by kind of stage over the whole run; its table has every stage."""
    names = stage_names(stages)
    totals = {name: sum(stage.seconds for stage in stages if stage.key.stage == name) for name in names}
    x = Scale(0.0, max([*totals.values(), 1e-9]), LEFT + 24, WIDTH - RIGHT - 70)
    words = {name: duration_text(seconds) for name, seconds in totals.items()}
    title = "Time by stage"
    return Figure(
        key="time",
        title=title,
        caption=f"{duration_text(sum(totals.values()))} of work; stages that ran side by side count each.",
        svg=bars(title, totals, words, x),
        legend=[],
        header=["stage", "time", "tokens", "tokens/s", "written", "rows", "peak memory"],
        rows=[
            [
                stage.key.label,
                duration_text(stage.seconds),
                "" if stage.tokens is None else f"{stage.tokens:,}",
                "" if stage.tokens_per_second is None else f"{stage.tokens_per_second:,.0f}",
                bytes_text(stage.bytes),
                f"{stage.rows:,}" if stage.rows else "",
                "" if stage.peak_memory is None else bytes_text(stage.peak_memory),
            ]
            for stage in stages
            if stage.finished
        ],
    )


def stage_names(stages: list[StageCost]) -> list[str]:
    """Return the kinds of stages that have finished, in the order of a round."""
    finished = [stage.key for stage in stages if stage.finished]
    # The warm-up has the last stages of a round only.
    return list(dict.fromkeys(key.stage for key in sorted(finished, key=lambda key: key.round == WARMUP)))


def rate_figures(stages: list[StageCost]) -> list[Figure]:
    """Return tokens a second, and bytes written, by kind of stage."""
    finished = [stage for stage in stages if stage.finished]
    names = stage_names(stages)
    rates, sizes = {}, {}
    for name in names:
        own = [stage for stage in finished if stage.key.stage == name]
        rate = mean_rate(own)
        if rate is not None:
            rates[name] = rate
        sizes[name] = float(sum(stage.bytes for stage in own))
    rated = {name: f"{count_text(value)}/s" for name, value in rates.items()}
    sized = {name: bytes_text(int(value)) for name, value in sizes.items()}
    figures = []
    if rates:
        figures.append(_log_bars("rates", "Tokens per second by stage", "Means over the run.", rates, rated))
    figures.append(_log_bars("bytes", "Bytes written by stage", "On disk, compressed.", sizes, sized))
    return figures


def _log_bars(key: str, title: str, caption: str, values: dict[str, float], words: dict[str, str]) -> Figure:
    """Return one bar for each name, by logarithm: stages differ by orders of magnitude."""
    positive = [value for value in values.values() if value > 0] or [1.0]
    x = Scale(min(positive) / 3, max(positive) * 1.001, LEFT + 24, WIDTH - RIGHT - 70, log=True)
    svg = bars(title, values, words, x, "muted")
    rows = [[name, words[name]] for name in values]
    return Figure(key, title, f"{caption} Bars by logarithm.", svg, [], ["stage", title], rows)


def bars(title: str, values: dict[str, float], words: dict[str, str], x: Scale, class_: str = "student") -> Markup:
    """Return a drawing of one bar for each name, with its name before it and its words behind it."""
    parts: list[Markup] = []
    for row, (name, value) in enumerate(values.items()):
        top = float(TOP + 25 * row)
        width = max(x(value) - x.start, 1.0)
        parts += [
            text(x.start - 8, top + 13, name, "end", "tick"),
            element("rect", tip(f"{name}: {words[name]}"), x=x.start, y=top, width=width, height=18.0, class_=class_),
            text(x.start + width + 6, top + 13, words[name], "start", "label"),
        ]
    return drawing(title, *parts, height=TOP + 25.0 * len(values) + 4)
