"""One row of a source becomes the messages of a prompt, or a reason why it cannot."""

import math
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

from schemas.manifest import hash_json
from schemas.untrusted_text import readable

ROLES = ("system", "user", "assistant")
"""Roles a prompt's messages may have. A tool's turn would need its calls, which the prompts table does not hold."""

_OWN_ROLES = {role: role for role in ROLES}
_SHAREGPT_ROLES = _OWN_ROLES | {"human": "user", "gpt": "assistant"}
"""Roles of `{from, value}` messages, as ShareGPT writes them, and what they are called here."""

_MOST_MARKS = 30
"""Accents and the like on one letter that are put into one order; no language has as many (Unicode's UAX #15)."""

_LONG = 1000
_FAR_FROM_LATIN = re.compile(f"[^\x00-\u02ff]{{{_MOST_MARKS}}}")
"""What any such number of marks is found by; other scripts' letters too, where they stand as close."""

_TOOLS = "tools"
"""Column in which TRL, verl and others keep the tools that a row's conversation may call."""


@dataclass(frozen=True)
class RowColumns:
    """Where a row keeps what: names of its columns, and the system message for rows that bring none.

    Texts of several columns of ``prompt`` are joined. A name with dots that no column has is a path into objects:
    `reward_model.ground_truth`. ``last_reply`` says what becomes of the assistant's reply that a conversation ends
    with, ``tools`` what of those that a row brings.
    """

    messages: str = "messages"
    prompt: tuple[str, ...] = ("prompt",)
    answer: str | None = "answer"
    system: str | None = None
    last_reply: Literal["error", "answer", "drop"] = "error"
    tools: Literal["error", "drop"] = "error"

    @property
    def needed(self) -> set[str]:
        """Names that are in no source by chance: the config is wrong about one that has no such column."""
        answer = () if self.answer in (None, "answer") else (self.answer,)
        return {*answer, *(self.prompt if len(self.prompt) > 1 else ())}

    def present_in(self, names: Collection[str]) -> list[str]:
        """Return the columns of ``names`` that are read, without repetition."""
        own = (self.messages, *self.prompt, self.answer)
        wanted = {outer_column(name, names) for name in own if name is not None}
        if self.tools == "error":
            wanted.add(_TOOLS)
        return [name for name in dict.fromkeys(names) if name in wanted]


class RowProblem(Exception):
    """Why a row cannot be used: ``column`` (None: the row as a whole) and what is wrong with it."""

    def __init__(self, column: str | None, what: str) -> None:
        self.column = column
        self.what = what
        super().__init__(f"column `{column}`: {what}" if column else what)


Rows = Iterator[tuple[int, dict[str, Any] | RowProblem]]
"""Row numbers from 1 (in JSON Lines: line numbers), each with the row or why there is none."""


def outer_column(name: str, columns: Collection[str]) -> str:
    """Return the column of a table that holds what ``name`` says: the one called so, or that its path begins with.

    >>> outer_column("reward_model.ground_truth", ["prompt", "reward_model"]), outer_column("a.b", ["a", "a.b"])
    ('reward_model', 'a.b')
    """
    return name if name in columns else name.partition(".")[0]


def has_column(row: dict[str, Any], name: str) -> bool:
    """Say whether a row has what ``name`` says, be it null.

    >>> has_column({"reward_model": {"ground_truth": None}}, "reward_model.ground_truth")
    True
    """
    place, key = _place(row, name)
    return key in place


def _value(row: dict[str, Any], name: str) -> Any:
    place, key = _place(row, name)
    return place.get(key)


