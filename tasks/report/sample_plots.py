"""Drawings of what was sampled: delta-IFD by zone, IFD against IFD, kept and dropped by reason."""

import math

import numpy as np
from markupsafe import Markup

from schemas.tables import ZONES
from tasks.report.drawing import LEFT, RIGHT, TOP, WIDTH, Axes, Figure, Scale, drawing, element, share_ticks, text, tip
from tasks.report.histograms import Counts
from tasks.report.ledger import DELTA_IFD, IFD, Ledger
from tasks.report.text import NOTHING, number_text, percent_text, round_name

ZONE_NAMES = {"learnable": "learnable", "degenerate": "degenerate", "cognitive_disconnect": "cognitive disconnect"}
"""The zones as people say them."""

ZONE_CLASSES = {zone: f"zone-{zone.replace('_', '-')}" for zone in ZONES}
"""The CSS class that colours a zone, everywhere."""

ZONE_LEGEND = [(ZONE_CLASSES[zone], ZONE_NAMES[zone]) for zone in ZONES]


def delta_ifd_figure(ledger: Ledger) -> Figure:
    """Return a round's distribution of delta-IFD, coloured by zone, with the bounds as applied."""
    total = ledger.delta_ifd.sum(axis=0)
    bounds = tuple(bound for bound in (ledger.low, ledger.high) if math.isfinite(bound))
    window = DELTA_IFD.window(total, 48, bounds)
    counts, edges = window.sum(ledger.delta_ifd, axis=1), window.edges
    top = float(max(counts.sum(axis=0).max(), 1))
    axes = Axes.of(window.range, (0.0, 1.06 * top), "Δ-IFD = IFD(teacher) − IFD(student)", "samples")
    bars = []
    for place in range(window.bins):
        left, right = axes.x(edges[place]), axes.x(edges[place + 1])
        base = axes.y.start
        for zone, name in enumerate(ZONES):
            count = int(counts[zone, place])
            if count:
                height = axes.y.start - axes.y(count)
                words = f"{ZONE_NAMES[name]}: {count:,} from {edges[place]:.3f} to {edges[place + 1]:.3f}"
                bars.append(
                    element(
                        "rect",
                        tip(words),
                        x=left + 0.4,
                        y=base - height,
                        width=max(right - left - 0.8, 0.6),
                        height=height,
                        class_=ZONE_CLASSES[name],
                    )
                )
                base -= height
    lines = [
        axes.upright(bound, "bound", f"{sign} {number_text(bound, 3)}", anchor)
        for bound, sign, anchor in ((ledger.low, "≥", "start"), (ledger.high, "≤", "end"))
        if edges[0] < bound < edges[-1]
    ]
    title = f"Δ-IFD, {round_name(ledger.round)}"
    rows = [
        [f"{edges[place]:.3f} to {edges[place + 1]:.3f}", *(f"{int(count):,}" for count in counts[:, place])]
        for place in range(window.bins)
    ]
    shares = ", ".join(
        f"{percent_text(ledger.zone(zone) / max(ledger.samples, 1))} {ZONE_NAMES[zone]}" for zone in ZONES
    )
    return Figure(
        key=f"delta-ifd-{ledger.round}",
        title=title,
        caption=f"{ledger.samples:,} samples: {shares}. The end bars hold what lies beyond.",
        svg=drawing(title, axes.frame(), *bars, *lines),
        legend=ZONE_LEGEND,
        header=["Δ-IFD", *(ZONE_NAMES[zone] for zone in ZONES)],
        rows=rows,
        round=ledger.round,
    )


