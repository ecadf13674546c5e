"""JSON Lines: one object a line, in a file that may be compressed by gzip."""

import gzip
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import IO, Any, cast

from schemas.errors import PromptError
from schemas.untrusted_text import readable
from tasks.prompts.messages import RowProblem, Rows, quoted

_LONGEST_LINE = 1 << 26
"""Bytes of one line; beyond them it is no prompt, and need not fit into memory."""


def count_lines(path: Path) -> int:
    """Count lines, the last one also without its newline.

    Raises:
        PromptError: the file is compressed, and damaged.
    """
    newlines, last = 0, b"\n"
    try:
        with _opened(path) as file:
            while chunk := file.read(1 << 20):
                newlines += chunk.count(b"\n")
                last = chunk[-1:]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PromptError(f"{path}: is damaged: {readable(str(error))}; write it again") from None
    return newlines + (last != b"\n")


def _opened(path: Path) -> IO[bytes]:
    """Open a file to read what it holds, be it compressed by gzip."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if compressed else path.open("rb")


def json_lines(path: Path) -> Rows:
    """Yield the objects of a file's lines, blank ones left out."""
    with _opened(path) as file:
        lines = iter(lambda: file.readline(_LONGEST_LINE + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > _LONGEST_LINE:
                yield number, RowProblem(None, f"is longer than {_LONGEST_LINE} bytes; write one JSON object a line")
                return
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, _parse_line(line.rstrip(b"\r\n"))


def _parse_line(line: bytes) -> dict[str, Any] | RowProblem:
    advice = "write one JSON object a line"
    if line.lstrip().startswith(b"["):
        advice += ", or read a list of them by `type: dataset`"
    try:
        row = json.loads(line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return RowProblem(
            None, f"byte {error.start + 1} (0x{line[error.start]:02x}) is not valid UTF-8; save the file as UTF-8"
        )
    except json.JSONDecodeError as error:
        return RowProblem(
            None,
            f"is not JSON ({error.msg.removesuffix(' at')} at character {error.colno}); {advice}",
        )
    except RowProblem as problem:
        return problem
    except (ValueError, RecursionError) as error:
        return RowProblem(None, f"is not JSON that can be read ({error}); write one JSON object a line")
    if not isinstance(row, dict):
        return RowProblem(None, f"is not a JSON object but {line[:40].decode(errors='replace').strip()!r}; {advice}")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; one with a key twice would lose a value without a word."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise RowProblem(None, f"has {quoted([twice])} more than once; keep one of them")
    return found
