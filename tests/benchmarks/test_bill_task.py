import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.bill_models import MODELS
from benchmarks.bill_task import (
    ARTICLES,
    LINE,
    PRICES,
    SHOPS,
    TOKENS,
    TOTAL,
    VOCABULARY,
    Strays,
    draw_bills,
    draw_prompts,
    make_tokenizer,
)
from benchmarks.word_models import PAD
from tasks.language_model.chat import encode_prompts

BILL = Path(__file__).parents[2] / "configs" / "bill"


def text_of(ids: NDArray[np.int64]) -> str:
    text: Any = make_tokenizer().decode(ids.tolist(), skip_special_tokens=True)
    return str(text)


def lines_of(reply: NDArray[np.int64]) -> list[tuple[str, int, int, str]]:
    """Return article, price, sum and end of every line."""
    words = text_of(reply).split()[:-1]
    return [(words[at], int(words[at + 1]), int(words[at + 2]), words[at + 3]) for at in range(0, len(words), 4)]


@pytest.mark.parametrize("lines", [1, 2, 7])
def test_every_reply_takes_the_articles_in_order_at_the_shops_prices_and_adds_up(lines: int) -> None:
    bills = draw_bills(np.random.default_rng(3), 20, lines)
    for prompt, reply, total in zip(bills.prompts, bills.replies, bills.totals, strict=True):
        shop, *articles = text_of(prompt).split()
        prices = [int(PRICES[SHOPS.index(shop), ARTICLES.index(article)]) for article in articles]
        written = lines_of(reply)
        assert [line[:2] for line in written] == list(zip(articles, prices, strict=True))
        assert [line[2] for line in written] == (np.cumsum(prices) % 10).tolist()
        assert [line[3] for line in written] == [LINE] * (lines - 1) + [TOTAL]
        assert int(text_of(reply).split()[-1]) == total == sum(prices) % 10
    assert not bills.slips.any()


def test_a_slip_is_marked_and_stands() -> None:
    bills = draw_bills(np.random.default_rng(4), 60, 4, slips=0.3)
    for prompt, reply, slips in zip(bills.prompts, bills.replies, bills.slips, strict=True):
        shop, *articles = text_of(prompt).split()
        total = 0
        for number, (article, price, so_far, _) in enumerate(lines_of(reply)):
            right = int(PRICES[SHOPS.index(shop), ARTICLES.index(articles[number])])
            marked = slips[4 * number : 4 * number + 4].tolist()
            assert marked == [article != articles[number], price != right, so_far != (total + price) % 10, False]
            total = so_far
        assert int(text_of(reply).split()[-1]) == total
    assert bills.slips[:, 1::4].any()
    assert bills.slips[:, 2::4].any()


def test_who_strays_goes_on_with_the_first_article_that_is_missing_and_adds_up() -> None:
    bills = draw_bills(np.random.default_rng(6), 60, 5, strays=Strays(skips=0.3))
    for prompt, reply, slips in zip(bills.prompts, bills.replies, bills.slips, strict=True):
        missing = text_of(prompt).split()[1:]
        for number, (article, *_) in enumerate(lines_of(reply)):
            assert slips[4 * number : 4 * number + 4].tolist() == [article != missing[0], False, False, False]
            missing.remove(article)
        assert not missing
    assert 0.1 < bills.slips[:, 0:-2:4].mean() < 0.3


def test_a_bill_goes_on_after_every_kind_of_stray_until_nothing_is_missing() -> None:
    strays = Strays(skips=0.1, repeats=0.15, unlisted=0.15)
    bills = draw_bills(np.random.default_rng(8), 200, 5, slips=0.1, strays=strays)
    kinds = []
    for prompt, reply, slips, total in zip(bills.prompts, bills.replies, bills.slips, bills.totals, strict=True):
        shop, *listed = text_of(prompt).split()
        missing, so_far = list(listed), 0
        written = lines_of(reply)
        for number, (article, price, so_far_written, end) in enumerate(written):
            kind = "first" if article == missing[0] else "skip" if article in missing else "repeat"
            kinds.append(kind if article in listed else "unlisted")
            right = int(PRICES[SHOPS.index(shop), ARTICLES.index(article)])
            marked = slips[4 * number : 4 * number + 4].tolist()
            assert marked == [article != missing[0], price != right, so_far_written != (so_far + price) % 10, False]
            so_far = so_far_written
            if article in missing:
                missing.remove(article)
            assert end == (LINE if missing else TOTAL)
        assert not missing
        tail = 4 * len(written)
        assert TOKENS[reply[tail + 1]] == "<eos>"
        assert int(text_of(reply).split()[-1]) == so_far
        assert {TOKENS[token] for token in reply[tail + 2 :]} <= {PAD}
        assert slips[tail + 2 :].all()
        assert not slips[tail : tail + 2].any()
        assert total == sum(int(PRICES[SHOPS.index(shop), ARTICLES.index(article)]) for article in listed) % 10
    share = {kind: kinds.count(kind) / len(kinds) for kind in ("skip", "repeat", "unlisted")}
    assert 0.04 < share["skip"] < 0.1  # a missing article drawn may be the first
    assert 0.1 < share["repeat"] < 0.15  # nothing can be repeated in a first line
    assert 0.12 < share["unlisted"] < 0.18


def test_hearsay_leaves_the_same_prices_open_every_time() -> None:
    seen: dict[tuple[str, str], set[int]] = {}
    bills = draw_bills(np.random.default_rng(5), 4000, 3, hearsay=0.2)
    for prompt, reply in zip(bills.prompts, bills.replies, strict=True):
        shop = text_of(prompt).split()[0]
        for article, price, _, _ in lines_of(reply):
            seen.setdefault((shop, article), set()).add(price)
    is_open = [len(prices) > 1 for prices in seen.values()]
    assert 0.15 < np.mean(is_open) < 0.25
    assert not bills.slips.any()


def test_prompts_are_distinct_and_repeat_with_their_seed() -> None:
    rows = draw_prompts(1, 300, (2, 4))
    assert len({row["prompt"] for row in rows}) == 300
    assert {len(row["prompt"].split()) - 1 for row in rows} == {2, 3, 4}
    assert rows == draw_prompts(1, 300, (2, 4)) != draw_prompts(2, 300, (2, 4))


def test_the_template_renders_what_models_were_trained_on() -> None:
    tokenizer = make_tokenizer()
    bills = draw_bills(np.random.default_rng(0), 1, 3)
    (ids,) = encode_prompts(tokenizer, [[{"role": "user", "content": text_of(bills.prompts[0, 1:-1])}]])
    assert ids.tolist() == bills.prompts[0].tolist()
    assert len(tokenizer) == len(TOKENS) == VOCABULARY
    assert len(ARTICLES) == 24


def test_the_files_in_the_repository_are_those_the_script_makes() -> None:
    rows = [json.loads(line) for line in (BILL / "prompts.jsonl").read_text().splitlines()]
    assert rows == draw_prompts(0, len(rows), (3, 8))
    for name in MODELS:
        saved = json.loads((BILL / name / "tokenizer.json").read_text())
        assert saved["model"] == json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
