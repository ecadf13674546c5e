"""The seconds in a manifest are those of all attempts at its stage."""

from pathlib import Path

import pytest

from schemas.errors import StageError
from schemas.run_store import RunStore
from tasks import stage_clock
from tasks.graph import PROMPTS
from tasks.stage import StageJob, execute
from tasks.stage_clock import CLOCK_NAME, StageClock
from tests.flows.test_process import prompts_config
from tests.run_fixtures import make_store


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


@pytest.mark.parametrize("data", [b"", b"{", b'"9"', b"-1", b"1e400", b"NaN", b"[" * 9999, b"null", b"true"])
def test_a_damaged_note_counts_as_none(store: RunStore, data: bytes) -> None:
    store.begin(PROMPTS, "fingerprint")
    store.path(PROMPTS, CLOCK_NAME).write_bytes(data)
    assert StageClock(store, PROMPTS).seconds < 2


def test_a_moment_is_not_worth_a_note(store: RunStore, time: Time) -> None:
    store.begin(PROMPTS, "fingerprint")
    clock = StageClock(store, PROMPTS)
    time.now += 0.5
    clock.interrupted()
    assert not store.path(PROMPTS, CLOCK_NAME).exists()
