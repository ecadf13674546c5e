"""Working copies of runs in an object store."""

from pathlib import Path

import pytest

from schemas import local_files
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS
from tests.run_fixtures import make_config, prompts_table

KEY = StageKey("train", 0)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """A new run in an object store, with a working copy."""
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "cache"))
    return RunStore.create(make_config(tmp_path).model_copy(update={"root": f"memory:/{tmp_path}"}))


def fill(folder: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text(name)


def test_an_unfinished_stage_gets_back_its_whole_files_and_folders_and_nothing_else(store: RunStore) -> None:
    store.begin(KEY, "f")
    store.write_table(store.path(KEY, "metrics.parquet"), prompts_table({"a": "train"}), PROMPTS)
    for index in range(2):
        store.write_table(
            store.path(KEY, "rollouts", f"part-{index:05d}.parquet"), prompts_table({f"p{index}": "train"}), PROMPTS
        )
    with store.writing_folder(store.path(KEY, "checkpoints", "checkpoint-2")) as folder:
        fill(folder)
    # Killed between the files of a folder.
    half = store.path(KEY, "model")
    half.mkdir()
    fill(half)
    store.upload(half / "config.json")
    local_files.remove(store.folder)

    store.begin(KEY, "f")
    assert sorted(store.relative(path) for path in store.path(KEY).rglob("*") if path.is_file()) == [
        f"{KEY.folder}/{name}"
        for name in (
            ".partial.json",
            "checkpoints/checkpoint-2/config.json",
            "checkpoints/checkpoint-2/model.safetensors",
            "metrics.parquet",
            "rollouts/part-00000.parquet",
            "rollouts/part-00001.parquet",
        )
    ]
    assert not half.exists()
