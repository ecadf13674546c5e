"""Vector drawing: scales, axes and marks as SVG whose colours are CSS classes: one drawing for light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from schemas.untrusted_text import one_line
from tasks.report.text import number_text, safe

WIDTH, HEIGHT = 460, 270
"""Of a drawing, in its own units: a third more than a phone's pixels, so that its letters stay readable there."""

LEFT, RIGHT, TOP, BOTTOM = 60, 14, 14, 44
"""Room around the plot for its axes."""

Points = NDArray[np.float64]


def element(name: str, *children: Markup, **attributes: str | float) -> Markup:
    """Return an SVG element; attribute names take ``_`` for ``-`` and a trailing one for Python's own words.

    >>> str(element("circle", cx=1.0, class_="mark"))
    '<circle cx="1" class="mark"/>'
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), coordinate(value))
        for key, value in attributes.items()
    )
    inside = Markup("").join(children)
    return (
        Markup("<{0}{1}>{2}</{0}>").format(name, written, inside) if inside else Markup("<{}{}/>").format(name, written)
    )


def coordinate(value: str | float) -> str:
    """Return a coordinate with one decimal, other values as they are.

    >>> coordinate(1.26), coordinate(3.0), coordinate("end")
    ('1.3', '3', 'end')
    """
    return value if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")


def text(x: float, y: float, words: str, anchor: str = "start", class_: str = "label") -> Markup:
    """Return text at a place; ``words`` may come from outside."""
    return element("text", safe(words), x=x, y=y, text_anchor=anchor, class_=class_)


def tip(words: str) -> Markup:
    """Return what a mark says of itself when pointed at."""
    return element("title", safe(words))


@dataclass(frozen=True)
class Scale:
    """Values from ``low`` to ``high`` placed from ``start`` to ``end``, evenly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return where a value lies; beyond the ends it lies on them."""
        return float(self.places(np.array([value], np.float64))[0])

    def places(self, values: Points) -> Points:
        """Return where values lie, same shape."""
        low, high = self._warped(self.low), self._warped(self.high)
        warped = np.log10(np.maximum(values, 1e-300)) if self.log else values
        share = np.clip((warped - low) / (high - low), 0.0, 1.0)
        placed: Points = self.start + share * (self.end - self.start)
        return placed

    def _warped(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self, count: int = 5) -> list[float]:
        """Return about ``count`` round values between the ends."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            steps = (1.0,) if last - first >= 2 else (1.0, 2.0, 5.0)
            values = [step * 10.0**power for power in range(first - 1, last + 1) for step in steps]
        else:
            step = round_step((self.high - self.low) / count)
            first = math.ceil(self.low / step - 1e-9)
            values = [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]
        slack = 1e-9 * (self.high - self.low)
        return [value for value in values if self.low - slack <= value <= self.high + slack]


def round_step(size: float) -> float:
    """Return the smallest of 1, 2 and 5 times a power of ten that is not below ``size``.

    >>> round_step(0.13), round_step(30)
    (0.2, 50.0)
    """
    power = math.floor(math.log10(size))
    return next(step for factor in (1, 2, 5, 10) if (step := float(f"{factor}e{power}")) >= size * (1 - 1e-9))


