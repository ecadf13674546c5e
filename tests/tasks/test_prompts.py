"""The prompts stage, run whole: real files in, the table and the manifest out."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.config import RunConfig, load_config
from schemas.errors import NPDError, PromptError
from schemas.run_store import RunStore
from tasks.prompts import source_fingerprints
from tasks.stage import current_manifest
from tests.tasks.prompt_files import KEY, make_config, prompt_of, run_prompts, write_jsonl


def test_a_jsonl_row_becomes_a_prompt(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Hi"}, {"prompt": "What is 6 x 7?", "answer": 42}])
    rows, manifest = run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path)}]))
    first, second = rows
    assert first["messages"] == [{"role": "user", "content": "Hi"}]
    canonical = '[{"content":"Hi","role":"user"}]'
    assert first["prompt_id"] == hashlib.sha256(canonical.encode()).hexdigest()[:16]
    assert (first["answer"], second["answer"]) == (None, "42")
    assert [(row["source"], row["source_row"]) for row in rows] == [("a.jsonl", 1), ("a.jsonl", 2)]
    assert sorted(row["split"] for row in rows) == ["held_out", "train"]
    assert [(Path(record.path).name, record.rows) for record in manifest.outputs] == [("part-00000.parquet", 2)]


def test_messages_come_before_prompt_and_bring_their_own_system(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Sing."}, {"role": "user", "content": "Hi"}]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye", "name": None},
    ]
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"messages": own, "prompt": "ignored"}, {"messages": turns}, {"messages": None, "prompt": "Plain"}],
    )
    rows, _ = run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path), "system": "Be brief."}]))
    brief = {"role": "system", "content": "Be brief."}
    assert rows[0]["messages"] == own
    assert rows[1]["messages"] == [brief, *({"role": m["role"], "content": m["content"]} for m in turns)]
    assert rows[2]["messages"] == [brief, {"role": "user", "content": "Plain"}]


SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


@pytest.mark.parametrize(("last_reply", "answers"), [("answer", ["Hello!", "Hey"]), ("drop", [None, "Hey"])])
def test_the_reply_that_a_conversation_ends_with(tmp_path: Path, last_reply: str, answers: list[str | None]) -> None:
    again = [*SAID, {"role": "user", "content": "Bye"}]
    rows = [{"messages": SAID}, {"messages": [*again, SAID[1]], "answer": "Hey"}, {"messages": again[:1] + again}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    source = {"type": "jsonl", "path": str(path), "last_reply": last_reply, "verifier": None}
    made, _ = run_prompts(make_config(tmp_path, [source]))
    assert [row["messages"] for row in made] == [SAID[:1], again, again[:1] + again]
    assert [row["answer"] for row in made] == [*answers, None]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_as_sharegpt_writes_them(tmp_path: Path, kind: str) -> None:
    said = [
        {"from": "system", "value": "Sing."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello!"},
        {"from": "user", "value": "Bye"},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [{"conversations": said}, {"conversations": said[1:2]}])
    if kind == "parquet":
        rows = [{"conversations": said}, {"conversations": said[1:2]}]
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    made, _ = run_prompts(make_config(tmp_path, [{"type": kind, "path": str(path), "messages": "conversations"}]))
    assert made[0]["messages"] == [
        {"role": "system", "content": "Sing."},
        *SAID,
        {"role": "user", "content": "Bye"},
    ]
    assert made[1]["messages"] == SAID[:1]


def test_a_prompt_may_be_messages_too(tmp_path: Path) -> None:
    """As TRL and verl keep prompts."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": SAID[:1]}, {"prompt": "Bye"}])
    made, _ = run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path)}]))
    assert [row["messages"] for row in made] == [SAID[:1], [{"role": "user", "content": "Bye"}]]


def test_texts_of_several_columns_are_one_prompt(tmp_path: Path) -> None:
    """As Alpaca keeps prompts."""
    texts = [("Translate.", "Hallo"), ("Sing.", ""), ("Count.", None)]
    rows = [{"instruction": one, "input": other, "output": "x"} for one, other in texts]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    source = {"type": "jsonl", "path": str(path), "prompt": ["instruction", "input"], "answer": "output"}
    made, _ = run_prompts(make_config(tmp_path, [source]))
    assert [prompt_of(row) for row in made] == ["Translate.\n\nHallo", "Sing.", "Count."]


