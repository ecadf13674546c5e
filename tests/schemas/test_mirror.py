"""Working copies of runs in an object store."""

from pathlib import Path
from typing import Any

import pytest

from schemas import local_files
from schemas.errors import ArtifactError
from schemas.object_store import ObjectStore
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS
from tests.run_fixtures import finish_stage, make_config, prompts_table

KEY, PROMPTS_KEY = StageKey("train", 0), StageKey("prompts")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """A new run in an object store, with a working copy."""
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "cache"))
    return RunStore.create(make_config(tmp_path).model_copy(update={"root": f"memory:/{tmp_path}"}))


def count_calls(monkeypatch: pytest.MonkeyPatch, method: str) -> list[str]:
    """Note the names of the objects that a method of ObjectStore is called with from now on."""
    called: list[str] = []
    original = getattr(ObjectStore, method)

    def noting(objects: ObjectStore, name: str, *arguments: Any) -> Any:
        called.append(name)
        return original(objects, name, *arguments)

    monkeypatch.setattr(ObjectStore, method, noting)
    return called


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


def test_no_object_gets_out_of_the_working_copy(store: RunStore, tmp_path: Path) -> None:
    """Whoever may write to the bucket, not this project, names such an object."""
    store.begin(KEY, "f")
    assert store.objects is not None
    for name in (".whole-..", "../../../../escaped.txt"):
        store.objects.write(f"{KEY.folder}/{name}", b"")
    with pytest.raises(ArtifactError, match=r"\.\./escaped\.txt: no run writes such an object; delete it"):
        store.begin(KEY, "f")
    assert not list(tmp_path.rglob("escaped.txt"))


def prompts_of(store: RunStore) -> list[str]:
    names: list[str] = store.read_table(PROMPTS_KEY, PROMPTS).column("prompt_id").to_pylist()
    return names


def test_a_stage_of_many_files_is_read_with_its_manifest_once(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"p{index}" for index in range(20)]
    finish_stage(store, PROMPTS_KEY, PROMPTS, [prompts_table({name: "train"}) for name in names])
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "elsewhere"))
    reader = RunStore(store.url)
    read, downloaded = count_calls(monkeypatch, "read"), count_calls(monkeypatch, "download")
    assert prompts_of(reader) == names
    assert read == [f"{PROMPTS_KEY.folder}/manifest.json"]
    assert downloaded == [reader.relative(reader.part(PROMPTS_KEY, index)) for index in range(20)]
    for path in reader.table_files(PROMPTS_KEY):
        reader.read_part(path, PROMPTS)
    assert len(read) == 2
    assert len(downloaded) == 20


def test_a_stage_that_another_process_runs_again_is_read_as_it_is_now(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_stage(store, PROMPTS_KEY, PROMPTS, [prompts_table({name: "train"}) for name in "ab"])
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "elsewhere"))
    reader = RunStore(store.url)
    first, second, third = (reader.part(PROMPTS_KEY, index) for index in range(3))
    assert reader.read_part(first, PROMPTS).column("prompt_id").to_pylist() == ["a"]

    finish_stage(store, PROMPTS_KEY, PROMPTS, [prompts_table({name: "train"}) for name in "cde"])
    read = count_calls(monkeypatch, "read")
    # Of a name that it has not read yet, of one that is new, and of one that it has read before.
    assert reader.read_part(second, PROMPTS).column("prompt_id").to_pylist() == ["d"]
    assert len(read) == 1
    assert reader.read_part(third, PROMPTS).column("prompt_id").to_pylist() == ["e"]
    assert reader.read_part(first, PROMPTS).column("prompt_id").to_pylist() == ["c"]
    assert len(read) == 1
    assert prompts_of(reader) == ["c", "d", "e"]

    store.supersede(PROMPTS_KEY)
    with pytest.raises(ArtifactError, match="has not finished"):
        prompts_of(reader)


def test_a_folder_that_is_fetched_holds_nothing_of_an_earlier_result(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(*names: str) -> None:
        manifest = finish_stage(store, KEY, PROMPTS, [])
        with store.writing_folder(store.path(KEY, "model")) as folder:
            for name in names:
                (folder / name).write_text(name)
        store.finish(KEY, manifest.model_copy(update={"outputs": store.outputs(KEY)}))

    export("config.json", "model.safetensors")
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "elsewhere"))
    reader = RunStore(store.url)
    folder = reader.fetch(reader.path(KEY, "model"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    export("config.json", "model-00001-of-00001.safetensors")
    # Another process is fetching, too.
    (folder / ".tmp-0").touch()
    reader.fetch(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        ".tmp-0",
        "config.json",
        "model-00001-of-00001.safetensors",
    ]


def test_bytes_that_no_manifest_names_are_an_error_and_leave_the_copy_there_is(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_stage(store, PROMPTS_KEY, PROMPTS, [prompts_table({"a": "train"})])
    name = store.relative(store.part(PROMPTS_KEY, 0))
    objects = store.objects
    assert objects is not None
    objects.write(name, b"other bytes")
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "elsewhere"))
    reader = RunStore(store.url)
    copy = reader.part(PROMPTS_KEY, 0)
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"what is read meanwhile")
    with pytest.raises(ArtifactError, match=f"{name}: its bytes are not those the manifest recorded"):
        reader.read_part(copy, PROMPTS)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    objects.delete(name)
    with pytest.raises(ArtifactError, match=f"{name}: missing"):
        reader.read_part(copy, PROMPTS)


@pytest.mark.parametrize(
    ("here", "there", "then"),
    [
        (None, None, None),
        (b"one", None, b"one"),
        (None, b"one", b"one"),
        (b"one", b"one, two", b"one, two"),
        (b"one, two", b"one", b"one, two"),
        # What this machine could not upload is kept, after what others did.
        (b"one, mine", b"one, two", b"one, twomine"),
    ],
)
def test_what_several_machines_append_to_a_file_is_all_kept(
    store: RunStore, here: bytes | None, there: bytes | None, then: bytes | None
) -> None:
    path = store.folder / "logs" / "prompts.log"
    path.parent.mkdir(parents=True)
    if here is not None:
        path.write_bytes(here)
    if there is not None:
        assert store.objects is not None
        store.objects.write("logs/prompts.log", there)
    store.continue_file(path)
    assert (path.read_bytes() if path.is_file() else None) == then
