"""Where models come from: folders and the Hub's cache, and what tells one from another."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from schemas.config import parse_config
from schemas.errors import ModelError
from tasks.graph import MODELS
from tasks.language_model.fingerprint import folder_fingerprint
from tasks.language_model.sources import find_source, resolved_models, teacher_model
from tasks.stage import plan
from tests.tasks.test_models import resolve
from tests.tiny_models import make_model, save_model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/at/all", "no such folder"),
        ("./weights.gguf", "no such GGUF file"),
        ("package://not_installed_at_all/x.gguf", "not installed"),
        ("package://numpy/x.gguf", "no such file in the package"),
    ],
)
def test_models_that_are_not_there(model: str, message: str) -> None:
    with pytest.raises(ModelError, match=f"teacher.model.*{message}"):
        find_source(model, "teacher.model")


def test_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config.json"):
        find_source(str(tmp_path), "teacher.model")


def test_changed_weights_change_the_fingerprint(tmp_path: Path, student_dir: Path) -> None:
    other = save_model(tmp_path / "other", make_model(seed=4))
    assert folder_fingerprint(student_dir, None) == folder_fingerprint(student_dir, None)
    assert folder_fingerprint(student_dir, None) != folder_fingerprint(other, None)


def test_trusted_code_counts_as_part_of_a_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "own", make_model(seed=4))
    (folder / "modeling.py").write_text("a = 1")
    prints = {code: folder_fingerprint(folder, None, code=code) for code in (False, True)}
    (folder / "modeling.py").write_text("a = 2")
    assert folder_fingerprint(folder, None) == prints[False]
    assert folder_fingerprint(folder, None, code=True) != prints[True]


def test_models_that_move_are_the_same_models(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = resolve(tmp_path, teacher_dir, {"model": str(student_dir)})
    moved = Path(shutil.copytree(teacher_dir, tmp_path / "elsewhere"))
    values = config.model_dump(mode="json")
    values["teacher"]["model"] = str(moved)
    there = parse_config(values)
    assert plan(store, there, MODELS).fingerprint == store.finished(MODELS).fingerprint
    assert teacher_model(store, there).path == str(moved)
    (moved / "config.json").write_text((moved / "config.json").read_text() + " ")
    assert plan(store, there, MODELS).fingerprint != store.finished(MODELS).fingerprint


def test_a_relative_teacher_that_is_not_here_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_dir: Path, student_dir: Path
) -> None:
    monkeypatch.chdir(teacher_dir.parent)
    store, config = resolve(tmp_path, teacher_dir.name, {"model": str(student_dir)})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=rf"teacher\.model: {teacher_dir.name}: no such folder in {tmp_path}, "):
        teacher_model(store, config)


def hub_cache(cache: Path, name: str, commit: str, folder: Path) -> Path:
    """Lay a model down as the Hub's client does; return the folder of its files."""
    place = cache / f"models--{name.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(folder, place / "snapshots" / commit))


def test_a_hub_teacher_is_found_by_its_commit_in_any_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_dir: Path, student_dir: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    first, second = tmp_path / "first", tmp_path / "second"
    there = hub_cache(first, "org/teacher", commit, teacher_dir)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(first))
    store, config = resolve(tmp_path, "org/teacher", {"model": str(student_dir)})
    assert resolved_models(store).teacher_commit == commit
    assert teacher_model(store, config).path == str(there)

    # Another host, or the same one after its cache was cleared; by now the branch is elsewhere.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(second))
    with pytest.raises(ModelError, match=r"teacher\.model: org/teacher: not a local folder, and the Hub could not"):
        teacher_model(store, config)
    there = hub_cache(second, "org/teacher", commit, teacher_dir)
    (second / "models--org--teacher" / "refs" / "main").write_text("f" * 40)
    assert teacher_model(store, config).path == str(there)


def test_a_hub_teacher_whose_cache_was_pruned_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, teacher_dir: Path, student_dir: Path
) -> None:
    there = hub_cache(tmp_path / "hub", "org/teacher", "0123456789abcdef0123456789abcdef01234567", teacher_dir)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    store, config = resolve(tmp_path, "org/teacher", {"model": str(student_dir)})
    weights = there / "model.safetensors"
    blob = weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "pruned")
    with pytest.raises(ModelError, match=r"teacher\.model: org/teacher: the Hub's cache has lost .*model\.safetensors"):
        teacher_model(store, config)

    download = huggingface_hub.snapshot_download

    def hub(name: str, **arguments: Any) -> str:
        if not arguments.get("local_files_only"):
            blob.rename(tmp_path / "pruned")
        return str(download(name, **arguments))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert teacher_model(store, config).path == str(there)


def test_code_from_another_repository_is_told_of(tmp_path: Path, teacher_dir: Path) -> None:
    folder = save_model(tmp_path / "tuned", make_model(seed=2, layers=2))
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values["auto_map"] = {"AutoModelForSequenceClassification": "org/base--modeling_base.Model"}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    for trusted in (True, False):
        student = {"model": str(folder), "trust_remote_code": trusted}
        store, _ = resolve(tmp_path / str(trusted), teacher_dir, student)
        warnings = store.finished(MODELS).counters.get("warnings", [])
        assert any("student.model: its code is not in its folder" in said for said in warnings) == trusted
