"""Control tokens are the chat template's to write: their strings in a prompt or an answer are encoded as plain text.

All but those that a model writes itself (`<think>`): in what an assistant says they are the tokens they would be.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizerBase

TokenIds = NDArray[np.int32]

_BRACKETED = re.compile(r"<.+>|\[.+\]", re.DOTALL)
"""What a control token looks like where its tokenizer does not say that it is one."""

_REPLY_MARK = re.compile(r"</?(?:think|answer|tool_call)>")
"""A token that stands within replies, not around them. As plain text it would teach a student to spell it."""

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
"""A byte that no other token of a vocabulary holds: content, not a command."""

_PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE), range(0xE000, 0xF900))
"""Private-use characters, those that vocabularies hold last."""


@dataclass(frozen=True)
class ControlTokens:
    """The tokens that a tokenizer would read out of text as commands.

    These are the added tokens it calls special, and others written `<...>` or `[...]`.

    Args:
        ids: Id of each by its string.
        pattern: Finds them as the tokenizer does: from the left, the longest first.
        found_in: Says whether the tokenizer would find one in a text.
    """

    ids: Mapping[str, int]
    pattern: re.Pattern[str]
    found_in: Callable[[str], bool]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, *, in_reply: bool = False) -> "ControlTokens":
        """Return those of ``tokenizer``; ``in_reply``: without those that a model writes in its replies."""
        added: dict[int, AddedToken] = tokenizer.added_tokens_decoder
        tokens = {
            index: token
            for index, token in added.items()
            if (token.special or _BRACKETED.fullmatch(token.content))
            and not _BYTE.fullmatch(token.content)
            and not (in_reply and _REPLY_MARK.fullmatch(token.content))
        }
        pattern = _any_of(token.content for token in tokens.values())
        backend = getattr(tokenizer, "backend_tokenizer", None)
        normalizer = None if backend is None else backend.normalizer
        normalized = [token.content for token in tokens.values() if token.normalized]

        def found_in(text: str) -> bool:
            return pattern.search(text) is not None

        if normalizer is None or not normalized:
            return cls({token.content: i for i, token in tokens.items()}, pattern, found_in)
        # These are found in the text as the tokenizer normalises it, where `＜s＞` may have become `<s>`.
        behind = _any_of(normalizer.normalize_str(content) for content in normalized)

        def found_behind(text: str) -> bool:
            return found_in(text) or behind.search(normalizer.normalize_str(text)) is not None

        return cls({token.content: i for i, token in tokens.items()}, pattern, found_behind)


def encode_replies(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[TokenIds]:
    """Return replies as token ids (int32), without control tokens: neither added nor read out of the text.

    What a model writes itself (`<think>`, `</think>`, ...) is the token it would be, where the tokenizer has one.
    """
    control = ControlTokens.of(tokenizer, in_reply=True)
    encoded = _encode(tokenizer, texts)
    rows = [index for index, text in enumerate(texts) if control.found_in(text)]
    if rows:
        hostile = [texts[index] for index in rows]
        aliases = _free_characters(len(control.ids), _alphabet(tokenizer).union(*hostile))
        for index, ids in zip(rows, _encode_aliased(tokenizer, control, aliases, hostile)):
            encoded[index] = ids
    return encoded


def encode_rendered(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    render: Callable[[list[list[dict[str, str]]]], list[str]],
) -> list[TokenIds]:
    """Return conversations as ``render`` writes them, as token ids (int32).

    Control tokens come from ``render`` only. Where a message holds the string of one, it reaches ``render`` as one
    private-use character; back in its place, it is encoded as if the tokenizer had no such token. What a model writes
    itself (`<think>`) reaches ``render`` as it is in the assistant's messages: templates look for it there, to leave
    out what was thought in earlier turns.

    Args:
        tokenizer: Whose ids.
        conversations: Messages; every value of theirs is untrusted.
        render: Writes conversations as text, control tokens included.
    """
    control, of_reply = ControlTokens.of(tokenizer), ControlTokens.of(tokenizer, in_reply=True)
    plain = [[dict(message) for message in conversation] for conversation in conversations]
    encoded = _encode(tokenizer, render(plain)) if plain else []

    def control_in(message: Mapping[str, str]) -> ControlTokens:
        return of_reply if message.get("role") == "assistant" else control

    rows = [i for i, row in enumerate(plain) if any(control_in(m).found_in(text) for m in row for text in m.values())]
    if not rows:
        return encoded
    texts = [text for index in rows for message in plain[index] for text in message.values()]
    taken = _alphabet(tokenizer).union(str(tokenizer.chat_template), *texts)
    characters = _free_characters(2 * len(control.ids), taken)
    aliases, markers = characters[: len(control.ids)], characters[len(control.ids) :]
    to_marker, to_alias = dict(zip(control.ids, markers)), dict(zip(control.ids, aliases))
    back = {ord(marker): token for token, marker in to_marker.items()}

    def masked(message: dict[str, str]) -> dict[str, str]:
        pattern = control_in(message).pattern
        return {key: _replaced(pattern, to_marker, text) for key, text in message.items()}

    rendered = render([[masked(message) for message in plain[index]] for index in rows])
    aliased = [_replaced(control.pattern, to_alias, text).translate(back) for text in rendered]
    for index, ids in zip(rows, _encode_aliased(tokenizer, control, aliases, aliased)):
        encoded[index] = ids
    return encoded


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[TokenIds]:
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return [np.asarray(ids, dtype=np.int32) for ids in rows]


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    # Without a string there is nothing to find, and the empty alternative would be found everywhere.
    return re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or "(?!)")


def _replaced(pattern: re.Pattern[str], by: Mapping[str, str], text: str) -> str:
    return pattern.sub(lambda found: by[found[0]], text)


def _free_characters(count: int, taken: Set[str]) -> str:
    candidates = (chr(code) for codes in _PRIVATE for code in codes)
    return "".join(islice((character for character in candidates if character not in taken), count))


def _encode_aliased(
    tokenizer: PreTrainedTokenizerBase, control: ControlTokens, aliases: str, texts: list[str]
) -> list[TokenIds]:
    """Encode texts in which a control token is its alias, and the string of one only text."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return _encode(_aliased_slow(tokenizer, tuple(control.ids.items()), aliases), texts)
    backend, known = _aliased_fast(tokenizer, tuple(control.ids.items()), aliases)
    return [known[encoding.ids] for encoding in backend.encode_batch(texts, add_special_tokens=False)]


