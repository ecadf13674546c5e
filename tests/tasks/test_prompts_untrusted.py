"""Prompt files that are hostile, or only unlucky."""

import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.config import PromptsConfig
from tasks.prompts import json_lines
from tasks.prompts.messages import wording_id
from tests.tasks.prompt_files import read_prompts
from tests.tasks.test_prompts_errors import fails

CHAT = [[{"role": "user", "content": "x"}]] * 2


def test_a_key_twice_in_a_row_is_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n')
    fails({"type": "jsonl", "path": str(path)}, f"{path}: row 2: has `prompt` more than once")
    path.write_text('{"messages": [{"role": "system", "role": "user", "content": "c"}]}\n')
    fails({"type": "jsonl", "path": str(path)}, f"{path}: row 1: has `role` more than once")


def test_rows_made_to_take_long_do_not(tmp_path: Path) -> None:
    """What took the square of a line's length: finding a key that is there twice, ordering a letter's accents."""
    begun = time.process_time()
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(dict.fromkeys(map(str, range(50_000)), 0))[:-1] + ', "last": 0, "last": 0}\n')
    fails({"type": "jsonl", "path": str(path)}, "row 1: has `last` more than once")
    one, other = "\u0301", "\u0316"
    wording_id([{"role": "user", "content": "e" + 40_000 * one + 40_000 * other}])
    assert time.process_time() - begun < 5
    asked = [
        wording_id([{"role": "user", "content": f"{text} {'e' * 1_000}"}]) for text in ("e" + one + other, "é" + other)
    ]
    assert asked[0] == asked[1]


def test_an_answer_beyond_every_float_is_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "answer": %s}\n{"prompt": "b"}\n' % ("9" * 400))
    config = PromptsConfig.model_validate({"sources": [{"type": "jsonl", "path": str(path)}], "held_out": 1})
    assert sorted(map(str, read_prompts(config)[0].column("answer").to_pylist())) == [
        "9" * 400,
        "None",
    ]


def test_a_line_too_long_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_LONGEST_LINE", 1_000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "' + "b" * 3_000 + '"}\n{"prompt": "c"}\n')
    fails({"type": "jsonl", "path": str(path)}, f"{path}: row 2: is longer than 1000 bytes")
    path.write_text('{"prompt": "' + "b" * 985 + '"}\n{"prompt": "c"}\n')
    config = PromptsConfig.model_validate({"sources": [{"type": "jsonl", "path": str(path)}], "held_out": 1})
    assert read_prompts(config)[0].num_rows == 2


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "\x1b[2J" * 2_000, "content": "x"}]},
        {f"\x1b[2J{number}": "x" for number in range(500)},
        {"messages": [{f"\x07{number}": "x" for number in range(500)}]},
    ],
    ids=["role", "columns", "keys of a message"],
)
def test_what_a_row_holds_is_shown_readably(tmp_path: Path, row: dict[str, Any]) -> None:
    from tests.tasks.prompt_files import write_jsonl

    text = fails({"type": "jsonl", "path": str(write_jsonl(tmp_path / "a.jsonl", [row]))}, "row 1")
    assert text.isprintable()
    assert len(text) < 1_500


@pytest.mark.parametrize(
    ("values", "what"),
    [
        (pa.array([2**62, 0]).cast(pa.timestamp("us")), "column `prompt`: cannot be read as timestamp"),
        (pa.array([0, 0]).cast(pa.timestamp("us", "Nowhere/None")), "column `prompt`: cannot be read as timestamp"),
        (pa.array([["a"], ["b"]]), "column `prompt[0]`: should be an object with `role` and `content`, is text"),
    ],
    ids=["time beyond the calendar", "zone that does not exist", "list"],
)
def test_parquet_types_that_python_cannot_hold(tmp_path: Path, values: pa.Array, what: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": values}), path)
    fails({"type": "parquet", "path": str(path)}, f"{path}: row 1, {what}")


def test_parquet_with_a_column_twice(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), path)
    fails({"type": "parquet", "path": str(path)}, f"{path}: has column `prompt` more than once")


def test_a_path_that_no_disk_can_hold() -> None:
    fails({"type": "jsonl", "path": "x" * 5_000}, "xxx…: cannot be looked up: File name too long")
