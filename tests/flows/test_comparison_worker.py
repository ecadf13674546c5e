import threading
from pathlib import Path

import pytest

from flows.comparison_worker import Worker
from flows.process import RUN
from schemas.errors import StageError
from schemas.run_store import RunStore
from tests.run_fixtures import make_config


@pytest.mark.parametrize("message", ["nothing is left to train on", "its process died. What it printed: {log}"])
def test_a_failed_run_names_its_log_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    store = RunStore(tmp_path / "run")
    log = str(store.log(RUN))

    def fail(*arguments: object) -> None:
        raise StageError(message.format(log=log))

    monkeypatch.setattr("flows.comparison_worker.stands", lambda *arguments: False)
    monkeypatch.setattr("flows.comparison_worker.run_stages_in_process", fail)
    worker = Worker(threading.BoundedSemaphore(1), 1, None)
    with pytest.raises(StageError) as failed:
        worker.settle(store, make_config(tmp_path), "npd", [])
    assert str(failed.value).count(log) == 1
