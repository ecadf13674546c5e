"""Prompt sources that cannot be used: every error names the file, the row, the column and what to do."""

import gzip
import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.config import PromptsConfig
from schemas.errors import PromptError
from tasks.prompts import sources as prompt_sources
from tests.tasks.prompt_files import read_prompts, write_jsonl


def fails(source: dict[str, Any], *parts: str) -> str:
    """Read ``source``, expect a PromptError that holds every one of ``parts``, and return its text."""
    with pytest.raises(PromptError) as caught:
        read_prompts(PromptsConfig.model_validate({"sources": [source], "held_out": 1}))
    text = str(caught.value)
    for part in parts:
        assert part in text
    return text


USER = {"role": "user", "content": "Hi"}

BAD_ROWS = [
    ("no prompt", {"text": "Hi"}, None, "has neither `messages` nor `prompt`, only `text`"),
    ("near column", {"promt": "Hi"}, None, "only `promt`; set `messages` or `prompt` of this source"),
    ("empty row", {}, None, "has neither `messages` nor `prompt`"),
    ("nulls", {"messages": None, "prompt": None}, None, "has neither `messages` nor `prompt`"),
    ("number", {"prompt": 3}, "prompt", "should be text, is a number"),
    ("boolean", {"prompt": True}, "prompt", "should be text, is true or false"),
    ("texts as prompt", {"prompt": ["Hi"]}, "prompt[0]", "should be an object with `role` and `content`, is text"),
    ("object as prompt", {"prompt": {"role": "user"}}, "prompt", "should be text, is an object"),
    ("empty prompt", {"prompt": ""}, "prompt", "is empty; write the message or delete the row"),
    ("blank prompt", {"prompt": " \n\t"}, "prompt", "is empty"),
    ("half a surrogate", {"prompt": "\ud83d"}, "prompt", "half of a surrogate pair"),
    ("messages as text", {"messages": "Hi"}, "messages", "should be a list of {role, content} messages, is text"),
    ("no messages", {"messages": []}, "messages", "is an empty list"),
    ("message as text", {"messages": ["Hi"]}, "messages[0]", "should be an object with `role` and `content`"),
    ("no content", {"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    (
        "other keys",
        {"messages": [{"role": "user", "contents": "Hi"}]},
        "messages[0].content",
        "is missing; the message has `role`, `contents`",
    ),
    ("no role", {"messages": [{"content": "Hi"}]}, "messages[0].role", "is missing"),
    ("role as number", {"messages": [{"role": 1, "content": "Hi"}]}, "messages[0].role", "should be text"),
    ("parts", {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}, "messages[0].content", "is a list"),
    (
        "unknown role",
        {"messages": [USER, {"role": "human", "content": "Hi"}]},
        "messages[1].role",
        "unknown role 'human'; known: system, user, assistant",
    ),
    (
        "reply last",
        {"messages": [USER, {"role": "assistant", "content": "Hello"}]},
        "messages[1]",
        "the last message is from `assistant`; a prompt ends with the user's, so remove what comes after it, or say "
        "what becomes of the reply: `last_reply: answer` or `drop` of this source",
    ),
    (
        "system last",
        {"messages": [USER, {"role": "system", "content": "Sing."}]},
        "messages[1]",
        "the last message is from `system`; a prompt ends with the user's, so remove what comes after it",
    ),
    (
        "ShareGPT without a value",
        {"messages": [{"from": "human", "text": "Hi"}]},
        "messages[0].value",
        "is missing; the message has `from`, `text`",
    ),
    (
        "ShareGPT's tools",
        {"messages": [{"from": "function_call", "value": "{}"}]},
        "messages[0].from",
        "unknown role 'function_call'; known: system, user, assistant, human, gpt",
    ),
    ("blank user", {"messages": [{"role": "user", "content": " "}]}, "messages[0].content", "is empty"),
    (
        "blank turn",
        {"messages": [USER, {"role": "assistant", "content": ""}, USER]},
        "messages[1].content",
        "is empty",
    ),
    ("tools", {"prompt": "Hi", "tools": [{"name": "f"}]}, "tools", "holds tools, which no prompt here is given: leave"),
    ("tools as JSON", {"prompt": "Hi", "tools": '[{"name": "f"}]'}, "tools", "`tools: drop` of this source"),
    (
        "a tool's call",
        {"messages": [USER, {"role": "assistant", "content": "Wait.", "tool_calls": [{"name": "f"}]}, USER]},
        "messages[1].tool_calls",
        "is no text, and prompts here are texts only: leave such rows out",
    ),
    ("list as answer", {"prompt": "Hi", "answer": ["x"]}, "answer", "should be text, is a list"),
    ("boolean answer", {"prompt": "Hi", "answer": False}, "answer", "should be text, is true or false"),
]


@pytest.mark.parametrize(("row", "column", "what"), [case[1:] for case in BAD_ROWS], ids=[case[0] for case in BAD_ROWS])
def test_a_bad_row(tmp_path: Path, row: dict[str, Any], column: str | None, what: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "good"}, {"prompt": "fine"}, row, {"prompt": "more"}])
    place = f"{path}: row 3" + (f", column `{column}`: " if column else ": ")
    text = fails({"type": "jsonl", "path": str(path)}, place, what)
    assert "cannot be used either" not in text


