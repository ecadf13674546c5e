"""Prompts of files and folders in each of their formats."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.run_store import RunStore
from schemas.tables import PROMPTS
from tasks.prompts import source_fingerprints
from tasks.stage import execute
from tests.tasks.prompt_files import KEY, make_config, prompt_of, run_prompts, write_jsonl


def test_json_lines_compressed_by_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "a"}\n{"prompt": "b"}\n'))
    made, _ = run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path)}]))
    assert [(prompt_of(row), row["source"], row["source_row"]) for row in made] == [
        ("a", "a.jsonl.gz", 1),
        ("b", "a.jsonl.gz", 2),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'question,answer\n"one, two",3\nb,\n'),
        ("a.tsv", "question\tanswer\none, two\t3\nb\t\n"),
        ("a.json", '[{"question": "one, two", "answer": 3},\n {"question": "b", "answer": null}]'),
    ],
)
def test_a_dataset_that_is_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    # The card of a project is none of the file's.
    (tmp_path / "README.md").write_text("---\nconfigs: [{config_name: x, data_files: y.csv}]\n---\n")
    source = {"type": "dataset", "dataset": str(tmp_path / name), "prompt": "question"}
    config = make_config(tmp_path, [source])
    rows, _ = run_prompts(config)
    assert [(prompt_of(row), row["answer"], row["source"]) for row in rows] == [
        ("one, two", "3", name),
        ("b", None, name),
    ]
    assert capsys.readouterr().err == ""
    before = source_fingerprints(config)
    (tmp_path / name).write_text(text.replace("two", "four"))
    assert source_fingerprints(config) != before


def test_files_of_one_name_keep_apart(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / folder / "a.jsonl", [{"prompt": folder}]) for folder in ("one", "two")]
    rows, _ = run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path)} for path in paths]))
    assert [row["source"] for row in rows] == ["one/a.jsonl", "two/a.jsonl"]


def test_parquet_rows_read_in_many_batches(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"unread": [None] * 10_000, "prompt": [f"p{n}" for n in range(10_000)]})
    pq.write_table(table, path, row_group_size=3_000)
    seen: list[tuple[int, int, str]] = []
    config = make_config(tmp_path, [{"type": "parquet", "path": str(path)}])
    store = RunStore.create(config)
    execute(store, config, KEY, lambda *progress: seen.append(progress))
    written = store.read_table(KEY, PROMPTS)
    assert written.column("source_row").to_pylist() == list(range(1, 10_001))
    assert prompt_of(written.slice(9_999).to_pylist()[0]) == "p9999"
    assert seen[0] == (0, 10_000, "prompts")
    assert seen[-1] == (10_000, 10_000, "prompts")
    assert len(seen) > 3
    assert seen == sorted(seen)


def test_parquet_messages(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"messages": [{"role": "user", "content": "Hi"}], "prompt": "x"}, {"messages": None, "prompt": "Plain"}]
    pq.write_table(pa.Table.from_pylist(rows), path)
    made, _ = run_prompts(make_config(tmp_path, [{"type": "parquet", "path": str(path)}]))
    assert [prompt_of(row) for row in made] == ["Hi", "Plain"]


@pytest.mark.parametrize("kind", ["saved", "saved with splits", "folder of files"])
def test_a_local_dataset(tmp_path: Path, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "asks"
    made = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "answer": ["1", None, "3"]})
    if kind == "saved":
        made.save_to_disk(str(folder))
    elif kind == "saved with splits":
        datasets.DatasetDict({"test": made, "train": made.select([0])}).save_to_disk(str(folder))
    else:
        folder.mkdir()
        made.to_parquet(str(folder / "test.parquet"))
    source = {"type": "dataset", "dataset": str(folder), "dataset_split": "test"}
    rows, manifest = run_prompts(make_config(tmp_path, [source]))
    assert [(prompt_of(r), r["answer"], r["source"], r["source_row"]) for r in rows] == [
        ("a", "1", "asks", 1),
        ("b", None, "asks", 2),
        ("c", "3", "asks", 3),
    ]
    assert manifest.counters["sources"] == {"asks": 3}


def test_many_files_of_prompts_hold_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{n % 37}"} for n in range(60)])
    sources = [{"type": "jsonl", "path": str(path)}]
    whole, _ = run_prompts(make_config(tmp_path, sources, name="whole", held_out=5, limit=33))
    monkeypatch.setattr("tasks.prompts.table.BATCH_ROWS", 7)
    monkeypatch.setattr("tasks.prompts.table.PART_ROWS", 4)
    parts, manifest = run_prompts(make_config(tmp_path, sources, name="parts", held_out=5, limit=33))
    assert parts == whole
    assert [record.rows for record in manifest.outputs] == [4] * 8 + [1]
