import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.config import RunConfig
from schemas.errors import ArtifactError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.stage import execute
from tests.tasks.training_runs import assert_same, metrics, random_packs, train_rounds, trained_weights, training_run


def test_two_rounds_of_n_epochs_equal_one_round_of_2n(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    packs = random_packs()
    two, config = training_run(tmp_path / "two", teacher_dir, student_dir, rounds=2, epochs=2, packs=packs)
    train_rounds(two, config)
    one, config = training_run(tmp_path / "one", teacher_dir, student_dir, rounds=1, epochs=4, packs=packs)
    execute(one, config, StageKey("train", 0))

    assert_same(trained_weights(two, 1), trained_weights(one, 0))
    together = pa.concat_tables([metrics(two, 0), metrics(two, 1)])
    columns = [name for name in together.column_names if name not in ("round", "policy_lag", "policy_kl")]
    assert together.select(columns).equals(metrics(one, 0).select(columns))
    # Only the second round's sampler is a newer one, which the student is nearer to in the end.
    assert together.column("policy_lag").to_pylist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert 0 < together.column("policy_kl")[-1].as_py() < metrics(one, 0).column("policy_kl")[-1].as_py()
    # It trained: the round moved the weights, and rounds are not restarts.
    assert any(not torch.equal(v, trained_weights(two, 0)[k]) for k, v in trained_weights(two, 1).items())
    assert together.column("step").to_pylist() == list(range(1, 9))


def test_lora_trains_adapters_over_rounds_and_exports_merged(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    packs = random_packs()
    runs = {}
    for rounds, epochs in ((2, 1), (1, 2)):
        store, config = training_run(
            tmp_path / str(rounds), teacher_dir, student_dir, rounds=rounds, epochs=epochs, packs=packs, lora={"r": 3}
        )
        for index in range(rounds):
            execute(store, config, StageKey("train", index))
            execute(store, config, StageKey("export", index))
        runs[rounds] = store
    adapters = [
        load_file(store.path(StageKey("train", last), "checkpoint", "adapter_model.safetensors"))
        for store, last in ((runs[2], 1), (runs[1], 0))
    ]
    assert_same(*adapters)
    assert any(value.abs().max() > 0 for name, value in adapters[0].items() if "lora_B" in name)
    exported = load_file(runs[1].path(StageKey("export", 0), "model", "model.safetensors"))
    start = load_file(student_dir / "model.safetensors")
    assert exported.keys() == start.keys()
    changed = {name for name in start if not torch.equal(exported[name].float(), start[name].bfloat16().float())}
    assert any("q_proj" in name for name in changed)
    assert not any("embed_tokens" in name for name in changed)


KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora dropout": {"lora": {"r": 3, "dropout": 0.3}},
    "attention dropout": {},
}
TRAIN = StageKey("train", 0)


def a_run(root: Path, teacher: Path, student: Path, kind: str, epochs: int = 3, **train: Any) -> Any:
    """Two optimizer steps an epoch; with kind `attention dropout` the student drops attention weights out."""
    if kind == "attention dropout":
        student = shutil.copytree(student, root / "student")
        config = json.loads((student / "config.json").read_text())
        (student / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))
    settings = KINDS[kind] | train
    return training_run(root, teacher, student, rounds=1, epochs=epochs, packs=random_packs(), **settings)


def results(store: RunStore) -> dict[str, bytes]:
    """Every byte a train stage left: weights, optimizer, schedule, step and log, random numbers, metrics."""
    folder = store.path(TRAIN)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Killed(BaseException):
    pass


def execute_until(store: RunStore, config: RunConfig, stop: int | None = None) -> list[int]:
    """Run the stage, or until it has done step ``stop`` and dies before that is saved; return the steps done."""
    seen: list[int] = []

    def on_steps(done: int, total: int, unit: str) -> None:
        seen.append(done)
        if done == stop:
            raise Killed

    with nullcontext() if stop is None else pytest.raises(Killed):
        execute(store, config, TRAIN, on_steps)
    return seen


@pytest.mark.parametrize(
    ("kind", "save_every"),
    [("full", 1), ("full", 2), ("full", 3), ("lora dropout", 1), ("lora dropout", 3), ("attention dropout", 1)],
)
def test_killed_at_any_step_it_continues_exactly(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, kind: str, save_every: int
) -> None:
    """Within epochs and at their ends, again and again: no more than ``save_every`` steps are repeated."""
    whole, config = a_run(tmp_path / "whole", teacher_dir, student_dir, kind, save_every_steps=100)
    execute(whole, config, TRAIN)
    killed, config = a_run(tmp_path / "killed", teacher_dir, student_dir, kind, save_every_steps=save_every)
    saved = 0
    for stop in (1, 3, 4, 6):
        assert execute_until(killed, config, stop) == list(range(saved + 1, stop + 1))
        saved = (stop - 1) // save_every * save_every
    assert execute_until(killed, config) == list(range(saved + 1, 7))
    assert results(killed) == results(whole)
    assert set(results(whole)) >= {"metrics.parquet", "checkpoint/optimizer.safetensors", "checkpoint/rng.json"}


