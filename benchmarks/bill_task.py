"""A task made for small models: add up a bill, in any order, one line at a time.

The prompt lists articles with prices of one digit. The reply takes them one by one, in whatever order it likes, writes
each with the last digit of the sum so far, and ends with the last digit of the whole sum:

    bread 7 tea 3 soap 9    →    tea 3 3 ; soap 9 2 ; bread 7 9 #### 9

So a reply is right or wrong for everybody to see, and a teacher that knows the task is still unsure at every line: each
article left is as good as another. Slips can be made good, as in most reasoning: an article counts once, at the price
on the bill. Whoever takes one twice writes the sum as it was and goes on; whoever misreads a price adds the right one:

    bread 7 tea 3 soap 9    →    tea 3 3 ; soap 9 2 ; tea 3 2 ; bread 1 9 #### 9
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ARTICLES = [
    "apple",
    "bread",
    "butter",
    "candle",
    "cheese",
    "coffee",
    "cookie",
    "dates",
    "eggs",
    "flour",
    "grape",
    "honey",
    "jam",
    "knife",
    "lemon",
    "milk",
    "nuts",
    "olive",
    "pear",
    "rice",
    "soap",
    "tea",
    "tomato",
    "yogurt",
]

PAD, END, USER, REPLY, LINE, TOTAL = "<pad>", "<eos>", "<user>", "<reply>", ";", "####"
SPECIAL = (PAD, END, USER, REPLY)
VOCABULARY = 80
"""Tokens in all, as with any real model more than a prompt needs: the top 64 are not everything there is."""

_USED = [*SPECIAL, *"0123456789", LINE, TOTAL, *ARTICLES]
TOKENS = [*_USED, *(f"<unused{index}>" for index in range(VOCABULARY - len(_USED)))]
_ID = {token: index for index, token in enumerate(TOKENS)}
_DIGIT, _ARTICLE = _ID["0"], _ID[ARTICLES[0]]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ ('<reply> ' if message['role'] == 'assistant' else '<user> ') + message['content'] + ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<reply>' }}{% endif %}"
)


@dataclass(frozen=True)
class Bills:
    """Bills of one length with a reply each, as token ids.

    Args:
        prompts: int64 [bills, 2 lines + 2].
        replies: int64 [bills, 4 (lines + repeats) + 2], the end token included.
        slips: bool, as ``replies``: where a token is a slip, which nobody should learn to make.
        totals: int64 [bills], last digit of the sum.
    """

    prompts: NDArray[np.int64]
    replies: NDArray[np.int64]
    slips: NDArray[np.bool_]
    totals: NDArray[np.int64]


def draw_bills(rng: np.random.Generator, count: int, lines: int, *, repeats: int = 0, misread: float = 0.0) -> Bills:
    """Draw bills, no article twice in one, each with a reply in a random order.

    Args:
        rng: Where everything is drawn from.
        count: Bills.
        lines: Articles on each.
        repeats: Articles taken once more, in each reply.
        misread: Share of the lines of a reply whose price is drawn anew.
    """
    articles = np.argsort(rng.random((count, len(ARTICLES))), axis=1)[:, :lines] + _ARTICLE
    prices = rng.integers(0, 10, (count, lines))
    order = np.argsort(rng.random((count, lines)), axis=1)
    for _ in range(repeats):
        order = _repeat_one(rng, order)
    again = np.zeros(order.shape, dtype=bool)
    for line in range(1, order.shape[1]):
        again[:, line] = (order[:, :line] == order[:, line : line + 1]).any(axis=1)
    taken, paid = np.take_along_axis(articles, order, 1), np.take_along_axis(prices, order, 1)
    sums = np.cumsum(np.where(again, 0, paid), axis=1) % 10
    shown = np.where(rng.random(paid.shape) < misread, rng.integers(0, 10, paid.shape), paid)

    def column(token: str) -> NDArray[np.int64]:
        return np.full((count, 1), _ID[token])

    def rows(*columns: NDArray[Any]) -> NDArray[Any]:
        return np.stack(columns, axis=2).reshape(count, -1)

    right, ends = np.zeros(order.shape, dtype=bool), np.full(order.shape, _ID[LINE])
    return Bills(
        prompts=np.concatenate([column(USER), rows(articles, prices + _DIGIT), column(REPLY)], axis=1),
        replies=np.concatenate(
            [
                rows(taken, shown + _DIGIT, sums + _DIGIT, ends)[:, :-1],
                column(TOTAL),
                sums[:, -1:] + _DIGIT,
                column(END),
            ],
            axis=1,
        ),
        slips=np.pad(rows(again, shown != paid, right, right), ((0, 0), (0, 2))),
        totals=sums[:, -1],
    )


def _repeat_one(rng: np.random.Generator, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ``order`` [bills, lines] with one of each row's entries put in once more, somewhere behind itself."""
    count, lines = order.shape
    place = rng.integers(1, lines + 1, (count, 1))
    source = (rng.random((count, 1)) * place).astype(np.int64)
    at = np.arange(lines + 1)[None, :]
    return np.take_along_axis(order, np.where(at < place, at, np.where(at == place, source, at - 1)), axis=1)


def draw_prompts(seed: int, count: int, lines: tuple[int, int]) -> list[dict[str, str]]:
    """Return ``count`` different prompts with their answers, their lengths drawn evenly from ``lines``, ends included.

    Returns:
        Rows of a JSON Lines prompt source: `prompt` and `answer`.
    """
    rng = np.random.default_rng(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        bill = draw_bills(rng, 1, int(rng.integers(lines[0], lines[1] + 1)))
        rows[" ".join(TOKENS[token] for token in bill.prompts[0, 1:-1])] = str(bill.totals[0])
    return [{"prompt": prompt, "answer": answer} for prompt, answer in rows.items()]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token a word."""
    tokenizer = Tokenizer(models.WordLevel(vocab=_ID, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, additional_special_tokens=[USER, REPLY]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
