from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from schemas.errors import PromptError
from schemas.untrusted_text import code_markdown, escape_markdown, one_line, visible

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "a|b|c",
    "`x` ``y``",
    "line\n---\ntitle: owned\n---\n# heading",
    "[click](javascript:alert(1))",
    "![x](https://host/p.png)",
    "<javascript:alert(1)>",
    "&lt;b&gt; &#60;b&#62;",
    "**bold** _it_ ~~no~~ \\* $x$",
    "\x1b]0;owned\x07\x1b[2J[red]x[/red]",
    "\u202etxt.exe\u2066",
    "</code></td></table><script>x</script>",
]
ANY = st.one_of(st.text(), st.lists(st.sampled_from([*HOSTILE, *"`|\\<>[]()!&\n\r\t #-*_~"]), max_size=8).map("".join))


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert attrs == []

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def rendered(markdown: str) -> Page:
    return Page(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown))


def same_words(page: Page, text: str) -> bool:
    shown = "".join("".join(page.words).replace("\u200b", "").split())
    return shown == "".join(text.replace("\u200b", "").split())


@given(ANY)
def test_markdown_shows_text_as_it_is_and_nothing_else(text: str) -> None:
    page = rendered(f"Name: {escape_markdown(text)} end")
    assert page.tags == ["p"]
    assert same_words(page, f"Name: {visible(text)} end")


@given(ANY)
def test_a_markdown_table_keeps_its_cells(text: str) -> None:
    page = rendered(f"| a | b |\n|---|---|\n| {escape_markdown(text)} | {code_markdown(text)} |\n| x | y |")
    assert (page.tags.count("tr"), page.tags.count("td"), page.tags.count("table")) == (3, 4, 1)
    assert set(page.tags) == {"table", "thead", "tbody", "tr", "th", "td", "code"}


@given(ANY)
def test_code_in_markdown_is_one_piece_of_code(text: str) -> None:
    page = rendered(f"- path: {code_markdown(text)} end")
    assert page.tags == ["ul", "li", "code"]
    assert same_words(page, f"path: {one_line(text)} end")


@pytest.mark.parametrize("address", ["http://host", "see www.host.org", "me@host.org"])
def test_a_bare_address_is_no_link(address: str) -> None:
    # GitHub links these without any markup, unless something stands in them.
    assert address not in escape_markdown(address)
    assert escape_markdown(address).replace("\u200b", "") == address


@given(st.text(st.characters()))
def test_what_is_shown_steers_no_terminal(text: str) -> None:
    shown = visible(text)
    assert not [c for c in shown if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) <= 0x9F]
    assert not [c for c in shown if 0x202A <= ord(c) <= 0x202E or 0x2066 <= ord(c) <= 0x2069]
    shown.encode()
    assert visible(shown) == shown
    assert len(one_line(text).splitlines()) <= 1


def test_halves_of_surrogate_pairs_can_be_printed() -> None:
    assert visible("caf\udce9") == "caf\\udce9"


def test_typed_errors_are_fit_for_a_terminal() -> None:
    assert str(PromptError("\x1b]0;x\x07.jsonl: no such prompt file")) == "\\x1b]0;x\\x07.jsonl: no such prompt file"