def test_a_reply_that_answers_nothing(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": "Hello!"}
    source = {"type": "jsonl", "last_reply": "drop"}
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [reply]}])
    fails({**source, "path": str(path)}, "row 1, column `messages`: is a reply to nothing")
    path = write_jsonl(tmp_path / "b.jsonl", [{"messages": [USER, reply, reply]}])
    text = fails({**source, "path": str(path)}, "column `messages[1]`: the last message is from `assistant`")
    assert "last_reply" not in text


BAD_LINES = [
    ("not JSON", b"{prompt: Hi}", "is not JSON (Expecting property name enclosed in double quotes at character 2)"),
    ("cut off", b'{"prompt": "Hi', "is not JSON (Unterminated string"),
    ("two objects", b'{"prompt": "a"} {"prompt": "b"}', "is not JSON (Extra data"),
    (
        "a list",
        b'["Hi"]',
        "is not a JSON object but '[\"Hi\"]'; write one JSON object a line, or read a list of them by",
    ),
    (
        "the start of a list",
        b"[",
        "is not JSON (Expecting value at character 2); write one JSON object a line, or read a list",
    ),
    ("a text", b'"Hi"', "is not a JSON object but '\"Hi\"'"),
    ("null", b"null", "is not a JSON object but 'null'"),
    ("invalid UTF-8", b'{"prompt": "caf\xe9"}', "byte 16 (0xe9) is not valid UTF-8; save the file as UTF-8"),
    ("too deep", b"[" * 200_000, "is not JSON that can be read"),
    ("a number too long", b'{"prompt": ' + b"9" * 10_000 + b"}", "is not JSON that can be read"),
]


@pytest.mark.parametrize(("line", "what"), [case[1:] for case in BAD_LINES], ids=[case[0] for case in BAD_LINES])
def test_a_bad_line(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "good"}\n\n' + line + b'\n{"prompt": "more"}\n')
    fails({"type": "jsonl", "path": str(path)}, f"{path}: row 3: {what}")


def test_the_first_bad_row_is_reported_and_the_others_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n{"prompt": ""}\n\xff\nnull\n{"prompt": "y"}\n')
    fails(
        {"type": "jsonl", "path": str(path)},
        "row 2, column `prompt`: is empty",
        "(2 more rows of it cannot be used either)",
    )
    # Beyond `limit` nothing is read, so nothing there can be wrong.
    config = PromptsConfig.model_validate(
        {
            "sources": [
                {"type": "jsonl", "path": str(write_jsonl(path, [{"prompt": "a"}, {"prompt": "b"}, 3])), "limit": 2}
            ],
            "held_out": 1,
        }
    )
    assert read_prompts(config)[0].num_rows == 2


def test_files_that_are_missing_empty_or_folders(tmp_path: Path) -> None:
    empty, blank = tmp_path / "empty.jsonl", tmp_path / "blank.jsonl"
    empty.touch()
    blank.write_text("\n \n")
    no_rows = tmp_path / "none.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), no_rows)
    fails({"type": "jsonl", "path": str(empty)}, f"{empty}: is empty; it needs at least one prompt")
    fails({"type": "jsonl", "path": str(blank)}, f"{blank}: has no rows")
    fails({"type": "parquet", "path": str(no_rows)}, f"{no_rows}: has no rows")
    fails({"type": "parquet", "path": str(tmp_path / "x")}, f"{tmp_path / 'x'}: no such prompt file")
    fails({"type": "jsonl", "path": str(tmp_path)}, f"{tmp_path}: is a folder", "type: dataset")


def test_an_answer_column_that_no_row_has(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "y"}])
    fails(
        {"type": "jsonl", "path": str(path), "answer": "solution"},
        str(path),
        "column `solution` is in none of its 2 rows",
    )


def test_one_of_several_columns_that_no_row_has(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"instruction": "x", "input": "y"}])
    source = {"type": "jsonl", "path": str(path)}
    fails(
        source | {"prompt": ["instruction", "inptu"]},
        "column `inptu` is in none of its 1 rows; correct this source's `prompt`",
    )
    fails(source | {"prompt": ["a", "b"]}, "has neither `messages` nor `a` nor `b`, only `instruction`, `input`")


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "x", "reward_model": {"ground_truth": "1"}}]), path)
    source = {"type": "parquet", "path": str(path)}
    fails(source | {"answer": "reward_model.truth"}, "column `reward_model.truth` is in none of its 1 rows")
    fails(source | {"answer": "reward.ground_truth"}, "no column `reward.ground_truth`")


def test_compressed_json_lines_that_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % number for number in range(1_000)))
    for damaged in (whole[:-100], whole[:50] + b"\0\0\0\0" + whole[54:], whole[:2]):
        path.write_bytes(damaged)
        fails({"type": "jsonl", "path": str(path)}, f"{path}: is damaged: ")


