"""Numbers and names as the report says them."""

import math

from markupsafe import Markup, escape

from schemas.stage_key import WARMUP
from schemas.untrusted_text import escape_markdown, one_line

NOTHING = "–"
"""Shown where there is no number."""


def round_name(index: int | None) -> str:
    """Return a round's short name.

    >>> round_name(-1), round_name(2), round_name(None)
    ('warm-up', 'round 2', 'run')
    """
    if index is None:
        return "run"
    return "warm-up" if index == WARMUP else f"round {index}"


def number_text(value: float | None, digits: int = 4) -> str:
    """Return a number with as many significant digits, thousands apart.

    >>> number_text(0.123456), number_text(1234567.0), number_text(0.000012), number_text(None)
    ('0.1235', '1,234,567', '1.2e-05', '–')
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        return f"{value:.{min(digits, 2) - 1}e}".replace(".0e", "e")
    text = f"{value:,.{max(digits - 1 - size, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent_text(share: float | None) -> str:
    """Return a share as per cent.

    >>> percent_text(0.1234), percent_text(1.0), percent_text(None)
    ('12.3 %', '100 %', '–')
    """
    if share is None or not math.isfinite(share):
        return NOTHING
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def duration_text(seconds: float) -> str:
    """Return seconds as people say them.

    >>> duration_text(4.21), duration_text(75), duration_text(7260)
    ('4.2 s', '1 min 15 s', '2 h 01 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def bytes_text(count: int) -> str:
    """Return a size as people say it.

    >>> bytes_text(512), bytes_text(3_500_000)
    ('512 B', '3.5 MB')
    """
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def count_text(count: float) -> str:
    """Return a count in few characters.

    >>> count_text(950), count_text(12_300), count_text(4_500_000)
    ('950', '12.3 k', '4.5 M')
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= limit:
            scaled = count / (1e3 if unit == "k" else limit)
            return f"{scaled:.1f}".removesuffix(".0") + f" {unit}"
    return f"{count:,.0f}"


def safe(text: str) -> Markup:
    """Return text from outside on one line for HTML: escaped, and what cannot be seen made visible.

    >>> str(safe("<b>\\u202e"))
    '&lt;b&gt;\\\\u202e'
    """
    return escape(one_line(text))


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Return a table as lines of Markdown, every cell escaped.

    >>> markdown_table(["a", "b"], [["1", "x|y"]])
    ['| a | b |', '|---|---|', '| 1 | x\\\\|y |']
    """
    lines = [f"| {' | '.join(escape_markdown(cell) for cell in row)} |" for row in [header, *rows]]
    return [lines[0], f"|{'---|' * len(header)}", *lines[1:]]
