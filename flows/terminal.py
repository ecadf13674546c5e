"""The terminal: data printed there is only ever text."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from schemas.untrusted_text import visible


class Terminal(Console):
    """A rich console that reads no markup out of text, and shows control characters instead of sending them.

    Args:
        stderr: Write to stderr instead of stdout.
        settings: Further arguments of ``rich.console.Console``.
    """

    def __init__(self, *, stderr: bool = False, **settings: Any) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as ``Console`` does; what is not rich's own control sequence becomes visible."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)
