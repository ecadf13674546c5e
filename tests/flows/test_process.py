import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import cache, partial
from pathlib import Path

import psutil
import pytest

from flows.process import cancelling, run_in_process, threads_of
from flows.stage_process import fork_server
from schemas.config import RunConfig
from schemas.errors import PromptError, RunLockedError, StageError, StorageError
from schemas.run_lock import LOCK_NAME, StoreLease
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from tasks.graph import PROMPTS
from tasks.process import Job, describe_failure
from tests.faults.object_server import ObjectServer
from tests.faults.test_disks import largest_file
from tests.run_fixtures import make_config, make_store

SECONDS = 300.0
"""Limit of every wait: what is waited for takes a few, and much longer where the machine is busy."""


def prompts_config(tmp_path: Path, *, rows: int = 8) -> RunConfig:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "question {n}"}}\n' for n in range(rows)), encoding="utf-8")
    return make_config(tmp_path, prompts={"sources": [{"type": "jsonl", "path": str(file)}], "held_out": 2})


def endless_config(tmp_path: Path) -> RunConfig:
    """A run whose prompts stage works for far longer than any test waits."""
    source = {"type": "reasoning_gym", "tasks": ["basic_arithmetic"], "size": 50_000_000}
    return make_config(tmp_path, prompts={"sources": [source], "held_out": 2})


def silent_config(tmp_path: Path) -> RunConfig:
    """A run whose prompts stage has no prompt to tell of for minutes: its first number is a prime."""
    options = {"prime_factorization": {"min_value": 2**62 - 57, "max_value": 2**62 - 57}}
    source = {"type": "reasoning_gym", "tasks": ["prime_factorization"], "size": 2, "options": options}
    return make_config(tmp_path, prompts={"sources": [source], "held_out": 1})


def child_of(store: RunStore) -> int:
    """Wait for the process of stage prompts and return its id, as the log tells it."""
    log = store.log(PROMPTS)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if log.is_file() and " · process " in (text := log.read_text()):
            return int(text.split(" · process ")[1].split()[0])
        time.sleep(0.05)
    raise AssertionError(f"{log}: no process was started")