def ifd_figure(ledger: Ledger, cells: Counts) -> Figure:
    """Return a round's samples by student IFD (along) and teacher IFD (up), as density, with the bounds of delta-IFD.

    Args:
        ledger: The round's ledger.
        cells: Samples by bin of IFD, int64 [student bins, teacher bins].
    """
    along, up = IFD.window(cells.sum(axis=1), 40), IFD.window(cells.sum(axis=0), 40)
    counts = up.sum(along.sum(cells, axis=0), axis=1)
    axes = Axes.of(along.range, up.range, "student IFD", "teacher IFD")
    most = math.log1p(max(int(counts.max()), 1))
    levels: dict[int, list[str]] = {}
    lefts, tops = axes.x.places(along.edges), axes.y.places(up.edges)
    size = f"h{lefts[1] - lefts[0]:.1f}v{tops[0] - tops[1]:.1f}h-{lefts[1] - lefts[0]:.1f}z"
    for student, teacher in np.argwhere(counts > 0):
        level = math.ceil(7 * math.log1p(int(counts[student, teacher])) / most)
        levels.setdefault(level, []).append(f"M{lefts[student]:.1f} {tops[teacher + 1]:.1f}{size}")
    density = [element("path", d="".join(paths), class_=f"density d{level}") for level, paths in sorted(levels.items())]
    names = (("degenerate", ledger.low, "≥"), ("cognitive_disconnect", ledger.high, "≤"))
    diagonals = [
        _diagonal(axes, bound, ZONE_CLASSES[zone], f"Δ {sign} {number_text(bound, 3)}")
        for zone, bound, sign in names
        if math.isfinite(bound)
    ]
    title = f"Student IFD against teacher IFD, {round_name(ledger.round)}"
    middles = IFD.low + (np.arange(IFD.bins) + 0.5) * IFD.width
    wide = IFD.window(cells.sum(axis=1), 12)
    students, teachers = wide.sum(cells.sum(axis=1)), wide.sum((cells * middles).sum(axis=1))
    rows = [
        [
            f"{wide.edges[place]:.2f} to {wide.edges[place + 1]:.2f}",
            f"{int(students[place]):,}",
            number_text(teachers[place] / students[place]) if students[place] else NOTHING,
        ]
        for place in range(wide.bins)
    ]
    caption = "The deeper, the more samples (by logarithm). Between the two lines is what may be learned from."
    if cells[-1].any() or cells[:, -1].any():
        caption += f" An IFD above {IFD.high:g} is shown, and counts in means, as {IFD.high:g}."
    return Figure(
        key=f"ifd-{ledger.round}",
        title=title,
        caption=caption,
        svg=drawing(title, axes.frame(), *density, *diagonals),
        legend=[
            ("density d5", "samples"),
            (ZONE_CLASSES["degenerate"], "lower bound"),
            (ZONE_CLASSES["cognitive_disconnect"], "upper bound"),
        ],
        header=["student IFD", "samples", "mean teacher IFD"],
        rows=rows,
        round=ledger.round,
    )


def _diagonal(axes: Axes, shift: float, class_: str, words: str) -> Markup:
    """Return the line teacher = student + ``shift`` as far as it lies in the plot."""
    first, last = max(axes.x.low, axes.y.low - shift), min(axes.x.high, axes.y.high - shift)
    if first >= last:
        return Markup("")
    ends = {"x1": axes.x(first), "y1": axes.y(first + shift), "x2": axes.x(last), "y2": axes.y(last + shift)}
    return element("line", tip(words), class_=f"level {class_}", **ends)


def reasons_figure(ledgers: list[Ledger]) -> Figure:
    """Return each round's samples, kept and dropped by reason, as one bar each."""
    reasons = list(dict.fromkeys(reason for ledger in ledgers for reason in ledger.reasons))
    rows_height = 30
    x = Scale(0.0, 1.0, LEFT + 14, WIDTH - RIGHT)
    parts = []
    for row, ledger in enumerate(ledgers):
        top, done = TOP + rows_height * row, 0
        parts.append(text(x.start - 8, top + 14, round_name(ledger.round), "end", "tick"))
        for reason in reasons:
            count = ledger.reasons.get(reason, 0)
            if count:
                left, right = x(done / ledger.samples), x((done + count) / ledger.samples)
                words = f"{round_name(ledger.round)}, {reason}: {count:,} ({percent_text(count / ledger.samples)})"
                parts.append(
                    element(
                        "rect",
                        tip(words),
                        x=left,
                        y=float(top),
                        width=max(right - left - 1, 0.6),
                        height=20.0,
                        class_=reason_class(reason),
                    )
                )
                if right - left > 44:
                    share = percent_text(count / ledger.samples)
                    parts.append(text((left + right) / 2, top + 14, share, "middle", "inside"))
                done += count
    base = TOP + rows_height * len(ledgers)
    parts += share_ticks(x, base + 14)
    title = "Kept and dropped, by reason"
    return Figure(
        key="reasons",
        title=title,
        caption="Every sample stands in the ledger, with its reason.",
        svg=drawing(title, *parts, height=base + 24.0),
        legend=[(reason_class(reason), reason_name(reason)) for reason in reasons],
        header=["round", *(reason_name(reason) for reason in reasons)],
        rows=[
            [round_name(ledger.round), *(f"{ledger.reasons.get(reason, 0):,}" for reason in reasons)]
            for ledger in ledgers
        ],
    )


_REASON_CLASSES = {
    "kept": ZONE_CLASSES["learnable"],
    "below_min_delta_ifd": ZONE_CLASSES["degenerate"],
    "above_max_delta_ifd": ZONE_CLASSES["cognitive_disconnect"],
    "too_long_for_pack": "other-1",
    "not_scorable": "other-2",
}


def reason_class(reason: str) -> str:
    """Return the CSS class that colours a reason: its zone's where it is about a zone."""
    return _REASON_CLASSES.get(reason, "other-3")


def reason_name(reason: str) -> str:
    """Return a reason as people say it.

    >>> reason_name("below_min_delta_ifd")
    'below min Δ-IFD'
    """
    return reason.replace("delta_ifd", "Δ-IFD").replace("_", " ")
