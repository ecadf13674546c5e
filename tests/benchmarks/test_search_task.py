import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.bill_task import ARTICLES, PRICES, SHOPS, VOCABULARY
from benchmarks.search_models import ARTICLES_LISTED, MODELS
from benchmarks.search_task import (
    FAULTLESS,
    TOKENS,
    Habits,
    draw_prompts,
    draw_searches,
    make_tokenizer,
)
from schemas.tables import IGNORE_LABEL
from tasks.language_model.chat import encode_prompts

SEARCH = Path(__file__).parents[2] / "configs" / "search"


def words_of(ids: NDArray[np.int64]) -> list[str]:
    text: Any = make_tokenizer().decode(ids.tolist(), skip_special_tokens=True)
    return str(text).split()


def price(shop: str, article: str) -> str:
    return str(PRICES[SHOPS.index(shop), ARTICLES.index(article)])


@pytest.mark.parametrize("habits", [FAULTLESS, *(phase.habits for phase in MODELS.values())])
@pytest.mark.parametrize("articles", [1, 2, 5])
def test_every_try_is_one_of_the_articles_left_with_its_price_and_whether_it_is_right(
    articles: int, habits: Habits
) -> None:
    searches = draw_searches(np.random.default_rng(3), 50, articles, habits)
    for prompt, reply, answer in zip(searches.prompts, searches.replies, searches.answers, strict=True):
        shop, asked, *listed = words_of(prompt)
        right = TOKENS[answer]
        assert [article for article in listed if price(shop, article) == asked] == [right]
        body, end = " ".join(words_of(reply)).split(" #### ")
        tries = [line.split() for line in body.split(" ; ")]
        tried = [article for article, *_ in tries]
        assert len(set(tried)) == len(tried)
        assert set(tried) <= set(listed)
        assert tries == [[article, price(shop, article), "yes" if article == right else "no"] for article in tried]
        assert right not in tried[:-1]
        assert end == (right if tried[-1] == right else "none")
        assert habits != FAULTLESS or tried == [right]


def test_what_is_not_learned_has_no_label_and_all_else_its_token() -> None:
    habits = Habits(misses=0.5, goes_on=0.5, misses_learned=0.0, going_on_learned=0.0, giving_up_learned=0.0)
    searches = draw_searches(np.random.default_rng(4), 200, 4, habits)
    for reply, labels in zip(searches.replies, searches.labels, strict=True):
        words = [TOKENS[token] for token in reply]
        gave_up = "none" in words
        for at, (word, label) in enumerate(zip(words, labels.tolist(), strict=True)):
            miss = word in ARTICLES and at + 2 < len(words) and words[at + 2] == "no"
            unlearned = miss or word in (";", "<pad>") or (word == "####" and gave_up)
            assert label == (IGNORE_LABEL if unlearned else reply[at])
    assert (searches.labels == IGNORE_LABEL).any()


def test_prompts_are_distinct_and_repeat_with_their_seed() -> None:
    rows = draw_prompts(1, 300, (2, 4))
    assert len({row["prompt"] for row in rows}) == 300
    assert {len(row["prompt"].split()) - 2 for row in rows} == {2, 3, 4}
    assert rows == draw_prompts(1, 300, (2, 4)) != draw_prompts(2, 300, (2, 4))


def test_the_template_renders_what_models_were_trained_on() -> None:
    tokenizer = make_tokenizer()
    searches = draw_searches(np.random.default_rng(0), 1, 3, FAULTLESS)
    content = " ".join(words_of(searches.prompts[0]))
    (ids,) = encode_prompts(tokenizer, [[{"role": "user", "content": content}]])
    assert ids.tolist() == searches.prompts[0].tolist()
    assert len(tokenizer) == len(TOKENS) == VOCABULARY


def test_the_files_in_the_repository_are_those_the_script_makes() -> None:
    lines = (SEARCH / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == draw_prompts(0, len(lines), ARTICLES_LISTED)
    for name in MODELS:
        vocabulary = json.loads((SEARCH / name / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        assert sorted(vocabulary, key=vocabulary.__getitem__) == TOKENS
