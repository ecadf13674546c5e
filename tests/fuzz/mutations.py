"""Damage to bytes, and values that no reader expects."""

import copy
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

ODD_TEXT = (
    "",
    " ",
    "\x00",
    "\x1b[2J",
    "\u202e",
    "\ud800",
    "\ufeff",
    "\u2028",
    "\x85",
    "é",
    "𝔘",
    "..",
    "~nobody/x",
    "a/../b",
    "null",
    "nan",
    "1e999",
    "=",
    "<<",
    "x" * 5_000,
    "<|im_start|>",
    "{}",
    "%s",
)
ODD_NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"))


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


_PLAIN = (*ODD_TEXT, *ODD_NUMBERS, None, True, False)
ODD_VALUES: tuple[Any, ...] = (
    *_PLAIN,
    *([value] for value in _PLAIN),
    *({"a": value} for value in _PLAIN),
    *({text: 1} for text in ODD_TEXT),
    [],
    {},
    [[], {}, None, "a", 1],
    {"role": "user", "content": ["x"]},
    *(_nested(depth) for depth in (2, 45, 60, 300)),
)
"""Values of JSON, mostly of a wrong kind."""


_ANY = st.integers(0, 2**20)
_CHANGES = st.tuples(_ANY, st.lists(st.tuples(_ANY, _ANY, st.integers(0, 4)), min_size=1, max_size=3))


def changed(originals: Sequence[Any], replacements: Sequence[Any] = ODD_VALUES) -> st.SearchStrategy[Any]:
    """Return one of ``originals`` (JSON values) with one to three of its parts replaced, removed or added."""
    return _CHANGES.map(lambda changes: _changed(originals[changes[0] % len(originals)], replacements, changes[1]))


def _changed(original: Any, replacements: Sequence[Any], changes: Sequence[tuple[int, int, int]]) -> Any:
    value = copy.deepcopy(original)
    for place, which, kind in changes:
        places = _places(value)
        parent, key = places[place % len(places)]
        new = copy.deepcopy(replacements[which % len(replacements)])
        if parent is None:
            value = new if kind == 0 else value
        elif kind >= 2:
            parent[key] = new
        elif isinstance(parent, list):
            parent.insert(key, new)
        elif kind == 1:
            parent[ODD_TEXT[place % len(ODD_TEXT)]] = new
        else:
            del parent[key]
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = [(None, None)]
    todo = [value]
    while todo:
        node = todo.pop()
        if isinstance(node, dict | list):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            found += [(node, key) for key in keys]
            todo += [node[key] for key in keys]
    return found


_EDITS = st.tuples(_ANY, st.lists(st.tuples(st.integers(0, 14), _ANY, _ANY), min_size=1, max_size=6))


def damaged(originals: Sequence[bytes], tokens: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Return one of ``originals`` with bytes flipped, overwritten, inserted, removed, moved or cut off.

    Half of the places are in the last quarter, where Parquet keeps its footer.
    """
    return _EDITS.map(lambda edits: _damaged(originals[edits[0] % len(originals)], tokens, edits[1]))


def _damaged(original: bytes, tokens: Sequence[bytes], edits: Sequence[tuple[int, int, int]]) -> bytes:
    data = bytearray(original)
    for kind, place, which in edits:
        if len(data) < 2:
            break
        quarter = len(data) // 4
        at = place % len(data) if place % 2 else len(data) - 1 - (place // 2) % (quarter + 1)
        token = tokens[which % len(tokens)]
        length = (1, 2, 8, 64, 512)[which % 5]
        if kind < 3:
            data[at] ^= 1 << which % 8
        elif kind < 6:
            data[at] = which % 256
        elif kind < 8:
            data[at:at] = token
        elif kind < 10:
            data[at : at + len(token)] = token
        elif kind < 12:
            del data[at : at + length]
        elif kind < 14:
            start = which % len(data)
            data[at:at] = data[start : start + length]
        else:
            del data[at:]
    return bytes(data)
