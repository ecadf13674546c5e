"""Text from outside (prompts, model output, settings, names, errors), made harmless where it is shown."""

import re

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 but newline and tab, DEL, C1; what turns text round or breaks its lines; halves of surrogate pairs."""

_WEB = re.compile(r"(?<=:)(?=//)|(?<=\bwww)(?=\.)|(?=@)", re.IGNORECASE)
"""Where GitHub's Markdown would see the link in a bare address."""

_PLAIN_CODE = re.compile(r"[\w./:+,=@* -]*")


def visible(text: str) -> str:
    r"""Return ``text`` with an escape for every character that would steer a terminal instead of being seen.

    >>> visible("\x1b[2J\u202e naïve\n")
    '\\x1b[2J\\u202e naïve\n'
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def one_line(text: str) -> str:
    r"""Return ``visible`` text with escapes for newlines and tabs too.

    >>> one_line("a\nb\t")
    'a\\nb\\t'
    """
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def escape_markdown(text: str) -> str:
    r"""Return ``text`` on one line so that Markdown shows it as it is, also inside a table, and links nothing.

    >>> escape_markdown("a|b <i> *c* [d](javascript:x)")
    'a\\|b &lt;i&gt; \\*c\\* \\[d\\](javascript:x)'
    """
    text = _WEB.sub("\u200b", visible(text))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = " ".join(text.replace("\t", " ").split("\n"))
    return "".join(f"\\{character}" if character in "\\`*_[]|#~$" else character for character in text)


def code_markdown(text: str) -> str:
    r"""Return ``text`` on one line as code in Markdown, also inside a table.

    >>> code_markdown("runs/a_b"), code_markdown("a`|b")
    ('`runs/a_b`', '<code>a\\`\\|b</code>')
    """
    if text.strip() and _PLAIN_CODE.fullmatch(text):
        return f"`{text}`"
    return f"<code>{escape_markdown(one_line(text))}</code>"


def readable(text: str, limit: int = 200) -> str:
    r"""Return the first ``limit`` characters of ``text`` on one line.

    >>> readable("a\x1b[2J\n"), readable("abcdef", 3)
    ('a\\x1b[2J\\n', 'abc…')
    """
    shown = one_line(text[:limit])
    return shown if len(text) <= limit else f"{shown}…"
