"""Drawings of packs and training: fill, loss parts, learning rate, policy KL against its budget."""

from dataclasses import replace

import numpy as np
from markupsafe import Markup

from schemas.stage_key import WARMUP
from tasks.report.drawing import (
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axes,
    Figure,
    Scale,
    around,
    drawing,
    element,
    share_ticks,
    text,
    tip,
)
from tasks.report.histograms import Values
from tasks.report.text import number_text, percent_text, round_name
from tasks.report.training import FULL, Curves, PackFill

TABLE_ROWS = 40
"""Rows of a curve's table of numbers at most."""


def fill_figure(packs: list[PackFill]) -> Figure:
    """Return how full the packs of each round are: the mean as a bar, the emptiest pack as a stroke."""
    row_height, x = 34, Scale(0.0, 1.0, LEFT + 14, WIDTH - RIGHT - 44)
    parts = []
    for row, fill in enumerate(packs):
        top = float(TOP + row_height * row)
        words = f"{fill.packs:,} packs, {fill.sequences:,} sequences; the emptiest is {percent_text(fill.least)} full"
        parts += [
            text(x.start - 8, top + 15, round_name(fill.round), "end", "tick"),
            element("rect", x=x.start, y=top, width=x.end - x.start, height=22.0, class_="trough"),
            element("rect", tip(words), x=x.start, y=top, width=x(fill.fill) - x.start, height=22.0, class_="student"),
            element("line", tip(words), x1=x(fill.least), x2=x(fill.least), y1=top, y2=top + 22, class_="least"),
            text(x.end + 6, top + 15, percent_text(fill.fill), "start", "label"),
        ]
    base = TOP + row_height * len(packs)
    parts += share_ticks(x, base + 12.0)
    title = "Pack fill"
    return Figure(
        key="pack-fill",
        title=title,
        caption="Share of all places in the packs that hold a token; the stroke is the emptiest pack.",
        svg=drawing(title, *parts, height=base + 22.0),
        legend=[("student", "filled"), ("least", "emptiest pack")],
        header=[
            "round",
            "packs",
            "sequences",
            "tokens",
            "places a pack",
            "fill",
            "emptiest",
            f"packs at {percent_text(FULL)} and above",
        ],
        rows=[
            [
                round_name(fill.round),
                f"{fill.packs:,}",
                f"{fill.sequences:,}",
                f"{fill.tokens:,}",
                f"{fill.capacity:,}",
                percent_text(fill.fill),
                percent_text(fill.least),
                f"{fill.full:,}",
            ]
            for fill in packs
        ],
    )


def training_figures(curves: list[Curves], budget: float | None) -> list[Figure]:
    """Return loss parts, policy KL if it was measured and learning rate of the rounds, and the warm-up's loss.

    Args:
        curves: Of the warm-up and the rounds, in order.
        budget: Largest policy KL that the config allows, nats per token; None: no guard.
    """
    warmup = [curve for curve in curves if curve.round == WARMUP]
    rounds = [curve for curve in curves if curve.round != WARMUP]
    figures = []
    if rounds:
        # What the student did not sample has no policy to stay near.
        measured = any(curve.most_policy_kl is not None for curve in rounds)
        figures += [_loss(rounds), *([_policy_kl(rounds, budget)] if measured else []), _learning_rate(rounds)]
    if warmup:
        figures.append(_warmup_loss(warmup))
    return figures


def _joined(curves: list[Curves], name: str) -> Values:
    """Return a column over all rounds, a missing value between them so that no line joins two rounds."""
    pieces = [piece for curve in curves for piece in (curve.values[name], np.array([np.nan]))]
    return np.concatenate(pieces[:-1])


def _measured(curve: Curves, name: str) -> Curves:
    """Return a curve's points at which ``name`` was measured: not every step need have it."""
    known = np.isfinite(curve.values[name])
    return replace(curve, values={column: values[known] for column, values in curve.values.items()})


def _axes(curves: list[Curves], low: float, high: float, y_title: str) -> Axes:
    steps = _joined(curves, "step")
    return Axes.of(
        (min(float(steps[0]), 1.0) - 1, float(np.nanmax(steps)) + 0.5), (low, high), "optimizer step", y_title
    )


