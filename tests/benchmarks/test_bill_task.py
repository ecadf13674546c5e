import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.bill_task import ARTICLES, TOKENS, VOCABULARY, draw_bills, draw_prompts, make_tokenizer
from tasks.language_model.chat import encode_prompts

BILL = Path(__file__).parents[2] / "configs" / "bill"


def text_of(ids: NDArray[np.int64]) -> str:
    text: Any = make_tokenizer().decode(ids.tolist(), skip_special_tokens=True)
    return str(text)


@pytest.mark.parametrize("lines", [1, 2, 7])
def test_every_reply_takes_each_article_once_at_its_price_and_adds_up(lines: int) -> None:
    bills = draw_bills(np.random.default_rng(3), 20, lines)
    orders = set()
    for prompt, reply, total in zip(bills.prompts, bills.replies, bills.totals, strict=True):
        words = text_of(prompt).split()
        prices = dict(zip(words[::2], words[1::2], strict=True))
        body, _, end = text_of(reply).partition(" #### ")
        taken, running = [], 0
        for line in body.split(" ; "):
            article, price, so_far = line.split()
            running += int(price)
            taken.append(article)
            assert price == prices[article]
            assert int(so_far) == running % 10
        assert sorted(taken) == sorted(prices)
        assert int(end) == total == sum(map(int, prices.values())) % 10
        orders.add(tuple(words[::2].index(article) for article in taken))
    assert len(orders) == 1 if lines == 1 else len(orders) > 1


def test_a_slip_is_marked_and_made_good() -> None:
    bills = draw_bills(np.random.default_rng(4), 40, 4, repeats=2, misread=0.2)
    for prompt, reply, slips in zip(bills.prompts, bills.replies, bills.slips, strict=True):
        words = text_of(prompt).split()
        prices = dict(zip(words[::2], words[1::2], strict=True))
        body, _, end = text_of(reply).partition(" #### ")
        lines = [line.split() for line in body.split(" ; ")]
        running, seen = 0, set[str]()
        for (article, price, so_far), marked in zip(lines, slips[:-2].reshape(-1, 4), strict=True):
            assert marked.tolist() == [article in seen, price != prices[article], False, False]
            running += 0 if article in seen else int(prices[article])
            seen.add(article)
            assert int(so_far) == running % 10
        assert (len(lines), seen, int(end)) == (6, set(prices), running % 10)
    assert bills.slips[:, 1::4].any()


def test_prompts_are_distinct_and_repeat_with_their_seed() -> None:
    rows = draw_prompts(1, 300, (2, 4))
    assert len({row["prompt"] for row in rows}) == 300
    assert {len(row["prompt"].split()) // 2 for row in rows} == {2, 3, 4}
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
    for name in ("teacher", "student"):
        saved = json.loads((BILL / name / "tokenizer.json").read_text())
        assert saved["model"] == json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
