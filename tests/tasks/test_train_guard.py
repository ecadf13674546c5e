import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from schemas.config import GuardConfig, RunConfig
from schemas.errors import StageError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.stage import execute
from tasks.train.guard import is_over_budget, policy_kls
from tests.tasks.training_runs import (
    assert_same,
    metrics,
    random_packs,
    train_rounds,
    trained_weights,
    training_run,
)

BUDGET = 1e-4


def guarded_run(
    root: Path, teacher: Path, student: Path, rounds: int = 1, save_every_steps: int = 100, **guard: Any
) -> tuple[RunStore, RunConfig]:
    """A budget that the first measurement exceeds; two optimizer steps an epoch, three epochs a round."""
    settings = {"max_policy_kl": BUDGET, "every_steps": 2, **guard}
    return training_run(
        root,
        teacher,
        student,
        rounds=rounds,
        epochs=3,
        packs=random_packs(),
        guard=settings,
        save_every_steps=save_every_steps,
    )


def test_guard_warns_once_and_changes_nothing(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    stores = {}
    guards: dict[str, dict[str, Any]] = {
        "warned": {},
        "off": {"max_policy_kl": None},
        "wide": {"max_policy_kl": 50.0},
        "rare": {"every_steps": 7},
    }
    warned_at = {"warned": [2], "off": [], "wide": [], "rare": [6]}
    for name, guard in guards.items():
        stores[name], config = guarded_run(tmp_path / name, teacher_dir, student_dir, **guard)
        execute(stores[name], config, StageKey("train", 0))
        warnings = stores[name].finished(StageKey("train", 0)).counters.get("warnings", [])
        assert len(warnings) == len(warned_at[name])
        for warning, step in zip(warnings, warned_at[name], strict=True):
            assert f"optimizer step {step} " in warning
            assert "train.guard.max_policy_kl" in warning
    assert_same(trained_weights(stores["warned"], 0), trained_weights(stores["off"], 0))


def test_guard_warns_of_the_same_step_when_it_was_killed_after_it(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    key = StageKey("train", 0)
    store, config = guarded_run(tmp_path / "whole", teacher_dir, student_dir)
    execute(store, config, key)
    killed, config = guarded_run(tmp_path / "killed", teacher_dir, student_dir, save_every_steps=1)

    def die_at_five(done: int, total: int, unit: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(killed, config, key, die_at_five)
    execute(killed, config, key)
    assert killed.finished(key).counters["warnings"] == store.finished(key).counters["warnings"]


def test_guard_refreshes_early_and_the_last_round_trains_what_is_left(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = guarded_run(tmp_path / "a", teacher_dir, student_dir, rounds=2, action="refresh")
    train_rounds(store, config)
    first, last = (store.finished(StageKey("train", index)).counters for index in range(2))
    assert (first["policy_step"], first["epochs_done"]) == (2, 1.0)
    # Six epochs in all, two steps each; over budget again, but there is no sampler left to refresh.
    assert (last["policy_step"], last["epochs"], last["epochs_done"]) == (12, 5.0, 6.0)
    assert last["warnings"]
    steps = pa.concat_tables([metrics(store, 0), metrics(store, 1)])
    assert steps.column("step").to_pylist() == list(range(1, 13))
    assert steps.column("learning_rate").to_pylist()[-1] > config.train.min_learning_rate

    # Killed after the round's last checkpoint, before its manifest: it does not train on.
    again, config = guarded_run(tmp_path / "b", teacher_dir, student_dir, rounds=2, action="refresh")
    with monkeypatch.context() as patch:
        patch.setattr(RunStore, "write_table", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute(again, config, StageKey("train", 0))
    seen: list[int] = []
    execute(again, config, StageKey("train", 0), lambda done, total, unit: seen.append(done))
    assert seen == []
    assert_same(trained_weights(again, 0), trained_weights(store, 0))
    assert metrics(again, 0).equals(metrics(store, 0))


def test_guard_stops_and_a_higher_budget_goes_on_from_there(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    store, config = guarded_run(tmp_path / "a", teacher_dir, student_dir, action="stop")
    for _ in range(2):
        with pytest.raises(StageError, match=r"optimizer step 2 .*`train.guard.max_policy_kl` is 0.0001"):
            execute(store, config, StageKey("train", 0))
    assert store.manifest(StageKey("train", 0)) is None
    raised = config.train.guard.model_copy(update={"max_policy_kl": 1e9})
    higher = config.model_copy(update={"train": config.train.model_copy(update={"guard": raised})})
    seen: list[int] = []
    execute(store, higher, StageKey("train", 0), lambda done, total, unit: seen.append(done))
    assert seen == [3, 4, 5, 6]
    free, config = guarded_run(tmp_path / "b", teacher_dir, student_dir, max_policy_kl=None)
    execute(free, config, StageKey("train", 0))
    assert_same(trained_weights(store, 0), trained_weights(free, 0))


def test_policy_kl_is_measured_every_so_often_and_at_the_end(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    store, config = guarded_run(tmp_path, teacher_dir, student_dir, every_steps=4)
    execute(store, config, StageKey("train", 0))
    kl = metrics(store, 0).column("policy_kl").to_pylist()
    assert [step for step, value in enumerate(kl, 1) if value is not None] == [4, 6]
    assert kl[3] > 0


def test_the_distance_is_measured_without_dropout(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    """A student that drops attention weights out and does not move stays where its sampler is."""
    student = Path(shutil.copytree(student_dir, tmp_path / "student"))
    values = json.loads((student / "config.json").read_text(encoding="utf-8")) | {"attention_dropout": 0.3}
    (student / "config.json").write_text(json.dumps(values), encoding="utf-8")
    still: dict[str, Any] = {"learning_rate": 1e-12, "min_learning_rate": 0.0, "guard": {"every_steps": 1}}
    store, config = training_run(tmp_path, teacher_dir, student, rounds=1, epochs=1, packs=random_packs(), **still)
    execute(store, config, StageKey("train", 0))
    assert max(metrics(store, 0).column("policy_kl").to_pylist()) < 1e-6


def test_a_round_is_judged_by_its_own_newest_measurement() -> None:
    guard = GuardConfig(max_policy_kl=0.1)
    history = [
        {"step": 1, "policy_kl": 9.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "policy_kl": 0.2},
        {"step": 4, "loss": 0.5},
        {"step": 5, "policy_kl": 0.05},
        {"step": 5, "train_runtime": 1.0},
    ]
    assert policy_kls(history, 1) == [(3, 0.2), (5, 0.05)]
    assert is_over_budget(history[:4], 1, guard)
    assert not is_over_budget(history, 1, guard)
    assert not is_over_budget(history[:2], 1, guard)
    assert not is_over_budget(history[:4], 1, GuardConfig(max_policy_kl=None))
