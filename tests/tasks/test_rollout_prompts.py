from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from schemas.stage_key import StageKey
from schemas.tables import PROMPTS
from tasks.language_model.chat import encode_prompts
from tasks.rollout import prompts
from tasks.rollout.prompts import Asked, encode_answers, encode_messages, read_split
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table, split_rows
from tests.tiny_models import make_tokenizer

MESSAGES = [[{"role": "user", "content": "Say " + "ha" * index}] for index in range(8)]


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_conversations_in_any_chunks_are_the_tokens_of_each(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_CHUNK", chunk)
    column = pa.chunked_array([MESSAGES[:5], MESSAGES[5:]], type=PROMPTS.columns.field("messages").type)
    tokens = encode_messages(make_tokenizer(), column)
    assert tokens.values.dtype == np.int32
    assert [row.tolist() for row in tokens.rows()] == [
        encode_prompts(make_tokenizer(), [conversation])[0].tolist() for conversation in MESSAGES
    ]


def test_answers_are_closed_by_the_end_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_CHUNK", 2)
    tokenizer = make_tokenizer()
    tokens = encode_answers(tokenizer, pa.chunked_array([["one", "", "three"]]), 2)
    expected = [[*tokenizer(text, add_special_tokens=False)["input_ids"], 2] for text in ("one", "", "three")]
    assert [row.tolist() for row in tokens.rows()] == expected


def test_no_prompts_are_no_tokens() -> None:
    tokens = encode_messages(make_tokenizer(), pa.chunked_array([], type=PROMPTS.columns.field("messages").type))
    assert (len(tokens), len(tokens.values)) == (0, 0)


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_spans_are_the_prompts_of_any_files(rows: int) -> None:
    table = pa.table({"prompt_id": [f"p{index}" for index in range(9)]})
    files = [table.slice(start, rows) for start in range(0, 9, rows)]
    asked = Asked(9, 1, lambda: iter(files))
    spans = [(0, 3), (3, 4), (6, 9)]
    assert [part.column("prompt_id").to_pylist() for part in asked.spans(spans)] == [
        [f"p{index}" for index in range(*span)] for span in spans
    ]


def test_files_behind_the_last_prompt_that_is_wanted_are_not_read(tmp_path: Path) -> None:
    store, key = make_store(tmp_path, make_config(tmp_path)), StageKey("prompts")
    splits = {name: "held_out" if name == "b" else "train" for name in "abcdef"}
    finish_stage(store, key, PROMPTS, split_rows(prompts_table(splits), 2))

    def names(split: str, limit: int | None) -> list[str]:
        return [name for part in read_split(store, split, limit) for name in part.column("prompt_id").to_pylist()]

    assert names("train", None) == names("train", 9) == ["a", "c", "d", "e", "f"]
    store.part(key, 2).write_bytes(b"damaged")
    assert [names("train", limit) for limit in (1, 2, 3)] == [["a"], ["a", "c"], ["a", "c", "d"]]
    assert names("held_out", 1) == ["b"]
