"""Figures for places that are not the page: images that carry their own colours, and Markdown."""

import base64
import re

from markupsafe import Markup

from schemas.untrusted_text import escape_markdown
from tasks.report.drawing import WIDTH, Figure, coordinate, element, text
from tasks.report.page import Section, environment
from tasks.report.text import markdown_table

MARKDOWN_ROWS = 30
"""Rows of a figure's numbers in Markdown; of more, as many evenly."""

_HEAD = re.compile(r'viewBox="0 0 [\d.]+ ([\d.]+)"')
_LINE_KEYS = ("line-", "budget", "start", "teacher", "least")


def image_svg(figure: Figure) -> str:
    """Return a figure as an SVG file: its title and legend on top, its colours inside, light or dark as the viewer."""
    found = _HEAD.search(figure.svg)
    assert found is not None, "every drawing has a viewBox"
    height = float(found[1])
    keys, place, line = [], 14.0, 44.0
    for class_, words in figure.legend:
        width = 24 + 6.6 * len(words)
        if place + width > WIDTH and place > 14:
            place, line = 14.0, line + 18
        mark = (
            element("line", x1=place, x2=place + 10, y1=line - 4, y2=line - 4, stroke_width=3.0, class_=class_)
            if class_.startswith(_LINE_KEYS)
            else element("rect", x=place, y=line - 9, width=10.0, height=10.0, rx=2.0, class_=class_)
        )
        keys += [mark, text(place + 15, line, words, "start", "tick")]
        place += width
    top = line + 10 if figure.legend else 32.0
    template = environment().get_template("image.svg")
    return template.render(
        title=text(14, 22, figure.title, "start", "heading"),
        keys=Markup("").join(keys),
        figure=figure.svg,
        width=WIDTH,
        height=coordinate(height),
        top=coordinate(top),
        whole=coordinate(top + height + 6),
    )


def image_url(figure: Figure) -> str:
    """Return a figure as a data URL, for places that show images by their address."""
    return f"data:image/svg+xml;base64,{base64.b64encode(image_svg(figure).encode()).decode()}"


def figures_markdown(title: str, sections: list[Section]) -> str:
    """Return the numbers of every figure as Markdown tables."""
    lines = [f"# {escape_markdown(title)}"]
    for section in sections:
        lines += ["", f"## {escape_markdown(section.title)}", "", escape_markdown(section.words)]
        for figure in section.figures:
            lines += ["", f"### {escape_markdown(figure.title)}", "", escape_markdown(figure.caption), ""]
            step = max(1, -(-len(figure.rows) // MARKDOWN_ROWS))
            lines += markdown_table(figure.header, figure.rows[::step])
    return "\n".join(lines) + "\n"