@pytest.mark.parametrize("kind", ["lora dropout", "attention dropout"])
def test_dropout_makes_the_random_numbers_matter(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above would see it if they were not restored."""
    whole, config = a_run(tmp_path / "whole", teacher_dir, student_dir, kind)
    execute(whole, config, TRAIN)
    killed, config = a_run(tmp_path / "killed", teacher_dir, student_dir, kind, save_every_steps=1)
    execute_until(killed, config, 4)
    monkeypatch.setattr("tasks.checkpoint.restore_random", lambda folder, device, rank: None)
    execute(killed, config, TRAIN)
    assert not metrics(killed, 0).equals(metrics(whole, 0))


def test_how_often_to_save_is_the_configs_not_the_checkpoints(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = a_run(tmp_path, teacher_dir, student_dir, "full", save_every_steps=1)
    execute_until(store, config, 3)
    steps: list[str] = []
    writing = RunStore.writing_folder

    def noting(self: RunStore, path: Path) -> AbstractContextManager[Path]:
        steps.append(path.name)
        return writing(self, path)

    monkeypatch.setattr(RunStore, "writing_folder", noting)
    rarer = config.model_copy(update={"train": config.train.model_copy(update={"save_every_steps": 4})})
    execute(store, rarer, TRAIN)
    assert steps == ["checkpoint-4", "checkpoint-6"]


def crashing(monkeypatch: pytest.MonkeyPatch, crash_at: int, after: bool) -> list[str]:
    """Let the run die before or after the ``crash_at``-th change of its files; return the list it counts them in."""
    calls: list[str] = []

    def count(name: str, later: bool) -> None:
        if later == after and len(calls) - 1 == crash_at:
            raise Killed(name)

    def watch(name: str) -> None:
        original: Any = getattr(RunStore, name)

        def method(self: RunStore, *args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            count(name, False)
            result = original(self, *args, **kwargs)
            count(name, True)
            return result

        @contextmanager
        def folder(self: RunStore, path: Path) -> Iterator[Path]:
            calls.append(name)
            count(name, False)
            with original(self, path) as temporary:
                yield temporary
            count(name, True)

        monkeypatch.setattr(RunStore, name, folder if name == "writing_folder" else method)

    for name in ("write_table", "writing_folder", "move", "remove"):
        watch(name)
    return calls


def test_killed_at_any_change_of_its_files_it_continues_exactly(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    """Four steps, saved every second one: new checkpoint, the older one's end, metrics, last name, the rest's end."""
    whole, config = a_run(tmp_path / "whole", teacher_dir, student_dir, "full", epochs=2, save_every_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        calls = crashing(patch, -1, False)
        execute(whole, config, TRAIN)
    expected = [
        *["writing_folder", "writing_folder", "remove"],
        *["write_table", "remove", "move", "remove"],
        "remove",  # of the mark that the stage is at work, once its manifest is there
    ]
    assert calls == expected
    for index in range(len(calls) - 1):
        for after in (False, True):
            root = tmp_path / f"{index}-{after}"
            store, config = a_run(root, teacher_dir, student_dir, "full", epochs=2, save_every_steps=2)
            with pytest.MonkeyPatch.context() as patch:
                crashing(patch, index, after)
                with pytest.raises(Killed):
                    execute(store, config, TRAIN)
            assert len(execute_until(store, config)) <= (4 if index == 0 and not after else 2), (index, after)
            assert results(store) == results(whole), (index, after)
            assert not store.path(TRAIN, "checkpoints").exists()


@pytest.mark.parametrize("kind", ["full", "lora dropout"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, teacher_dir: Path, student_dir: Path, kind: str) -> None:
    store, config = a_run(tmp_path, teacher_dir, student_dir, kind, save_every_steps=1)
    execute_until(store, config, 4)
    folder = store.path(TRAIN, "checkpoints", "checkpoint-3")
    files = sorted(folder.iterdir())
    assert not [path for path in folder.parent.iterdir() if path != folder]
    for path in files:
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        for damage in (data[: len(data) // 2], b"", bytes(flipped), None):
            path.unlink() if damage is None else path.write_bytes(damage)
            with pytest.raises(ArtifactError) as error:
                execute(store, config, TRAIN)
            assert str(path) in str(error.value) or path.name == "checkpoint.json"
            assert f"delete {folder} and run" in str(error.value)
            path.write_bytes(data)
    index = folder / "checkpoint.json"
    written = json.loads(index.read_text())
    for change, problem in (({"step": 2}, "names another step than"), ({"version": 0}, "of version 0, not 1")):
        index.write_text(json.dumps(written | change))
        with pytest.raises(ArtifactError, match=rf"checkpoint\.json: {problem}"):
            execute(store, config, TRAIN)
    shutil.rmtree(folder)
    execute(store, config, TRAIN)
    assert store.finished(TRAIN).counters["policy_step"] == 6


def test_a_checkpoint_is_read_without_unpickling(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = a_run(tmp_path, teacher_dir, student_dir, "full", save_every_steps=1)
    execute_until(store, config, 3)
    folder = store.path(TRAIN, "checkpoints", "checkpoint-2")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    # What transformers itself would read.
    for name in (
        "pytorch_model.bin",
        "optimizer.pt",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "training_args.bin",
    ):
        (folder / name).write_bytes(pickle.dumps(Evil()))
    execute(store, config, TRAIN)
    execute(store, config, StageKey("export", 0))
    assert not marker.exists()


@pytest.mark.parametrize("file", ["model.safetensors", "adapter_model.safetensors", "adapter_config.json"])
def test_export_names_a_damaged_file(tmp_path: Path, teacher_dir: Path, student_dir: Path, file: str) -> None:
    kind = "full" if file == "model.safetensors" else "lora dropout"
    store, config = a_run(tmp_path, teacher_dir, student_dir, kind, epochs=1)
    execute(store, config, TRAIN)
    path = store.checkpoint(TRAIN) / file
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match=f"{file}: not a readable"):
        execute(store, config, StageKey("export", 0))
    if file.endswith(".safetensors"):
        save_file({"other": torch.zeros(2)}, path)
        with pytest.raises(ArtifactError, match=r"tensor `.*` is .*the model's is"):
            execute(store, config, StageKey("export", 0))
