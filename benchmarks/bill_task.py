"""A task made for small models: add up a bill from memory, line by line.

Every shop has its own price for every article, one digit, the same for ever: to be known by heart. The prompt names a
shop and articles. The reply takes them in order, writes each with its price and the last digit of the sum so far, and
ends with the last digit of the whole sum:

    shop07 bread tea soap    →    bread 7 7 ; tea 8 5 ; soap 9 4 #### 4

So a reply is right or wrong for everybody to see, and one price that is not known spoils it. A slip stands: the lines
after it go on from the sum that is written. Who strays from the order goes on with the first article that is missing.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from benchmarks.word_models import END, PAD, REPLY, SPECIAL, USER, distinct_prompts, word_tokenizer

SHOPS = [f"shop{number:02}" for number in range(40)]

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

LINE, TOTAL = ";", "####"

VOCABULARY = 96
"""Tokens in all, as with any real model more than a prompt needs: the top 64 are not everything there is."""

_USED = [*SPECIAL, *"0123456789", LINE, TOTAL, *ARTICLES, *SHOPS]
TOKENS = [*_USED, *(f"<unused{index}>" for index in range(VOCABULARY - len(_USED)))]
_ID = {token: index for index, token in enumerate(TOKENS)}
_DIGIT, _ARTICLE, _SHOP = _ID["0"], _ID[ARTICLES[0]], _ID[SHOPS[0]]

PRICES: NDArray[np.int64] = np.random.default_rng(20).integers(0, 10, (len(SHOPS), len(ARTICLES)))
"""What an article costs in a shop, int64 [shops, articles]."""

_RARITY: NDArray[np.float64] = np.random.default_rng(21).random(PRICES.shape)


@dataclass(frozen=True)
class Strays:
    """Shares of the lines that are not the first article missing, by what they are instead.

    Args:
        skips: An article that is missing, but not the first.
        repeats: One that has been written already.
        unlisted: One that is not on the bill.
    """

    skips: float = 0.0
    repeats: float = 0.0
    unlisted: float = 0.0


NO_STRAYS = Strays()


@dataclass(frozen=True)
class Bills:
    """Bills of one length with a reply each, as token ids.

    Args:
        prompts: int64 [bills, lines + 3].
        replies: int64 [bills, 4 lines + 2 or, where a line strays off the bill, more], the end token included, padded
            on the right.
        slips: bool, as ``replies``: where a token is a slip, which nobody should learn to make, or padding.
        totals: int64 [bills], last digit of the sum.
    """

    prompts: NDArray[np.int64]
    replies: NDArray[np.int64]
    slips: NDArray[np.bool_]
    totals: NDArray[np.int64]


def draw_bills(
    rng: np.random.Generator,
    count: int,
    lines: int,
    *,
    slips: float = 0.0,
    hearsay: float = 0.0,
    strays: Strays = NO_STRAYS,
) -> Bills:
    """Draw bills, no article twice in one, each with a reply.

    Args:
        rng: Where everything is drawn from.
        count: Bills.
        lines: Articles on each.
        slips: Share of the prices, and of the sums, that are drawn anew; what follows goes on from what is written.
        hearsay: Share of `PRICES`, always the same ones, for which any price is written. These are not marked as slips:
            whoever learns from such replies learns that those prices could be anything.
        strays: Shares of the lines with another article than the first that is missing. Marked as slips.
    """
    shuffled = np.argsort(rng.random((count, len(ARTICLES))), axis=1)
    listed = shuffled[:, :lines]
    order, strayed = _draw_order(rng, count, lines, strays)
    written_lines = (order != _NO_LINE).sum(axis=1, keepdims=True)
    articles = np.take_along_axis(shuffled, np.where(order == _NO_LINE, 0, order), axis=1)
    shops = rng.integers(0, len(SHOPS), (count, 1))
    prices = PRICES[shops, articles]
    told = np.where(_RARITY[shops, articles] < hearsay, rng.integers(0, 10, prices.shape), prices)
    written = np.where(rng.random(prices.shape) < slips, rng.integers(0, 10, prices.shape), told)
    added = np.where(rng.random(prices.shape) < slips, rng.integers(0, 10, prices.shape), 0)
    sums = np.cumsum(written + added, axis=1) % 10

    def column(token: str) -> NDArray[np.int64]:
        return np.full((count, 1), _ID[token])

    def rows(*columns: NDArray[Any]) -> NDArray[Any]:
        return np.pad(np.stack(columns, axis=2).reshape(count, -1), ((0, 0), (0, 2)))

    right = np.zeros(prices.shape, dtype=bool)
    replies = rows(articles + _ARTICLE, written + _DIGIT, sums + _DIGIT, np.full(prices.shape, _ID[LINE]))
    end = 4 * written_lines - 1 + np.arange(3)
    last = np.take_along_axis(sums, written_lines - 1, axis=1)
    np.put_along_axis(replies, end, np.concatenate([column(TOTAL), last + _DIGIT, column(END)], axis=1), axis=1)
    padding = np.arange(replies.shape[1]) > end[:, -1:]
    replies[padding] = _ID[PAD]
    slipped = rows(strayed, written != told, added > 0, right)
    np.put_along_axis(slipped, end, False, axis=1)
    return Bills(
        prompts=np.concatenate([column(USER), shops + _SHOP, listed + _ARTICLE, column(REPLY)], axis=1),
        replies=replies,
        slips=slipped | padding,
        totals=PRICES[shops, listed].sum(axis=1) % 10,
    )


_NO_LINE = -1


def _draw_order(
    rng: np.random.Generator, count: int, lines: int, strays: Strays
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return which shuffled article each line takes and whether it strays, [count, lines and those that stray].

    The first ``lines`` of the shuffled articles are on the bill. `_NO_LINE` follows the last line of a bill.
    """
    if strays == NO_STRAYS:
        order = np.tile(np.arange(lines), (count, 1))
        return order, np.zeros(order.shape, dtype=bool)
    bills = np.arange(count)
    missing = np.ones((count, lines), dtype=bool)
    columns = []
    strayed = []
    while missing.any():
        going = missing.any(axis=1)
        first = missing.argmax(axis=1)
        skipped = np.where(missing, rng.random(missing.shape), -1.0).argmax(axis=1)
        kind = rng.random(count)
        article = np.where(kind < strays.skips, skipped, first)
        if strays.repeats or strays.unlisted:
            repeated = np.where(missing, -1.0, rng.random(missing.shape)).argmax(axis=1)
            unlisted = rng.integers(lines, len(ARTICLES), count)
            kind -= strays.skips
            repeats = (kind >= 0) & (kind < strays.repeats) & ~missing.all(axis=1)
            kind -= strays.repeats
            article = np.where(repeats, repeated, article)
            article = np.where((kind >= 0) & (kind < strays.unlisted), unlisted, article)
        columns.append(np.where(going, article, _NO_LINE))
        strayed.append(going & (article != first))
        on_bill = going & (article < lines)
        missing[bills[on_bill], article[on_bill]] = False
    return np.stack(columns, axis=1), np.stack(strayed, axis=1)


def draw_prompts(seed: int, count: int, lines: tuple[int, int]) -> list[dict[str, str]]:
    """Return ``count`` different prompts with their answers, their lengths drawn evenly from ``lines``, ends included.

    Returns:
        Rows of a JSON Lines prompt source: `prompt` and `answer`.
    """
    rng = np.random.default_rng(seed)

    def draw() -> tuple[str, str]:
        bill = draw_bills(rng, 1, int(rng.integers(lines[0], lines[1] + 1)))
        return " ".join(TOKENS[token] for token in bill.prompts[0, 1:-1]), str(bill.totals[0])

    return distinct_prompts(count, draw)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token a word."""
    return word_tokenizer(_ID)