def test_a_file_that_is_no_dataset(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}])
    fails(
        {"type": "dataset", "dataset": str(path)}, f"{path}: as a file, a dataset ends in .csv, .tsv, .json; there are"
    )
    (tmp_path / "a.json").write_text("{")
    fails({"type": "dataset", "dataset": str(tmp_path / "a.json")}, "a.json: cannot be loaded as a dataset")


def test_parquet_that_is_not_parquet(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.parquet", [{"prompt": "x"}])
    fails({"type": "parquet", "path": str(path)}, f"{path}: is not a readable Parquet file")


def test_parquet_damaged_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"prompt": [f"p{n}" for n in range(20_000)]}), path, compression="zstd", use_dictionary=False
    )
    data = bytearray(path.read_bytes())
    data[100:2_000] = b"\0" * 1_900
    path.write_bytes(bytes(data))
    fails({"type": "parquet", "path": str(path)}, f"{path}: is damaged")


def test_parquet_lacks_a_column(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompts": ["x"], "reply": ["y"]}), path)
    fails(
        {"type": "parquet", "path": str(path)},
        f"{path}: no column `messages` or `prompt`; did you mean `prompts`? Set `messages` or `prompt`",
        "it has `prompts`, `reply`",
    )
    fails(
        {"type": "parquet", "path": str(path), "prompt": "prompts", "answer": "replies"},
        "no column `replies`; did you mean `reply`?",
    )


def test_parquet_rows_of_a_wrong_type(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": [1, 2, 3]}), path)
    fails(
        {"type": "parquet", "path": str(path)},
        f"{path}: row 1, column `prompt`: should be text, is a number (2 more rows",
    )
    pq.write_table(pa.table({"prompt": [b"x"]}), path)
    fails({"type": "parquet", "path": str(path)}, "column `prompt`: should be text, is bytes")


def test_parquet_row_numbers_across_batches(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts: list[str | None] = [f"p{n}" for n in range(9_000)]
    texts[8_500] = " "
    texts[8_900] = None
    pq.write_table(pa.table({"prompt": texts}), path)
    fails({"type": "parquet", "path": str(path)}, f"{path}: row 8501, column `prompt`: is empty", "(1 more row of it")


def test_parquet_with_invalid_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    data = pa.array([b"good", b"caf\xe9", b"fine"])
    text = pa.Array.from_buffers(pa.string(), 3, data.buffers())
    pq.write_table(pa.table({"prompt": text}), path)
    fails({"type": "parquet", "path": str(path)}, f"{path}: row 2, column `prompt`: byte 4 is not valid UTF-8")


def test_datasets_that_cannot_be_loaded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved, empty = tmp_path / "saved", tmp_path / "empty"
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"prompt": ["a", ""]})}).save_to_disk(str(saved))
    empty.mkdir()
    fails({"type": "dataset", "dataset": str(saved)}, f"{saved}: no split `train`; set `dataset_split` to one of test")
    fails(
        {"type": "dataset", "dataset": str(saved), "dataset_split": "test"},
        f"{saved}: row 2, column `prompt`: is empty",
    )
    fails({"type": "dataset", "dataset": str(saved), "dataset_split": "test", "prompt": "ask"}, "it has `prompt`")
    fails({"type": "dataset", "dataset": str(empty)}, f"{empty}: cannot be loaded as a dataset")
    fails({"type": "dataset", "dataset": str(tmp_path / "absent")}, f"{tmp_path / 'absent'}: no such dataset folder")


def test_a_folder_of_files_without_the_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "data" / "train.jsonl", [{"prompt": "x"}])
    fails({"type": "dataset", "dataset": str(tmp_path / "data"), "dataset_split": "dev"}, 'Unknown split "dev"')


def test_reasoning_gym_mistakes() -> None:
    def source(**values: Any) -> dict[str, Any]:
        return {"type": "reasoning_gym", "tasks": ["chain_sum"], "size": 2, **values}

    fails(
        source(tasks=["chain_sum", "leter_counting"]), "unknown task `leter_counting`; did you mean `letter_counting`?"
    )
    fails(source(options={"chain_sum": {"min_termz": 2}}), "task `chain_sum` refuses its `options`", "min_termz")
    fails(
        source(options={"chain_sum": {"min_terms": 0}}), "task `chain_sum` refuses its `options`", "min_terms must be"
    )
    fails(
        source(options={"chain_sums": {"min_terms": 2}}), "`options` names `chain_sums`, which is not among its `tasks`"
    )
    fails(source(options={"chain_sum": {"seed": 2}}), "reasoning_gym:chain_sum: set `seed` beside `tasks`")
    fails(source(options={"chain_sum": {"min_terms": "two"}}), "reasoning_gym", "chain_sum")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(prompt_sources, "version", absent)
    text = fails({"type": "reasoning_gym", "tasks": ["chain_sum"]}, "`reasoning-gym` is not installed")
    assert re.search(r"pip install -e '\.\[reasoning-gym\]'", text)


def test_a_reply_that_is_no_number_in_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "x", "answer": float("nan")}) + "\n" + json.dumps({"prompt": "y"}))
    fails({"type": "jsonl", "path": str(path)}, "row 1, column `answer`: should be text, is a number")