def around(values: Points, *, zero: bool = False, margin: float = 0.06) -> tuple[float, float]:
    """Return bounds that show all finite values, with a margin; ``zero``: and the zero line."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-6):
        low, high = (low - abs(low) * 0.5, high + abs(high) * 0.5) if low else (0.0, 1.0)
    room = margin * (high - low)
    return (low if zero and low == 0 else low - room), (high if zero and high == 0 else high + room)


def share_ticks(x: Scale, y: float) -> list[Markup]:
    """Return the names of shares from 0 to 1 along ``x``, at height ``y``."""
    return [
        text(x(share), y, f"{100 * share:g} %", "end" if share == 1 else "middle", "tick")
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]


@dataclass(frozen=True)
class Axes:
    """A plot's two scales and what they are called."""

    x: Scale
    y: Scale
    x_title: str
    y_title: str

    @classmethod
    def of(
        cls,
        x: tuple[float, float],
        y: tuple[float, float],
        x_title: str,
        y_title: str,
        *,
        x_log: bool = False,
        left: float = LEFT,
    ) -> "Axes":
        """Return axes over the whole drawing for these ranges."""
        return cls(Scale(*x, left, WIDTH - RIGHT, log=x_log), Scale(*y, HEIGHT - BOTTOM, TOP), x_title, y_title)

    def frame(self, x_ticks: Sequence[tuple[float, str]] | None = None) -> Markup:
        """Return grid, ticks and titles; ``x_ticks`` (value, words) replace the numbers along x."""
        x, y = self.x, self.y
        parts = []
        for value in y.ticks():
            place = y(value)
            parts.append(element("line", x1=x.start, x2=x.end, y1=place, y2=place, class_="grid"))
            parts.append(text(x.start - 6, place + 4, number_text(value, 3), "end", "tick"))
        along = [(value, number_text(value, 3)) for value in x.ticks()] if x_ticks is None else x_ticks
        for value, words in along:
            place = x(value)
            parts.append(element("line", x1=place, x2=place, y1=y.start, y2=y.start + 4, class_="axis"))
            parts.append(text(place, y.start + 17, words, "middle", "tick"))
        parts.append(element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
        parts.append(text((x.start + x.end) / 2, HEIGHT - 6, self.x_title, "middle", "title"))
        middle = (y.start + y.end) / 2
        upright = element(
            "text",
            safe(self.y_title),
            x=0.0,
            y=0.0,
            text_anchor="middle",
            class_="title",
            transform=f"translate(12 {middle:.0f}) rotate(-90)",
        )
        return Markup("").join([*parts, upright])

    def line(self, xs: Points, ys: Points, class_: str) -> Markup:
        """Return a line through the finite points [n], broken where one is missing; a point alone is a dot."""
        finite = np.isfinite(xs) & np.isfinite(ys)
        if not finite.any():
            return Markup("")
        pieces = np.split(np.arange(len(xs)), np.flatnonzero(~finite))
        lines, dots = [], []
        for piece in pieces:
            inside = piece[finite[piece]]
            places = list(zip(self.x.places(xs[inside]), self.y.places(ys[inside]), strict=True))
            path = "M" + "L".join(f"{coordinate(a)} {coordinate(b)}" for a, b in places)
            if len(places) > 1:
                lines.append(path)
            elif places:
                # Of no length: its round ends are what is seen.
                dots.append(f"{path}h0")
        drawn = [(lines, f"line {class_}"), (dots, f"line dot {class_}")]
        return Markup("").join(element("path", d="".join(paths), class_=name) for paths, name in drawn if paths)

    def across(self, value: float, class_: str, words: str, *, above: bool, anchor: str) -> Markup:
        """Return a level line over the whole width, with its name at its right or left end."""
        place = self.y(value)
        end = self.x.end if anchor == "end" else self.x.start + 4
        line = element("line", x1=self.x.start, x2=self.x.end, y1=place, y2=place, class_=f"level {class_}")
        return line + text(end, self._name_place(value, above=above), words, anchor, "note")

    def levels(self, named: Sequence[tuple[float, str, str]]) -> Markup:
        """Return level lines (value, class, name), every name clear of the others."""
        parts, taken = [], set[tuple[str, float]]()
        for value, class_, words in sorted(named, reverse=True):
            for anchor, above in (("end", True), ("end", False), ("start", True), ("start", False)):
                place = self._name_place(value, above=above)
                if all(anchor != side or abs(place - other) >= 15 for side, other in taken):
                    break
            taken.add((anchor, place))
            parts.append(self.across(value, class_, words, above=above, anchor=anchor))
        return Markup("").join(parts)

    def _name_place(self, value: float, *, above: bool) -> float:
        return self.y(value) + (-5 if above else 13)

    def upright(self, value: float, class_: str, words: str = "", anchor: str = "start") -> Markup:
        """Return a line over the whole height, with its name at its top."""
        place = self.x(value)
        line = element("line", x1=place, x2=place, y1=self.y.start, y2=self.y.end, class_=f"level {class_}")
        shift = 4 if anchor == "start" else -4
        name = text(place + shift, self.y.end + 9, words, anchor, "note") if words else Markup("")
        return line + name

    def point(self, x: float, y: float, low: float, high: float, class_: str, words: str) -> Markup:
        """Return a mark with an error bar from ``low`` to ``high`` along y; ``words`` tell its numbers."""
        place = self.x(x)
        bar = element("line", x1=place, x2=place, y1=self.y(low), y2=self.y(high), class_=f"bar {class_}")
        mark = element("circle", cx=place, cy=self.y(y), r=4.5, class_=f"mark {class_}")
        return element("g", tip(words), bar, mark)


def drawing(name: str, *parts: Markup, height: float = HEIGHT) -> Markup:
    """Return a whole drawing called ``name`` that scales with the room it gets."""
    return element(
        "svg",
        tip(name),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {coordinate(height)}",
        role="img",
        aria_label=one_line(name),
        class_="drawing",
    )


@dataclass(frozen=True)
class Figure:
    """A drawing with everything that belongs to it.

    Args:
        key: Unique in the report: letters, digits, dashes.
        title: What it shows.
        caption: What to see in it.
        svg: The drawing.
        legend: CSS class and meaning of each colour.
        header: Column titles of its numbers.
        rows: Its numbers, as text.
        round: The round it is of; None: of the run so far.
    """

    key: str
    title: str
    caption: str
    svg: Markup
    legend: list[tuple[str, str]]
    header: list[str]
    rows: list[list[str]]
    round: int | None = None
