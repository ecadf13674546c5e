"""What a stage's fingerprint holds, and results of other runs that are taken over."""

from dataclasses import replace
from pathlib import Path

import pytest

from schemas.config import RunConfig
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import GENERATE, PROMPTS, score_schema
from tasks.graph import MODELS, STAGES
from tasks.stage import execute, plan, take_over
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table, rollout_table, score_table


def test_a_fingerprint_is_of_version_settings_sources_and_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "a"}\n', encoding="utf-8")
    config = make_config(tmp_path, prompts={"sources": [{"type": "jsonl", "path": str(asked)}]}, score={"top_k": 3})
    store = make_store(tmp_path, config)
    generate, score, key = (StageKey(stage, 0) for stage in ("generate", "score", "filter"))
    samples = rollout_table([[1], [2]], [[3], [4]])
    finish_stage(store, generate, GENERATE, [samples])
    finish_stage(store, score, score_schema(3, "float16"), [score_table(samples, [0.1, 0.2], top_k=3)])

    def fingerprint(changed: RunConfig = config) -> str:
        return plan(store, changed, key).fingerprint

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    with monkeypatch.context() as patch:
        patch.setitem(STAGES, "filter", replace(STAGES["filter"], version=STAGES["filter"].version + 1))
        seen.append(fingerprint())
    seen.append(fingerprint(config.model_copy(update={"pack": config.pack.model_copy(update={"max_tokens": 99})})))
    # An input of another fingerprint stands for other work, though it came to the same rows.
    before = store.finished(generate)
    store.finish(generate, before.model_copy(update={"fingerprint": "other"}))
    seen.append(fingerprint())
    # And one of the same fingerprint may have other rows: a GPU need not compute the same twice.
    finish_stage(store, generate, GENERATE, [samples.take([1, 0])])
    assert store.finished(generate).fingerprint == before.fingerprint
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)

    prompts = plan(store, config, StageKey("prompts")).fingerprint
    asked.write_text('{"prompt": "b"}\n', encoding="utf-8")
    assert plan(store, config, StageKey("prompts")).fingerprint != prompts


def resolved(root: Path, teacher: Path, student: Path) -> tuple[RunStore, RunConfig]:
    """Return a run with prompts, and what makes its models."""
    config = make_config(root, teacher={"model": str(teacher)}, student={"model": str(student)})
    store = make_store(root, config)
    finish_stage(store, StageKey("prompts"), PROMPTS, [prompts_table({"what is one": "train", "b": "held_out"})])
    return store, config


def test_a_result_of_equal_fingerprint_is_taken_over_whole(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lender, config = resolved(tmp_path / "lender", teacher_dir, student_dir)
    manifest = execute(lender, config, MODELS)
    store, own = resolved(tmp_path / "own", teacher_dir, student_dir)
    assert plan(store, own, MODELS).fingerprint == manifest.fingerprint

    def interrupted(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tasks.stage.shutil.copyfile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            take_over(store, own, MODELS, [lender])
    # A stage takes a folder that is there for whole.
    assert not store.path(MODELS, "student").exists()
    assert store.manifest(MODELS) is None

    # Nor does anything of the attempt stay.
    store.write_bytes(store.path(MODELS, ".seconds.json"), b"9")
    store.write_bytes(store.path(MODELS, "half.parquet"), b"9")
    assert take_over(store, own, MODELS, [lender]) == manifest == store.manifest(MODELS)
    assert store.first_damage(manifest) is None
    assert sorted(path.name for path in store.path(MODELS).iterdir()) == ["manifest.json", "models.json", "student"]


def test_what_was_finished_before_is_kept_when_another_result_is_taken_over(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    lender, config = resolved(tmp_path / "lender", teacher_dir, student_dir)
    execute(lender, config, MODELS)
    store, own = resolved(tmp_path / "own", teacher_dir, student_dir)
    other = own.student.model_copy(update={"model": str(teacher_dir)})
    execute(store, own.model_copy(update={"student": other}), MODELS)
    assert take_over(store, own, MODELS, [lender]) is not None
    assert store.superseded()


def test_another_result_is_not_taken_over(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    lender, config = resolved(tmp_path / "lender", teacher_dir, student_dir)
    execute(lender, config, MODELS)
    store, own = resolved(tmp_path / "own", teacher_dir, teacher_dir)
    assert take_over(store, own, MODELS, [lender]) is None
    # Nor one that is damaged, or not there.
    store, own = resolved(tmp_path / "other", teacher_dir, student_dir)
    lender.path(MODELS, "models.json").write_text("{}")
    assert take_over(store, own, MODELS, [lender, RunStore(tmp_path / "nowhere")]) is None
