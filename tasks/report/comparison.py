"""Methods against each other: accuracy for the time it takes, what each part adds, and ratios to each baseline."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from tasks.report.drawing import (
    HEIGHT,
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
    text,
    tip,
)
from tasks.report.evaluation import STANDARD_ERRORS
from tasks.report.page import environment
from tasks.report.text import NOTHING, duration_text, number_text

_ROLES = {"npd": "npd", "baseline": "student", "ablation": "ablation", "teacher": "teacher", "start": "start"}
"""The CSS class that colours a role."""

_ROLE_NAMES = {
    "npd": "NPD",
    "baseline": "baselines",
    "ablation": "ablations of NPD",
    "teacher": "teacher",
    "start": "student before",
}

Row = dict[str, Any]


def comparison_html(table: pa.Table, title: str) -> str:
    """Return the comparison as one page that needs nothing else.

    Args:
        table: COMPARISON, one row a method. Any value but `method`, `title` and `role` may be null.
        title: The page's.
    """
    figures = comparison_figures(table)
    header, rows = comparison_rows(table)
    roles: list[str] = table.column("role").to_pylist()
    methods = sum(role not in ("teacher", "start") for role in roles)
    return (
        environment()
        .get_template("comparison.html")
        .render(title=title, figures=figures, header=header, rows=rows, methods=methods)
    )


def comparison_figures(table: pa.Table) -> list[Figure]:
    """Return accuracy against time, accuracy by method, held-out KL by method, and accuracy after RL if it was run."""
    rows: list[Row] = table.to_pylist()
    figures = []
    if any(_timed(row) for row in rows):
        figures.append(_against_time(rows))
    for key, title, names in (
        ("accuracy", "Accuracy by method", _ACCURACY),
        ("rl", "Accuracy after RL", _AFTER_RL),
    ):
        shown = [row for row in rows if _known(row[names[0]])]
        if shown:
            figures.append(_bars(key, title, "Share of answers, with 95 % interval", shown, names))
    with_kl = [
        row
        | {
            "kl_low": row["kl_teacher_student"] - STANDARD_ERRORS * (row["kl_stderr"] or 0.0),
            "kl_high": row["kl_teacher_student"] + STANDARD_ERRORS * (row["kl_stderr"] or 0.0),
        }
        for row in rows
        if _known(row["kl_teacher_student"])
    ]
    if with_kl:
        names = ("kl_teacher_student", "kl_low", "kl_high")
        figures.append(_bars("kl", "Held-out KL(teacher‖student)", "Nats per token; lower is better", with_kl, names))
    return figures


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _timed(row: Row) -> bool:
    return _known(row["seconds"]) and row["seconds"] > 0 and _known(row["accuracy"])


def _ends(row: Row, names: tuple[str, str, str]) -> tuple[float, float, float]:
    """Return a value and the ends of its interval, which are the value itself where they are unknown."""
    value, low, high = (row[name] for name in names)
    return value, low if _known(low) else value, high if _known(high) else value


_ACCURACY = ("accuracy", "accuracy_low", "accuracy_high")
_AFTER_RL = ("rl_accuracy", "rl_low", "rl_high")
_DIFFERENCE = ("difference", "difference_low", "difference_high")
_SECONDS = ("seconds", "seconds_min", "seconds_max")


def _against_time(rows: list[Row]) -> Figure:
    timed = [row for row in rows if _timed(row)]
    levels = [row for row in rows if not _timed(row) and _known(row["accuracy"])]
    times = np.array([_ends(row, _SECONDS) for row in timed])
    values = np.array([_ends(row, _ACCURACY) for row in timed + levels])
    low, high = float(times.min()), float(times.max())
    axes = Axes.of((low / 1.6, high * 2.2), around(values.ravel()), "wall-clock, by logarithm", "accuracy", x_log=True)
    ticks = [(value, duration_text(value).removesuffix(" 00 s")) for value in _time_ticks(axes.x)]
    parts = [axes.frame(ticks)]
    parts.append(axes.levels([(row["accuracy"], _ROLES.get(row["role"], "ablation"), row["title"]) for row in levels]))
    places = [(axes.x(row["seconds"]), axes.y(row["accuracy"])) for row in timed]
    taken = [(x - 6, x + 6, y) for x, y in places]
    taken += [(float(LEFT), float(WIDTH), axes.y(row["accuracy"])) for row in levels]
    for row in sorted(timed, key=lambda row: (row["role"] == "ablation", -row["accuracy"])):
        class_ = _ROLES.get(row["role"], "ablation")
        (seconds, least, most), (value, bottom, top) = _ends(row, _SECONDS), _ends(row, _ACCURACY)
        told = f"{row['title']}: {number_text(value)} in {duration_text(seconds)}"
        across = element(
            "line", x1=axes.x(least), x2=axes.x(most), y1=axes.y(value), y2=axes.y(value), class_=f"bar {class_}"
        )
        parts += [across, axes.point(seconds, value, bottom, top, class_, told)]
        parts.append(_label(axes.x(seconds), axes.y(value), row, taken))
    title = "Accuracy against wall-clock"
    header = ["method", "accuracy", "95 % interval", "time", "least", "most"]
    numbers = [
        [
            row["title"],
            number_text(row["accuracy"]),
            _interval(row, _ACCURACY),
            *(duration_text(value) for value in _ends(row, _SECONDS)),
        ]
        for row in timed
    ]
    caption = "Up and to the left is better. Bars: 95 % interval of accuracy, least and most time over the seeds."
    return Figure("time", title, caption, drawing(title, *parts), _legend(rows), header, numbers)


def _time_ticks(x: Scale) -> list[float]:
    """Return times that people count by, at most five of them."""
    known = [1.0, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 18000, 36000, 86400, 259200, 864000]
    inside = [value for value in known if x.low <= value <= x.high]
    return inside[:: max(1, -(-len(inside) // 5))]


def _label(x: float, y: float, row: Row, taken: list[tuple[float, float, float]]) -> Markup:
    """Return a point's name beside it, clear of what is in ``taken`` (left, right, middle), which it joins.

    The name of an ablation is left out where there is no room: it is one of many.
    """
    width = 6.0 * len(row["title"])
    shifts = (0,) if row["role"] == "ablation" else (0, -12, 12, -24, 24, -36, 36)
    places = [(side, y + shift) for shift in shifts for side in (x + 9, x - 9 - width)]
    for left, middle in places:
        inside = left > LEFT and left + width < WIDTH - 4 and TOP < middle < HEIGHT - 50
        clear = all(abs(middle - m) >= 11 or left > right or left + width < start for start, right, m in taken)
        if inside and clear:
            taken.append((left, left + width, middle))
            after = left > x
            return text(x + 9 if after else x - 9, middle + 4, row["title"], "start" if after else "end", "note")
    return Markup("")


def _bars(key: str, title: str, caption: str, rows: list[Row], names: tuple[str, str, str]) -> Figure:
    # Names of any length: they stand above their bars.
    left, row_height = 8.0, 38.0
    ends = np.array([_ends(row, names) for row in rows])
    x = Scale(0.0, max(float(ends.max()) * 1.02, 1e-9), left, WIDTH - RIGHT - 44)
    parts: list[Markup] = []
    for place, row in enumerate(rows):
        top, class_ = TOP + row_height * place, _ROLES.get(row["role"], "ablation")
        value, low, high = _ends(row, names)
        told = f"{row['title']}: {number_text(value)} ({number_text(low)} to {number_text(high)})"
        parts += [
            text(left, top + 10, row["title"], "start", "tick"),
            element("rect", tip(told), x=left, y=top + 15, width=max(x(value) - left, 1.0), height=14.0, class_=class_),
            element("line", tip(told), x1=x(low), x2=x(high), y1=top + 22, y2=top + 22, class_="least"),
            text(x(high) + 6, top + 26, number_text(value, 3), "start", "label"),
        ]
    bottom = TOP + row_height * len(rows)
    parts += [text(x(value), bottom + 12, number_text(value, 3), "middle", "tick") for value in x.ticks(4)]
    numbers = [[row["title"], number_text(row[names[0]]), _interval(row, names)] for row in rows]
    svg = drawing(title, *parts, height=bottom + 20)
    return Figure(f"bars-{key}", title, caption, svg, _legend(rows), ["method", title, "95 % interval"], numbers)


def _legend(rows: list[Row]) -> list[tuple[str, str]]:
    roles = [role for role in _ROLE_NAMES if any(row["role"] == role for row in rows)]
    return [(_ROLES[role], _ROLE_NAMES[role]) for role in roles]


def _interval(row: Row, names: tuple[str, str, str]) -> str:
    _, low, high = _ends(row, names)
    return f"{number_text(low)} to {number_text(high)}" if high > low else ""


def comparison_rows(table: pa.Table) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of the whole table, with every method's difference and ratio to each baseline."""
    rows: list[Row] = table.to_pylist()
    baselines = [row for row in rows if row["role"] == "baseline"]
    header = ["method", "accuracy", "95 % interval", "NPD − this, points, paired", "after RL, with 95 % interval"]
    header += ["KL(teacher‖student)", "policy KL", "time"]
    header += ["generated tokens", "steps", "learning rate", "seeds"]
    header += [f"against {row['title']}: points, time" for row in baselines]
    return header, [_cells(row, baselines) for row in rows]


