"""A task made for small models: find by trying what costs exactly so much, and go on after a wrong try.

Shops and prices are those of `benchmarks.bill_task`. The prompt names a shop, a price and two to five articles, of
which one has that price. The reply tries articles, writes what each costs and whether that is it, and ends with the
article found, or gives up:

    shop07 4 bread tea soap    →    bread 7 no ; soap 4 yes #### soap

To say what an article costs is easy; to name the right one at once is not. Who can only guess must go on after a wrong
try, and who is always right at once never shows how: no reply of a good teacher holds what a student needs after its
own mistakes. (`bill_task` is the other way round: every reply of its teacher shows what its student lacks.)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from benchmarks.bill_task import ARTICLES, LINE, PRICES, SHOPS, TOTAL, VOCABULARY
from benchmarks.word_models import END, PAD, REPLY, SPECIAL, USER, distinct_prompts, word_tokenizer
from schemas.tables import IGNORE_LABEL

RIGHT, WRONG, NOTHING = "yes", "no", "none"

_USED = [*SPECIAL, *"0123456789", LINE, TOTAL, RIGHT, WRONG, NOTHING, *ARTICLES, *SHOPS]
TOKENS = [*_USED, *(f"<unused{index}>" for index in range(VOCABULARY - len(_USED)))]
_ID = {token: index for index, token in enumerate(TOKENS)}
_DIGIT, _ARTICLE, _SHOP = _ID["0"], _ID[ARTICLES[0]], _ID[SHOPS[0]]


@dataclass(frozen=True)
class Habits:
    """How somebody searches, and what of it is learned from.

    Args:
        misses: Share of the tries that take any article not yet tried; the others take the right one.
        goes_on: Share of the wrong tries after which another follows, where an article is left.
        misses_learned: Share of the wrong tries whose article is learned; what follows is learned in any case.
        going_on_learned: Share of the decisions to go on that are learned; how to go on is learned in any case.
        giving_up_learned: Share of the decisions to give up that are learned.
    """

    misses: float
    goes_on: float
    misses_learned: float = 1.0
    going_on_learned: float = 1.0
    giving_up_learned: float = 1.0


@dataclass(frozen=True)
class Searches:
    """Prompts of one length with a reply each, as token ids.

    Args:
        prompts: int64 [searches, articles + 4].
        replies: int64 [searches, tokens of the longest], the end token included, padded on the right.
        labels: int64, as ``replies``; `IGNORE_LABEL` at padding and where a token is not learned.
        answers: int64 [searches], token of the right article.
    """

    prompts: NDArray[np.int64]
    replies: NDArray[np.int64]
    labels: NDArray[np.int64]
    answers: NDArray[np.int64]


def draw_searches(rng: np.random.Generator, count: int, articles: int, habits: Habits) -> Searches:
    """Draw searches among ``articles`` articles of different prices than the right one's, each with a reply."""
    every = np.arange(count)
    shops = rng.integers(0, len(SHOPS), count)
    prices = PRICES[shops]
    answers = rng.integers(0, len(ARTICLES), count)
    asked = prices[every, answers]
    order = rng.random(prices.shape)
    order[prices == asked[:, None]] = 2
    order[every, answers] = -1
    shuffled = np.argsort(rng.random((count, articles)), axis=1)
    listed = np.take_along_axis(np.argsort(order, axis=1)[:, :articles], shuffled, axis=1)
    right = (shuffled == 0).argmax(axis=1)

    replies = np.full((count, 4 * articles + 4), _ID[PAD])
    labels = np.full(replies.shape, IGNORE_LABEL)
    lengths = np.zeros(count, dtype=np.int64)

    def write(rows: NDArray[np.int64], tokens: NDArray[np.int64] | int, learned: NDArray[np.bool_] | bool) -> None:
        replies[rows, lengths[rows]] = tokens
        labels[rows, lengths[rows]] = np.where(learned, tokens, IGNORE_LABEL)
        lengths[rows] += 1

    tried = np.zeros((count, articles), dtype=bool)
    searching = every
    while len(searching):
        untried = np.where(tried, -1.0, rng.random(tried.shape)).argmax(axis=1)
        picks = untried if habits.misses == 1 else np.where(rng.random(count) < habits.misses, untried, right)
        picks = picks[searching]
        found = picks == right[searching]
        article = listed[searching, picks]
        write(searching, article + _ARTICLE, found | (rng.random(len(searching)) < habits.misses_learned))
        write(searching, prices[searching, article] + _DIGIT, True)
        write(searching, np.where(found, _ID[RIGHT], _ID[WRONG]), True)
        tried[searching, picks] = True
        left = ~tried[searching].all(axis=1)
        going_on = ~found & left & (rng.random(len(searching)) < habits.goes_on)
        on = searching[going_on]
        write(on, _ID[LINE], habits.going_on_learned == 1 or rng.random(len(on)) < habits.going_on_learned)
        done, found = searching[~going_on], found[~going_on]
        write(done, _ID[TOTAL], found | (rng.random(len(done)) < habits.giving_up_learned))
        write(done, np.where(found, answers[done] + _ARTICLE, _ID[NOTHING]), True)
        write(done, _ID[END], True)
        searching = on
    width = int(lengths.max())

    def column(token: str) -> NDArray[np.int64]:
        return np.full((count, 1), _ID[token])

    prompt = (column(USER), shops[:, None] + _SHOP, asked[:, None] + _DIGIT, listed + _ARTICLE, column(REPLY))
    return Searches(np.concatenate(prompt, axis=1), replies[:, :width], labels[:, :width], answers + _ARTICLE)


FAULTLESS = Habits(misses=0.0, goes_on=0.0)


def draw_prompts(seed: int, count: int, articles: tuple[int, int]) -> list[dict[str, str]]:
    """Return ``count`` different prompts with their answers, the number of articles drawn evenly, both ends included.

    Returns:
        Rows of a JSON Lines prompt source: `prompt` and `answer`.
    """
    rng = np.random.default_rng(seed)

    def draw() -> tuple[str, str]:
        search = draw_searches(rng, 1, int(rng.integers(articles[0], articles[1] + 1)), FAULTLESS)
        return " ".join(TOKENS[token] for token in search.prompts[0, 1:-1]), TOKENS[search.answers[0]]

    return distinct_prompts(count, draw)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: one token a word."""
    return word_tokenizer(_ID)