def test_other_column_names_and_a_row_limit(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": f"q{n}", "response": f"r{n}"} for n in range(5)])
    source = {"type": "jsonl", "path": str(path), "prompt": "query", "answer": "response", "limit": 3}
    rows, manifest = run_prompts(make_config(tmp_path, [source]))
    assert [(prompt_of(row), row["answer"]) for row in rows] == [("q0", "r0"), ("q1", "r1"), ("q2", "r2")]
    assert manifest.counters["rows"] == 3


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_names_with_dots_lead_into_objects(tmp_path: Path, kind: str) -> None:
    """As verl and DAPO keep answers."""
    rows: list[dict[str, Any]] = [
        {"prompt": SAID[:1], "reward_model": {"ground_truth": "34", "style": "rule"}, "extra": {"index": {"at": 1}}},
        {"prompt": SAID[:1] * 2, "reward_model": {"ground_truth": None, "style": "rule"}, "extra": {"index": None}},
    ]
    path = write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    if kind == "parquet":
        path = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    place = {"dataset": str(path.parent)} if kind == "dataset" else {"path": str(path)}
    made, _ = run_prompts(make_config(tmp_path, [{"type": kind, **place, "answer": "reward_model.ground_truth"}]))
    assert [row["answer"] for row in made] == ["34", None]
    deep = {"type": kind, **place, "answer": "extra.index.at"}
    assert [row["answer"] for row in run_prompts(make_config(tmp_path, [deep], name="deep"))[0]] == ["1", None]


def test_a_column_of_the_whole_name_comes_before_a_path(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "a": {"b": "inner"}, "a.b": "outer"}, {"prompt": "Bye", "a": {"b": "inner"}}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    made, _ = run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path), "answer": "a.b"}]))
    assert [row["answer"] for row in made] == ["outer", "inner"]


def test_rows_with_tools_are_asked_without_where_that_is_said(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "tools": [{"name": "search"}]}, {"prompt": "Bye", "tools": "[]"}, {"prompt": "a"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    made, _ = run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path), "tools": "drop"}]))
    assert [prompt_of(row) for row in made] == ["Hi", "Bye", "a"]
    write_jsonl(path, [{"prompt": "Hi", "tools": None}, {"prompt": "Bye", "tools": "[]"}])
    made, _ = run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path)}], name="none"))
    assert [prompt_of(row) for row in made] == ["Hi", "Bye"]


@pytest.mark.parametrize(
    ("verifier", "check"), [({}, "math"), ({"verifier": "exact"}, "exact"), ({"verifier": None}, None)]
)
def test_a_row_with_an_answer_says_how_it_is_checked(
    tmp_path: Path, verifier: dict[str, str | None], check: str | None
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "1"}, {"prompt": "b"}])
    rows, manifest = run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path), **verifier}]))
    assert [row["verification"] for row in rows] == [None if check is None else json.dumps({"type": check}), None]
    assert manifest.counters["not_verifiable"] == 1 + (check is None)


def test_jsonl_line_numbers_hold_over_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "Gr\xc3\xbc\xc3\x9fe"}\r\n\r\n{"prompt": "b"}')
    rows, manifest = run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path)}]))
    assert [(prompt_of(row), row["source_row"]) for row in rows] == [("Grüße", 1), ("b", 3)]
    assert manifest.counters["rows"] == 2


def test_duplicates_are_kept_once_and_counted(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x", "answer": "1"}, {"prompt": "y"}, {"prompt": "x"}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"messages": [{"content": "y", "role": "user"}]}, {"prompt": "z"}])
    rows, manifest = run_prompts(
        make_config(tmp_path, [{"type": "jsonl", "path": str(first)}, {"type": "jsonl", "path": str(second)}])
    )
    assert [(prompt_of(r), r["answer"], r["source"], r["source_row"]) for r in rows] == [
        ("x", "1", "a.jsonl", 1),
        ("y", None, "a.jsonl", 2),
        ("z", None, "b.jsonl", 2),
    ]
    counted = {name: manifest.counters[name] for name in ("rows", "duplicates", "held_out", "train", "sources")}
    assert counted == {"rows": 5, "duplicates": 2, "held_out": 1, "train": 2, "sources": {"a.jsonl": 3, "b.jsonl": 2}}


def test_reasoning_gym_prompts_carry_answers(tmp_path: Path) -> None:
    source: dict[str, Any] = {
        "type": "reasoning_gym",
        "tasks": ["chain_sum", "letter_counting"],
        "size": 5,
        "seed": 3,
        "options": {"chain_sum": {"min_terms": 2, "max_terms": 2}},
        "system": "Answer with a number.",
    }
    rows, manifest = run_prompts(make_config(tmp_path, [source]))
    assert [(row["source"], row["source_row"]) for row in rows[4:6]] == [
        ("reasoning_gym:chain_sum", 5),
        ("reasoning_gym:letter_counting", 1),
    ]
    assert manifest.counters["sources"] == {"reasoning_gym:chain_sum": 5, "reasoning_gym:letter_counting": 5}
    assert manifest.counters["not_verifiable"] == 0
    for row in rows[:5]:
        check = json.loads(row["verification"])
        assert (check["type"], check["task"], check["options"]) == (
            "reasoning_gym",
            "chain_sum",
            source["options"]["chain_sum"],
        )
        assert (check["entry"]["question"], check["entry"]["answer"]) == (prompt_of(row), row["answer"])
        assert row["messages"][0] == {"role": "system", "content": "Answer with a number."}
        expression = prompt_of(row).split(":")[1].strip(" =")
        left, sign, right = expression.split()
        assert int(row["answer"]) == int(left) + (int(right) if sign == "+" else -int(right))


def test_reasoning_gym_repeats_where_a_plain_process_would_not(tmp_path: Path) -> None:
    # word_ladder and ransom_note follow the hash seed of the process that makes them.
    source = {"type": "reasoning_gym", "tasks": ["ransom_note", "word_ladder"], "size": 4}
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.tasks.test_prompts import make_config, run_prompts\n"
        f"_, manifest = run_prompts(make_config(Path({str(tmp_path)!r}), [{source!r}], name=sys.argv[1]))\n"
        "print(manifest.outputs[0].sha256)"
    )
    hashes = [
        subprocess.run(
            [sys.executable, "-c", program, name],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for name, hash_seed in [("one", "1"), ("two", "2")]
    ]
    assert hashes[0] == hashes[1]


def test_a_failed_stage_leaves_no_table_and_no_manifest(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": ""}, {"prompt": "y"}])
    config = make_config(tmp_path, [{"type": "jsonl", "path": str(path)}])
    with pytest.raises(PromptError):
        run_prompts(config)
    store = RunStore.open(tmp_path / "runs" / "run")
    assert store.manifest(KEY) is None
    assert not list(store.path(KEY).glob("*.parquet"))
    write_jsonl(path, [{"prompt": "x"}, {"prompt": "y"}])
    assert len(run_prompts(config)[0]) == 2


def test_a_changed_file_makes_the_stage_stale(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "y"}])
    config = make_config(tmp_path, [{"type": "jsonl", "path": str(path)}])
    run_prompts(config)
    store = RunStore.create(config)
    assert current_manifest(store, config, KEY) is not None
    write_jsonl(path, [{"prompt": "x"}, {"prompt": "z"}])
    assert current_manifest(store, config, KEY) is None