def _cells(row: Row, baselines: list[Row]) -> list[str]:
    kl = number_text(row["kl_teacher_student"])
    return [
        row["title"],
        number_text(row["accuracy"]),
        _interval(row, _ACCURACY) if _known(row["accuracy"]) else "",
        _points(row),
        f"{number_text(row['rl_accuracy'])}{_in_brackets(row, _AFTER_RL)}" if _known(row["rl_accuracy"]) else "",
        f"{kl} ± {number_text(row['kl_stderr'], 2)}" if kl != NOTHING and _known(row["kl_stderr"]) else kl,
        number_text(row["policy_kl"], 3) if _known(row["policy_kl"]) else "",
        duration_text(row["seconds"]) if _known(row["seconds"]) else "",
        *(f"{row[name]:,}" if row[name] is not None else "" for name in ("generated_tokens", "steps")),
        number_text(row["learning_rate"], 2) if _known(row["learning_rate"]) else "",
        f"{row['seeds']}" if row["seeds"] is not None else "",
        *(against_text(row, baseline) for baseline in baselines),
    ]


def _in_brackets(row: Row, names: tuple[str, str, str]) -> str:
    interval = _interval(row, names)
    return f" ({interval})" if interval else ""


def _points(row: Row) -> str:
    """Return the accuracy that NPD has more, paired by seed and prompt, with its 95 % interval."""
    if not _known(row["difference"]):
        return ""
    value, low, high = (100 * end for end in _ends(row, _DIFFERENCE))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})" if high > low else f"{value:+.1f}"


def against_text(row: Row, baseline: Row) -> str:
    """Return how many points of accuracy a method has more than a baseline, and how much of its time it takes.

    >>> against_text({"accuracy": 0.5, "seconds": 20.0}, {"accuracy": 0.45, "seconds": 100.0})
    '+5.0, ×0.2'
    """
    said = []
    if _known(row["accuracy"]) and _known(baseline["accuracy"]):
        said.append(f"{100 * (row['accuracy'] - baseline['accuracy']):+.1f}")
    if _known(row["seconds"]) and _known(baseline["seconds"]) and baseline["seconds"] > 0:
        said.append(f"×{number_text(row['seconds'] / baseline['seconds'], 2)}")
    return ", ".join(said)