def _borders(axes: Axes, curves: list[Curves]) -> Markup:
    """Return a line where each round ends, and its name."""
    parts, begin = [], axes.x.low
    for curve in curves:
        if axes.x(curve.last_step) - axes.x(begin) > 48:
            middle = (axes.x(begin) + axes.x(curve.last_step)) / 2
            parts.append(text(middle, axes.y.end + 8, round_name(curve.round), "middle", "note"))
        if curve is not curves[-1]:
            parts.append(axes.upright(curve.last_step + 0.5, "border"))
        begin = curve.last_step
    return Markup("").join(parts)


def _lines(curves: list[Curves], columns: dict[str, str], y_title: str, *, zero: bool = False) -> Markup:
    """Return axes and one line for each column, which ``columns`` gives its CSS class."""
    low, high = around(np.concatenate([_joined(curves, name) for name in columns]), zero=zero, margin=0.12)
    axes = _axes(curves, low, high, y_title)
    steps = _joined(curves, "step")
    drawn = [axes.line(steps, _joined(curves, name), class_) for name, class_ in columns.items()]
    return Markup("").join([axes.frame(), _borders(axes, curves), *drawn])


def _loss(curves: list[Curves]) -> Figure:
    title = "Loss and its parts"
    columns = {"ce": "line-ce", "kd": "line-kd", "loss": "line-loss"}
    drawn = _lines(curves, columns, "nats per response token", zero=True)
    legend = [("line-loss", "loss"), ("line-ce", "CE, hard labels"), ("line-kd", "KD, top-k KL")]
    return _figure("loss", title, "The loss is (1 − λ) · CE + λ · KD.", drawn, legend, curves, ["loss", "ce", "kd"])


def _policy_kl(curves: list[Curves], budget: float | None) -> Figure:
    title = "Policy KL: how far the student is from its sampler"
    values = np.append(_joined(curves, "policy_kl"), [] if budget is None else [budget])
    axes = _axes(curves, *around(values, zero=True, margin=0.12), "nats per token")
    measured = [_measured(curve, "policy_kl") for curve in curves]
    line = axes.line(_joined(measured, "step"), _joined(measured, "policy_kl"), "line-kd")
    level = (
        Markup("")
        if budget is None
        else axes.across(budget, "budget", f"budget {number_text(budget, 2)}", above=False, anchor="start")
    )
    drawn = Markup("").join([axes.frame(), _borders(axes, curves), line, level])
    most = [curve.most_policy_kl for curve in curves if curve.most_policy_kl is not None]
    said = f" Largest: {number_text(max(most), 3)}." if most else ""
    legend = [("line-kd", "policy KL")] + ([] if budget is None else [("budget", "budget")])
    caption = f"D_KL(current student ‖ the policy that sampled), at some of the samples it trains on.{said}"
    return _figure("policy-kl", title, caption, drawn, legend, measured, ["policy_kl"])


def _learning_rate(curves: list[Curves]) -> Figure:
    title = "Learning rate"
    drawn = _lines(curves, {"learning_rate": "line-loss"}, "", zero=True)
    caption = "One schedule over all rounds."
    return _figure("learning-rate", title, caption, drawn, [("line-loss", "learning rate")], curves, ["learning_rate"])


def _warmup_loss(curves: list[Curves]) -> Figure:
    title = "Warm-up loss"
    drawn = _lines(curves, {"loss": "line-loss"}, "nats per response token")
    caption = "SFT before the first round."
    columns = ["loss", "learning_rate"]
    return _figure("warmup-loss", title, caption, drawn, [("line-loss", "loss")], curves, columns)


def _figure(
    key: str,
    title: str,
    caption: str,
    drawn: Markup,
    legend: list[tuple[str, str]],
    curves: list[Curves],
    columns: list[str],
) -> Figure:
    points = [(curve, place) for curve in curves for place in range(len(curve.values["step"]))]
    chosen = np.unique(np.linspace(0, len(points) - 1, min(len(points), TABLE_ROWS)).round().astype(int))
    rows = [
        [
            f"{curve.values['step'][place]:,.0f}",
            round_name(curve.round),
            *(number_text(float(curve.values[name][place])) for name in columns),
        ]
        for curve, place in (points[index] for index in chosen)
    ]
    header = ["step", "round", *(name.replace("_", " ") for name in columns)]
    return Figure(key, title, caption, drawing(title, drawn), legend, header, rows)