@lru_cache(maxsize=4)
def _alphabet(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the characters of a tokenizer's tokens."""
    return frozenset("".join(tokenizer.get_vocab()))


@lru_cache(maxsize=4)
def _aliased_fast(
    tokenizer: PreTrainedTokenizerBase, tokens: tuple[tuple[str, int], ...], aliases: str
) -> tuple[Tokenizer, TokenIds]:
    """Return a tokenizer that knows control tokens by their aliases only, and the original's id for each of its ids."""
    values: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    alias = {token: character for (token, _), character in zip(tokens, aliases)}
    original = {token["content"]: token["id"] for token in values["added_tokens"]}
    for token in values["added_tokens"]:
        token["content"] = alias.get(token["content"], token["content"])
    _rename(values["model"], alias)
    values |= {"truncation": None, "padding": None, "post_processor": None}
    backend = Tokenizer.from_str(json.dumps(values))
    known = np.arange(max(backend.get_vocab().values()) + 1, dtype=np.int32)
    original |= {alias[token]: index for token, index in tokens}
    for index, token in backend.get_added_tokens_decoder().items():
        known[index] = original[token.content]
    return backend, known


def _rename(model: dict[str, Any], alias: Mapping[str, str]) -> None:
    """Give control tokens their aliases in a model's vocabulary too, which would otherwise find some in plain text."""
    vocab = model["vocab"]
    # A special token of one character is an ordinary letter as well, with the same id.
    alias = {token: name for token, name in alias.items() if len(token) > 1}
    if isinstance(vocab, list):  # Unigram: pieces with scores, ids by place
        model["vocab"] = [[alias.get(piece, piece), score] for piece, score in vocab]
        return
    model["vocab"] = {alias.get(token, token): index for token, index in vocab.items()}
    if model.get("unk_token") in alias:
        model["unk_token"] = alias[model["unk_token"]]
    if "merges" in model:
        pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not {a, b, a + b} & alias.keys()]


@lru_cache(maxsize=4)
def _aliased_slow(
    tokenizer: PreTrainedTokenizerBase, tokens: tuple[tuple[str, int], ...], aliases: str
) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer written in Python that knows control tokens by their aliases only, ids unchanged."""
    clone: Any = copy.deepcopy(tokenizer)
    alias = {token: character for (token, _), character in zip(tokens, aliases)}
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.content in alias:
            clone._added_tokens_decoder[index] = AddedToken(
                alias[token.content],
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=token.normalized,
                special=token.special,
            )
    clone._added_tokens_encoder = {token.content: i for i, token in clone._added_tokens_decoder.items()}
    # A stretch of text that equals a special token's string would count as the token.
    clone._special_tokens_map = dict.fromkeys(clone._special_tokens_map)
    clone._extra_special_tokens = []
    clone.tokens_trie = type(clone.tokens_trie)()
    clone._update_trie()
    result: PreTrainedTokenizerBase = clone
    return result
