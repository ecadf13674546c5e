"""Which prompts are held out, and which are taken."""

import random
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import PromptError
from tests.tasks.prompt_files import held_out, make_config, run_prompts, write_jsonl


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{n}"} for n in range(50)])
    sources = [{"type": "jsonl", "path": str(path)}]

    def table_hash(name: str, seed: int) -> str:
        config = make_config(tmp_path, sources, seed=seed, name=name, held_out=10)
        return run_prompts(config)[1].outputs[0].sha256

    assert table_hash("one", 7) == table_hash("two", 7) != table_hash("three", 8)


def test_held_out_prompts_do_not_depend_on_the_order_of_sources_or_rows(tmp_path: Path) -> None:
    texts = [f"question {n}" for n in range(60)]
    halves = [write_jsonl(tmp_path / f"{n}.jsonl", [{"prompt": t} for t in texts[n::2]]) for n in (0, 1)]
    shuffled = random.Random(0).sample(texts, len(texts))
    whole = write_jsonl(tmp_path / "all.jsonl", [{"prompt": t} for t in shuffled])

    def chosen(name: str, paths: list[Path], limit: int | None) -> tuple[set[str], set[str]]:
        sources = [{"type": "jsonl", "path": str(path)} for path in paths]
        rows, _ = run_prompts(make_config(tmp_path, sources, name=name, held_out=12, limit=limit))
        return held_out(rows), {row["prompt_id"] for row in rows}

    for limit in (None, 30):
        forward, backward, joined = (
            chosen(f"{name}{limit}", paths, limit)
            for name, paths in [("f", halves), ("b", halves[::-1]), ("j", [whole])]
        )
        assert forward == backward == joined
        assert (len(forward[0]), len(forward[1])) == (12, limit or 60)


def test_a_limit_keeps_reading_order_and_the_held_out_prompts(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{n}"} for n in range(40)])
    sources = [{"type": "jsonl", "path": str(path)}]
    everything, _ = run_prompts(make_config(tmp_path, sources, name="all", held_out=5))
    some, manifest = run_prompts(make_config(tmp_path, sources, name="some", held_out=5, limit=20))
    assert held_out(some) == held_out(everything)
    assert [row["source_row"] for row in some] == sorted(row["source_row"] for row in some)
    assert [row["source_row"] for row in some] != list(range(1, 21))
    assert manifest.counters["left_out_by_limit"] == 20


def test_no_prompt_is_in_both_splits_whatever_the_sources(tmp_path: Path) -> None:
    for trial in range(25):
        draw = random.Random(trial)
        texts = [f"t{draw.randrange(30)}" for _ in range(draw.randrange(20, 80))]
        cut = draw.randrange(1, len(texts))
        sources = [
            {"type": "jsonl", "path": str(write_jsonl(tmp_path / f"{trial}-{i}.jsonl", [{"prompt": t} for t in part]))}
            for i, part in enumerate((texts[:cut], texts[cut:]))
        ]
        size = draw.randrange(1, len(set(texts)))
        limit = draw.choice([None, draw.randrange(size + 1, 100)])
        rows, manifest = run_prompts(
            make_config(tmp_path, sources, seed=trial, name=f"run{trial}", held_out=size, limit=limit)
        )
        train = {row["prompt_id"] for row in rows if row["split"] == "train"}
        assert not train & held_out(rows)
        assert len(train) + len(held_out(rows)) == len(rows) == min(len(set(texts)), limit or 100)
        assert (len(held_out(rows)), len(train)) == (size, manifest.counters["train"])
        assert manifest.counters["duplicates"] == len(texts) - len(set(texts))


def test_a_prompt_in_the_words_of_a_held_out_one_is_not_trained_on(tmp_path: Path) -> None:
    def variants(number: int) -> list[dict[str, Any]]:
        say = {"role": "user", "content": f"Say  ＡB {number}!"}
        return [
            {"prompt": f"Say AB {number}!"},
            {"prompt": f"\n say\tab {number}! "},
            {"messages": [say]},
            {"prompt": f"SAY AB {number}!"},
        ]

    path = write_jsonl(tmp_path / "a.jsonl", [row for number in range(12) for row in variants(number)])
    rows, manifest = run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path)}], held_out=5))
    asked: dict[str, set[int]] = {"train": set(), "held_out": set()}
    for row in rows:
        asked[row["split"]].add((row["source_row"] - 1) // 4)
    assert len(held_out(rows)) == 5
    assert asked["train"]
    assert not asked["train"] & asked["held_out"]
    # None but those are left out, and variants of what is trained on are no harm.
    left = 48 - 4 * len(asked["held_out"])
    assert manifest.counters["train"] == left == sum(row["split"] == "train" for row in rows)
    assert manifest.counters["like_held_out"] == 48 - 5 - left


def test_another_system_message_makes_another_prompt(tmp_path: Path) -> None:
    text = {"role": "user", "content": "The house is red."}
    told = [{"role": "system", "content": f"Translate into {language}."} for language in ("French", "Dutch", "Thai")]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [system, text]} for system in told])
    _, manifest = run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path)}], held_out=1))
    assert (manifest.counters["train"], manifest.counters["like_held_out"]) == (2, 0)


def test_variants_of_held_out_prompts_alone_are_nothing_to_train_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Say it."}, {"prompt": "say it."}])
    with pytest.raises(PromptError, match=r"prompts\.held_out: .* in the same words, .*; lower it or add prompts"):
        run_prompts(make_config(tmp_path, [{"type": "jsonl", "path": str(path)}], held_out=1))


def test_held_out_that_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "x"}, {"prompt": "y"}])
    config = make_config(tmp_path, [{"type": "jsonl", "path": str(path)}], held_out=2)
    with pytest.raises(PromptError, match=r"prompts\.held_out: 2 of 2 distinct prompts leaves nothing to train on"):
        run_prompts(config)