def test_source_fingerprints_follow_content(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}])
    folder = tmp_path / "data"
    write_jsonl(folder / "train.jsonl", [{"prompt": "x"}])
    config = make_config(
        tmp_path,
        [
            {"type": "jsonl", "path": str(path)},
            {"type": "dataset", "dataset": str(folder)},
            {"type": "dataset", "dataset": "owner/asks", "revision": "v2"},
            {"type": "reasoning_gym", "tasks": ["chain_sum"]},
        ],
    )
    before = source_fingerprints(config)
    assert list(before) == [f"prompts.sources[{index}]" for index in range(4)]
    assert list(before.values())[2:] == ["owner/asks@v2", f"reasoning-gym=={version('reasoning-gym')}"]
    for changed, file in enumerate((path, folder / "train.jsonl")):
        write_jsonl(file, [{"prompt": "y"}])
        after = source_fingerprints(config)
        assert [key for key in after if after[key] != before[key]] == [f"prompts.sources[{changed}]"]
        before = after


@pytest.mark.parametrize("call", [source_fingerprints, run_prompts])
def test_a_missing_file_is_named_before_anything_is_read(tmp_path: Path, call: Callable[[RunConfig], object]) -> None:
    there = write_jsonl(tmp_path / "there.jsonl", [{"prompt": ""}])
    missing = tmp_path / "absent.jsonl"
    config = make_config(tmp_path, [{"type": "jsonl", "path": str(there)}, {"type": "jsonl", "path": str(missing)}])
    with pytest.raises(NPDError, match=r"absent\.jsonl: no such prompt file"):
        call(config)


def test_importing_and_running_the_stage_loads_no_torch(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"prompt": ["a", "b"]}).save_to_disk(str(tmp_path / "data"))
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.tasks.test_prompts import make_config, run_prompts\n"
        "assert not {'torch', 'datasets', 'reasoning_gym'} & set(sys.modules)\n"
        f"source = {{'type': 'dataset', 'dataset': {str(tmp_path / 'data')!r}}}\n"
        f"run_prompts(make_config(Path({str(tmp_path)!r}), [source]))\n"
        "assert 'datasets' in sys.modules and 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)


def test_the_everyday_prompts_are_distinct_plain_and_short(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "configs" / "prompts" / "everyday.jsonl"
    rows, manifest = run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path)}], held_out=48))
    assert manifest.counters["duplicates"] == 0
    assert len(rows) >= 300
    assert path.read_bytes().isascii()
    assert all(len(prompt_of(row)) <= 240 for row in rows)
    folded = {"".join(c for c in prompt_of(row).lower() if c.isalnum()) for row in rows}
    assert len(folded) == len(rows)


def test_a_config_file_finds_its_prompts_beside_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "configs" / "asks.jsonl", [{"prompt": "x"}, {"prompt": "y"}])
    (tmp_path / "configs" / "a.yaml").write_text(
        f"name: run\nroot: {tmp_path}/runs\nteacher: {{model: t}}\nstudent: {{model: s}}\n"
        "prompts: {held_out: 1, sources: [{type: jsonl, path: asks.jsonl}]}\n"
    )
    rows, _ = run_prompts(load_config(tmp_path / "configs" / "a.yaml"))
    assert [prompt_of(row) for row in rows] == ["x", "y"]
