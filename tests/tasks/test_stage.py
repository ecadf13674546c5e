"""Results of other runs that are taken over."""

from pathlib import Path

import pytest

from schemas.config import RunConfig
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS
from tasks.graph import MODELS
from tasks.stage import execute, plan, take_over
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table


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