def worker_of(process: int) -> int:
    """Wait until a process has started one of its own, and return its id."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if children := psutil.Process(process).children():
            return int(children[0].pid)
        time.sleep(0.05)
    raise AssertionError(f"{process} has started nothing")


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    # An orphan that nobody has reaped yet is a zombie: it does not run.
    return not stat.is_file() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(process: int) -> bool:
    deadline = time.monotonic() + SECONDS
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(process)


def test_a_stage_in_its_own_process_leaves_its_manifest_and_tells_its_progress(tmp_path: Path) -> None:
    config = prompts_config(tmp_path)
    store = make_store(tmp_path, config)
    heard: list[tuple[int, int, str]] = []
    manifest = run_in_process(store, config, PROMPTS, lambda *progress: heard.append(progress))
    assert manifest == store.manifest(PROMPTS)
    assert [record.rows for record in manifest.outputs] == [8]
    done, total, unit = heard[-1]
    assert done == total
    assert unit == "prompts"
    assert not is_running(child_of(store))


def test_a_typed_error_crosses_the_process_as_the_same_class(tmp_path: Path) -> None:
    config = prompts_config(tmp_path)
    store = make_store(tmp_path, config)
    (tmp_path / "prompts.jsonl").unlink()
    with pytest.raises(PromptError, match=r"prompts\.jsonl"):
        run_in_process(store, config, PROMPTS)
    assert store.manifest(PROMPTS) is None
    assert "Traceback" in store.log(PROMPTS).read_text()


def test_any_other_error_becomes_a_stage_error_that_names_the_log(tmp_path: Path) -> None:
    config = prompts_config(tmp_path)
    store = make_store(tmp_path, config)
    store.path(PROMPTS).write_text("a file where the stage's folder should be")
    with pytest.raises(StageError, match=r"`prompts` failed: .*Error.*prompts\.log") as caught:
        run_in_process(store, config, PROMPTS)
    assert type(caught.value) is StageError
    assert "Traceback" in store.log(PROMPTS).read_text()


def test_a_killed_process_fails_its_stage_and_says_what_to_lower(tmp_path: Path) -> None:
    config = endless_config(tmp_path)
    store = make_store(tmp_path, config)
    killer = threading.Thread(target=lambda: os.kill(child_of(store), signal.SIGKILL))
    killer.start()
    with pytest.raises(StageError, match=r"killed \(signal 9\), most likely out of memory.*prompts\.log"):
        run_in_process(store, config, PROMPTS)
    killer.join()
    assert store.manifest(PROMPTS) is None


def test_a_log_that_takes_no_more_is_an_error_that_says_so(tmp_path: Path) -> None:
    config = prompts_config(tmp_path)
    store = make_store(tmp_path, config)
    # What it starts later would keep the limit.
    fork_server()
    with largest_file(0), pytest.raises(StorageError, match=r"prompts\.log: the file is larger than.*continues"):
        run_in_process(store, config, PROMPTS)


def test_no_log_is_written_through_a_link(tmp_path: Path) -> None:
    config = prompts_config(tmp_path)
    store = make_store(tmp_path, config)
    outside = tmp_path / "outside.txt"
    store.log(PROMPTS).parent.mkdir()
    store.log(PROMPTS).symlink_to(outside)
    with pytest.raises(StorageError, match=r"prompts\.log: is a link"):
        run_in_process(store, config, PROMPTS)
    assert not outside.exists()


def test_an_error_is_told_where_the_log_takes_no_traceback(tmp_path: Path) -> None:
    config = prompts_config(tmp_path)
    store = make_store(tmp_path, config)
    (tmp_path / "prompts.jsonl").unlink()
    reading, writing = os.pipe()
    with os.fdopen(reading) as events, Path("/dev/full").open("wb") as log:
        command = [sys.executable, "-m", "tasks.process", str(writing)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(writing,))
        os.close(writing)
        assert process.stdin is not None
        process.stdin.write(Job(store.url, config.model_dump(mode="json"), [("prompts", None)], "log").to_line())
        process.stdin.flush()
        told = [json.loads(line) for line in events]
        process.communicate(timeout=SECONDS)
    assert told[-1]["type"] == "PromptError"


def test_an_interrupt_ends_the_child(tmp_path: Path) -> None:
    config = endless_config(tmp_path)
    store = make_store(tmp_path, config)

    def interrupt(done: int, total: int, unit: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_process(store, config, PROMPTS, interrupt)
    assert not is_running(child_of(store))


def test_a_cancelled_stage_ends_with_its_child(tmp_path: Path) -> None:
    config = endless_config(tmp_path)
    store = make_store(tmp_path, config)
    cancelled = threading.Event()

    def cancel() -> None:
        child_of(store)
        cancelled.set()

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with cancelling(cancelled), pytest.raises(StageError, match=r"cancelled.*continues where it stopped"):
        run_in_process(store, config, PROMPTS)
    canceller.join()
    assert not is_running(child_of(store))


def test_a_log_that_cannot_be_uploaded_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = prompts_config(tmp_path)
    store = make_store(tmp_path, config)

    def away(key: StageKey) -> None:
        raise StorageError("the store is away")

    monkeypatch.setattr(store, "upload_log", away)
    run_in_process(store, config, PROMPTS)
    assert f"{store.log(PROMPTS)}" in caplog.text
    assert "the store is away" in caplog.text
    (tmp_path / "prompts.jsonl").unlink()
    with pytest.raises(PromptError, match=r"prompts\.jsonl"):
        run_in_process(store, config, PROMPTS)


def test_a_stages_log_in_a_bucket_tells_what_other_machines_printed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "cache"))
    # Stages have the environment of the process that forks them.
    monkeypatch.setattr("flows.stage_process._servers", cache(lambda owner: []))
    with ObjectServer() as server, server.reachable():
        config = prompts_config(tmp_path).model_copy(update={"root": server.bucket})
        store = RunStore.create(config)
        assert store.objects is not None
        name, others = store.relative(store.log(PROMPTS)), b"of another machine\n"
        store.objects.write(name, others)
        with store.lock.held():
            run_in_process(store, config, PROMPTS)
        kept = store.objects.read(name)
        assert kept == store.log(PROMPTS).read_bytes()
        assert kept.startswith(others + "--- prompts · process ".encode())


def test_a_stage_ends_when_another_process_takes_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("schemas.run_lock.StoreLease", partial(StoreLease, renew=0.2))
    with ObjectServer() as server, server.reachable():
        config = endless_config(tmp_path).model_copy(update={"root": server.bucket})
        store = RunStore.create(config)

        def take() -> None:
            child_of(store)
            assert store.objects is not None
            store.objects.write(LOCK_NAME, b"somebody else's")

        taker = threading.Thread(target=take)
        with store.lock.held():
            taker.start()
            with pytest.raises(RunLockedError, match=r"another process has taken it.*continues"):
                run_in_process(store, config, PROMPTS)
            taker.join()
        assert not is_running(child_of(store))
        assert store.manifest(PROMPTS) is None


def test_stages_that_may_run_side_by_side_share_the_cores(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    overlap = make_config(tmp_path, overlap=True, rounds=3)
    half = max(1, cores // 2)
    expected = {
        StageKey("generate", 0): None,
        StageKey("train", WARMUP): None,
        StageKey("generate", 1): half,
        StageKey("score", 2): half,
        StageKey("train", 0): half,
        StageKey("train", 2): None,
        StageKey("models"): None,
    }
    assert {key: threads_of(overlap, key) for key in expected} == expected
    assert {threads_of(make_config(tmp_path), key) for key in expected} == {None}
    limited = make_config(tmp_path, devices={"cpu_threads": 3})
    assert {threads_of(limited, key) for key in expected} == {3}


def test_the_child_ends_when_its_parent_dies(tmp_path: Path) -> None:
    config = silent_config(tmp_path)
    store = make_store(tmp_path, config)
    code = (
        "import sys; from flows.process import run_in_process; from schemas.run_store import RunStore;"
        "from tasks.graph import PROMPTS; store = RunStore.open(sys.argv[1]);"
        "run_in_process(store, store.config, PROMPTS)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(store.folder)]) as parent:
        child = child_of(store)
        # At work: it has started a process of its own, and has nothing to tell its parent.
        own = worker_of(child)
        parent.kill()
    assert wait_until_gone(child)
    assert wait_until_gone(own)


def test_out_of_memory_errors_say_what_to_lower() -> None:
    error = type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")
    message = describe_failure(error, StageKey("score", 0), "score.log")["message"]
    assert "score.batch_tokens" in message
    assert "score.log" in message
    warm_up = describe_failure(MemoryError(), StageKey("train", WARMUP), "train.log")["message"]
    assert "warmup.loss_chunk" in warm_up
    assert "lora" not in warm_up


def test_a_job_survives_its_line() -> None:
    job = Job("runs/a", {"name": "a", "text": "two\nlines"}, [("train", WARMUP)], "log", threads=2)
    assert job.to_line().count(b"\n") == 1
    assert Job.from_line(job.to_line()) == job