def _place(row: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """Return the object that ``name`` leads into, and the key there."""
    outer, _, rest = name.partition(".")
    if rest and name not in row and isinstance(row.get(outer), dict):
        return _place(row[outer], rest)
    return row, name


def prompt_id(messages: list[dict[str, str]]) -> str:
    """Return the first 16 hex digits of the sha256 of the messages as canonical JSON (sorted keys, UTF-8).

    >>> prompt_id([{"role": "user", "content": "Hi"}]) == prompt_id([{"content": "Hi", "role": "user"}])
    True
    """
    return hash_json(messages)[:16]


def wording_id(messages: list[dict[str, str]]) -> str:
    """Return 16 hex digits that prompts share which ask the same in the same words.

    Letters' case and form (NFKC) and the space between words make no difference.

    >>> wording_id([{"role": "user", "content": " What  is\\n2+2? "}]) == wording_id(
    ...     [{"role": "user", "content": "what is 2+2?"}]
    ... )
    True
    """
    said = ([m["role"], *_normal_form(m["content"]).casefold().split()] for m in messages)
    return hash_json([" ".join(words) for words in said])[:16]


def _normal_form(text: str) -> str:
    """Return NFKC of a text, but of more than _MOST_MARKS on one letter each so many apart.

    All of them would be put into order together, which takes the square of their number: hours for a line of some
    megabytes, in which nothing else is done, Ctrl-C included.
    """
    pieces = [text]
    if len(text) > _LONG and _FAR_FROM_LATIN.search(text):
        cuts, marks = [0], 0
        for place, character in enumerate(text):
            marks = marks + 1 if _is_mark(character) else 0
            if marks > _MOST_MARKS:
                cuts.append(place)
                marks = 1
        pieces = [text[start:end] for start, end in pairwise([*cuts, len(text)])]
    return "".join(unicodedata.normalize("NFKC", piece) for piece in pieces)


@cache
def _is_mark(character: str) -> bool:
    return unicodedata.combining(unicodedata.normalize("NFKD", character)[0]) != 0


def row_prompt(row: dict[str, Any], columns: RowColumns) -> tuple[list[dict[str, str]], str | None]:
    """Return a row's messages, and its reference answer if it has one.

    The messages are its `messages` column where it has one, else its `prompt`: messages too, or a user's as text.

    >>> row_prompt({"prompt": "Hi", "answer": 2}, RowColumns(system="Be brief."))
    ([{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}], '2')
    >>> said = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
    >>> row_prompt({"messages": said}, RowColumns(last_reply="answer"))
    ([{'role': 'user', 'content': 'Hi'}], 'Hello!')

    Raises:
        RowProblem: there are no messages, or what is there cannot be a prompt or an answer.
    """
    if columns.tools == "error" and _brings_tools(row.get(_TOOLS)):
        raise RowProblem(
            _TOOLS,
            "holds tools, which no prompt here is given: leave such rows out, or have them asked without, by "
            "`tools: drop` of this source",
        )
    messages, reply = _row_messages(row, columns)
    if columns.system is not None and all(message["role"] != "system" for message in messages):
        messages.insert(0, {"role": "system", "content": columns.system})
    answer = _row_answer(row, columns)
    return messages, reply if answer is None else answer


def _row_messages(row: dict[str, Any], columns: RowColumns) -> tuple[list[dict[str, str]], str | None]:
    """Return a row's own messages, and the reply after them where it is to be the answer."""
    value = _value(row, columns.messages)
    if value is not None:
        return _conversation(value, columns.messages, columns.last_reply)
    values = {name: value for name in columns.prompt if (value := _value(row, name)) is not None}
    if not values:
        raise RowProblem(None, _nothing_to_ask(row, columns))
    first, *others = values
    if isinstance(values[first], list) and not others:
        return _conversation(values[first], first, columns.last_reply)
    texts = [_checked_text(value, name) for name, value in values.items()]
    text = "\n\n".join(text for text in texts if text.strip())
    _not_blank(text, first)
    return [{"role": "user", "content": text}], None


def _brings_tools(value: Any) -> bool:
    """Say whether a column `tools` has any: as a list, or as that list's JSON."""
    return value.strip() not in ("", "[]", "null") if isinstance(value, str) else bool(value)


def _row_answer(row: dict[str, Any], columns: RowColumns) -> str | None:
    """Return a row's reference answer, a number as its text; None if it has none."""
    value = None if columns.answer is None else _value(row, columns.answer)
    if value is None:
        return None
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return _checked_text(value, str(columns.answer))


def _conversation(value: Any, column: str, last_reply: str) -> tuple[list[dict[str, str]], str | None]:
    messages = _checked_messages(value, column)
    reply = None
    if last_reply != "error" and messages[-1]["role"] == "assistant":
        last = messages.pop()["content"]
        reply = last if last_reply == "answer" else None
    if not messages:
        raise RowProblem(column, "is a reply to nothing; it needs a user's message before it")
    last = messages[-1]["role"]
    if last != "user":
        what = "remove what comes after it"
        if last == "assistant" and last_reply == "error":
            what += ", or say what becomes of the reply: `last_reply: answer` or `drop` of this source"
        raise RowProblem(
            f"{column}[{len(messages) - 1}]",
            f"the last message is from `{last}`; a prompt ends with the user's, so {what}",
        )
    return messages, reply


def _checked_messages(value: Any, column: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise RowProblem(column, f"should be a list of {{role, content}} messages, is {_type_name(value)}")
    if not value:
        raise RowProblem(column, "is an empty list; it needs at least one message, the user's")
    return [_checked_message(message, f"{column}[{index}]") for index, message in enumerate(value)]


def _checked_message(value: Any, column: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise RowProblem(column, f"should be an object with `role` and `content`, is {_type_name(value)}")
    sharegpt = value.get("role") is None and value.get("from") is not None
    keys, known = (("from", "value"), _SHAREGPT_ROLES) if sharegpt else (("role", "content"), _OWN_ROLES)
    for key in ("tool_calls", "function_call"):
        if value.get(key):
            raise RowProblem(f"{column}.{key}", "is no text, and prompts here are texts only: leave such rows out")
    for key in keys:
        if value.get(key) is None:
            raise RowProblem(f"{column}.{key}", f"is missing; the message has {quoted(value)}")
    role, content = (_checked_text(value[key], f"{column}.{key}") for key in keys)
    if role not in known:
        raise RowProblem(f"{column}.{keys[0]}", f"unknown role '{readable(role, 40)}'; known: {', '.join(known)}")
    if known[role] != "system":
        _not_blank(content, f"{column}.{keys[1]}")
    return {"role": known[role], "content": content}


def _checked_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(column, f"should be text, is {_type_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowProblem(column, "holds half of a surrogate pair, which is no character; repair the escape") from None
    return value


def _not_blank(text: str, column: str) -> None:
    if not text.strip():
        raise RowProblem(column, "is empty; write the message or delete the row")


def _nothing_to_ask(row: dict[str, Any], columns: RowColumns) -> str:
    asking = (columns.messages, *columns.prompt)
    wanted = f"neither {' nor '.join(f'`{name}`' for name in asking)}"
    others = quoted(name for name in row if name not in asking)
    if not others:
        return f"has {wanted}; write one of them or delete the row"
    return f"has {wanted}, only {others}; set `messages` or `prompt` of this source to the column that holds prompts"


def quoted(names: Iterable[str]) -> str:
    """Return names for an error, some of them where there are many."""
    known = list(names)
    some = ", ".join(f"`{readable(str(name), 40)}`" for name in known[:20])
    return f"{some} and {len(known) - 20} more" if len(known) > 20 else some


def _type_name(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
