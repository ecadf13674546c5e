"""The seconds in a manifest are those of all attempts at its stage."""

from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ArtifactError, StageError
from schemas.object_store import ObjectStore
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks import prompts, stage_clock
from tasks.graph import PROMPTS
from tasks.stage import StageJob, execute
from tasks.stage_clock import CLOCK_NAME, StageClock
from tasks.train.on_policy import train_on_policy
from tests.flows.test_process import prompts_config
from tests.run_fixtures import make_config, make_store


class Time:
    """Seconds that pass when they are told to."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    monkeypatch.setattr(stage_clock, "time", found)
    return found


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return make_store(tmp_path, prompts_config(tmp_path))


def test_an_attempt_counts_from_the_ones_before(store: RunStore, time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    config = store.config

    def fail(job: StageJob) -> None:
        time.now += 40
        job.progress(1, 2, "prompts")
        raise StageError("the disk burns")

    for attempt in range(2):
        with monkeypatch.context() as patch:
            patch.setattr("tasks.prompts.run", fail)
            with pytest.raises(StageError, match="burns"):
                execute(store, config, PROMPTS)
        assert store.path(PROMPTS, CLOCK_NAME).read_text() == f"{40.0 * (attempt + 1)}"

    def killed(job: StageJob) -> None:
        time.now += 31
        job.progress(1, 2, "prompts")
        time.now += 29
        raise SystemExit

    # Nobody tells a process that is killed: what counts is the last note.
    with monkeypatch.context() as patch:
        patch.setattr("tasks.prompts.run", killed)
        patch.setattr(StageClock, "interrupted", lambda self: None)
        with pytest.raises(SystemExit):
            execute(store, config, PROMPTS)
    assert store.path(PROMPTS, CLOCK_NAME).read_text() == "111.0"

    manifest = execute(store, config, PROMPTS)
    assert manifest.counters["seconds"] == 111.0
    assert not store.path(PROMPTS, CLOCK_NAME).exists()
    # From its start again, it is a stage of its own.
    store.supersede(PROMPTS)
    assert execute(store, config, PROMPTS).counters["seconds"] == 0.0


def test_a_stage_that_begins_anew_counts_its_last_attempt(
    store: RunStore, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(job: StageJob) -> None:
        time.now += 40
        raise StageError("the disk burns")

    with monkeypatch.context() as patch:
        patch.setattr("tasks.prompts.run", lost)
        with pytest.raises(StageError, match="burns"):
            execute(store, store.config, PROMPTS)
    assert store.path(PROMPTS, CLOCK_NAME).read_text() == "40.0"
    run = prompts.run

    def anew(job: StageJob) -> None:
        time.now += 2
        job.start_over()
        time.now += 3
        run(job)

    monkeypatch.setattr("tasks.prompts.run", anew)
    assert execute(store, store.config, PROMPTS).counters["seconds"] == 5.0


def test_on_policy_training_begins_anew(tmp_path: Path, time: Time) -> None:
    config = make_config(tmp_path, rounds=1, train={"on_policy": {}, "steps_per_round": 2})
    store, key = make_store(tmp_path, config), StageKey("train", 0)
    store.begin(key, "fingerprint")
    store.path(key, CLOCK_NAME).write_text("40.0")
    clock = StageClock(store, key, "fingerprint")
    time.now += 2
    # No stage has run that it needs.
    with pytest.raises(ArtifactError):
        train_on_policy(StageJob(store, config, key, clock=clock))
    assert clock.seconds == 2.0


@pytest.mark.parametrize("data", [b"", b"{", b'"9"', b"-1", b"1e400", b"NaN", b"[" * 9999, b"null", b"true"])
def test_a_damaged_note_counts_as_none(store: RunStore, data: bytes) -> None:
    store.begin(PROMPTS, "fingerprint")
    store.path(PROMPTS, CLOCK_NAME).write_bytes(data)
    assert StageClock(store, PROMPTS, "fingerprint").seconds < 2


def test_a_moment_is_not_worth_a_note(store: RunStore, time: Time) -> None:
    store.begin(PROMPTS, "fingerprint")
    clock = StageClock(store, PROMPTS, "fingerprint")
    time.now += 0.5
    clock.interrupted()
    assert not store.path(PROMPTS, CLOCK_NAME).exists()


def test_attempts_at_other_settings_count_for_nothing(store: RunStore) -> None:
    store.begin(PROMPTS, "fingerprint")
    store.path(PROMPTS, CLOCK_NAME).write_text("40.0")
    assert StageClock(store, PROMPTS, "fingerprint").seconds >= 40
    assert StageClock(store, PROMPTS, "another").seconds < 2


def test_a_note_stays_on_this_machine_and_outlives_a_new_beginning(
    tmp_path: Path, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is away would hold up the stage, which tells of its progress in its own thread."""
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "cache"))
    store = RunStore.create(prompts_config(tmp_path).model_copy(update={"root": f"memory:/{tmp_path}"}))
    note = store.path(PROMPTS, CLOCK_NAME)
    assert store.objects is not None

    def fail(job: StageJob) -> None:
        time.now += 31
        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, "write", unreachable)
            patch.setattr(ObjectStore, "upload", unreachable)
            job.progress(1, 2, "prompts")
        raise StageError("the disk burns")

    for attempt in range(3):
        with monkeypatch.context() as patch:
            patch.setattr("tasks.prompts.run", fail)
            with pytest.raises(StageError, match="burns"):
                execute(store, store.config, PROMPTS)
        assert note.read_text() == f"{31.0 * (attempt + 1)}"
    assert store.relative(note) not in store.objects.sizes()

    # A kill soon after the start, which has emptied the working copy.
    def killed(job: StageJob) -> None:
        job.progress(1, 2, "prompts")
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("tasks.prompts.run", killed)
        patch.setattr(StageClock, "interrupted", lambda self: None)
        with pytest.raises(SystemExit):
            execute(store, store.config, PROMPTS)
    assert execute(store, store.config, PROMPTS).counters["seconds"] == 93.0
    assert not note.exists()


def unreachable(*arguments: Any, **others: Any) -> None:
    raise AssertionError("nothing goes to the store")
