"""What names, manifests and links can and cannot reach from a run's folder.

Links are the user's: a run, or a part of it, may lie on another disk and is read through them. Nothing is written or
removed through the link of a file, and a link to a folder is removed without what it leads to.
"""

from pathlib import Path

import pytest
from pydantic import ValidationError

from flows.states import stage_key
from schemas.config import parse_config
from schemas.errors import ArtifactError, ConfigError, StorageError
from schemas.manifest import FileRecord
from schemas.run_lock import LOCK_NAME, STAGES_LOCK_NAME
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS
from tasks.graph import MODELS
from tasks.language_model.sources import ResolvedModels, teacher_model
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table

KEY = StageKey("prompts")


@pytest.mark.parametrize(
    "name",
    [".", "..", "a/b", "a\\b", "", "a.", ".hidden", "-x", "a b", "a\n", "a\0", "é", "x" * 101, "\x1b[2J", "a/.."],
)
def test_names_that_are_no_folder_of_the_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        make_config(tmp_path, name=name)


@pytest.mark.parametrize("name", ["a", "a.b", "qwen-1.5b_v2", "x" * 100])
def test_names_that_are(tmp_path: Path, name: str) -> None:
    store = RunStore.at(make_config(tmp_path, name=name))
    assert store.folder == tmp_path / name


@pytest.mark.parametrize(
    "root",
    ["", "a\x1b[2J", "a\nb", "s3://bucket/../other", "s3://b/./x", "s3://b/x?versions=1", "s3://b/x#y", "a\u202eb"],
)
def test_roots_that_are_no_place(tmp_path: Path, root: str) -> None:
    with pytest.raises(ConfigError, match="root"):
        parse_config(make_config(tmp_path).model_dump(mode="json") | {"root": root})


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "\\\\host\\x", "", "a\0b"])
def test_manifests_name_nothing_outside_the_run(path: str) -> None:
    with pytest.raises(ValidationError, match="leaves the run's folder"):
        FileRecord(path=path, sha256="0", bytes=0)


@pytest.mark.parametrize("stage", ["../prompts", "", "prompts/..", "/etc", "Prompts"])
def test_stages_are_those_of_the_loop(tmp_path: Path, stage: str) -> None:
    with pytest.raises(ConfigError, match="no such stage"):
        stage_key(make_config(tmp_path), stage, None)


@pytest.mark.parametrize("index", [-2, 2, 10**9])
def test_rounds_are_those_of_the_run(tmp_path: Path, index: int) -> None:
    with pytest.raises(ConfigError, match=f"no round {index}"):
        stage_key(make_config(tmp_path), "score", index)


@pytest.mark.parametrize("path", ["../teacher", "models/../../teacher", "..", "/etc"])
def test_a_converted_teacher_lies_inside_the_run(tmp_path: Path, path: str) -> None:
    config = make_config(tmp_path)
    store = make_store(tmp_path, config)
    finish_stage(store, MODELS, PROMPTS, [])
    found = ResolvedModels(
        teacher_path=path,
        teacher_commit=None,
        teacher_version="0",
        teacher_context=8,
        student_context=8,
        shared_vocab=9,
    )
    found.write(store, store.path(MODELS, "models.json"))
    with pytest.raises(ArtifactError, match=r"models\.json: teacher_path: leaves the run's folder"):
        teacher_model(store, config)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store = make_store(tmp_path, make_config(tmp_path))
    finish_stage(store, KEY, PROMPTS, [prompts_table({"a": "train", "b": "held_out"})])
    return store


def test_a_run_on_another_disk_is_read_through_links(store: RunStore, tmp_path: Path) -> None:
    part = store.part(KEY, 0)
    part.symlink_to(part.rename(tmp_path / "elsewhere.parquet"))
    link = tmp_path / "link"
    link.symlink_to(store.folder)
    assert RunStore.open(link).read_table(KEY, PROMPTS).num_rows == 2
    assert store.first_damage(store.finished(KEY)) is None


def test_a_link_to_another_file_is_damage(store: RunStore, tmp_path: Path) -> None:
    other = tmp_path / "other.parquet"
    other.write_bytes(b"x" * store.part(KEY, 0).stat().st_size)
    store.part(KEY, 0).unlink()
    store.part(KEY, 0).symlink_to(other)
    damage = store.first_damage(store.finished(KEY))
    assert damage is not None
    assert "part-00000.parquet" in damage


def test_nothing_is_written_through_a_files_link(store: RunStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    for path in (store.path(KEY, "notes.json"), store.part(KEY, 1)):
        path.symlink_to(outside)
    store.write_bytes(store.path(KEY, "notes.json"), b"{}")
    store.write_table(store.part(KEY, 1), prompts_table({"c": "train"}), PROMPTS)
    assert outside.read_text() == "mine"
    assert not store.path(KEY, "notes.json").is_symlink()
    assert store.path(KEY, "notes.json").read_bytes() == b"{}"


@pytest.mark.parametrize("name", [LOCK_NAME, STAGES_LOCK_NAME])
def test_no_lock_is_written_through_a_link(store: RunStore, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (store.folder / name).symlink_to(outside)
    with pytest.raises(StorageError, match=rf"{name}: is a link.* Remove the link"), store.lock.held():
        pass
    assert outside.read_text() == "mine"


def test_what_links_lead_to_is_not_removed(store: RunStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    store.path(KEY, "linked").symlink_to(outside)
    other = StageKey("generate", 0)
    store.path(other).parent.mkdir(parents=True)
    store.path(other).symlink_to(outside)
    store.begin(other, "a fingerprint")
    assert not store.path(other).is_symlink()
    store.supersede(KEY)
    store.drop_superseded()
    store.remove(store.path(other))
    assert (outside / "mine.txt").read_text() == "mine"
    assert not (store.folder / "superseded").exists()
