import gc
import multiprocessing
import multiprocessing.forkserver
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As many processes as cores run tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray reads these when it is imported; without a token it would write one into the user's home.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())
# What Prefect's server for the tests wants of whoever asks it; Prefect reads it when it is imported.
PREFECT_AUTH = os.environ["PREFECT_API_AUTH_STRING"] = f"tests:{os.urandom(16).hex()}"
# Else its workers give way to all other processes of the machine.
os.environ.setdefault("RAY_worker_niceness", "0")

_CHILDREN = str(Path(__file__).parent / "children")


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-layer teacher with a padded vocabulary (264 rows for 259 tokens)."""
    from tests.tiny_models import make_model, save_model

    return save_model(tmp_path_factory.mktemp("teacher"), make_model(seed=1, layers=4, vocab_size=264))


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer student sharing the teacher's tokenizer."""
    from tests.tiny_models import make_model, save_model

    return save_model(tmp_path_factory.mktemp("student"), make_model(seed=2, layers=2))


@pytest.fixture(scope="session", autouse=True)
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep Prefect's database out of the user's home, and away from a server the user has configured."""
    home = tmp_path_factory.mktemp("prefect")
    os.environ["PREFECT_HOME"] = str(home)
    os.environ.pop("PREFECT_API_URL", None)
    return home


@pytest.fixture(scope="session", autouse=True)
def pings_of_their_own() -> Iterator[None]:
    """Keep Prefect's connections, which ping from a thread, off the random numbers that tests of training compare."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("websockets.asyncio.connection.random", random.Random())
        yield


@pytest.fixture(scope="session", autouse=True)
def only_what_most_users_have() -> None:
    """Hide from the processes that tests start what other packages import wherever it is, and few runs have.

    It is a quarter of the time in which each comes up: pandera takes in hypothesis, and peft bitsandbytes.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([_CHILDREN, *_python_path()])


def _python_path() -> list[str]:
    """Return the folders of PYTHONPATH as they were when tests began; an empty one would be the working directory."""
    return [name for name in os.environ.get("PYTHONPATH", "").split(os.pathsep) if name not in ("", _CHILDREN)]


@pytest.fixture(scope="session")
def shared_server(prefect_home: Path) -> Iterator[str]:
    """Start a Prefect server for all tests of this process that may share one; return its API."""
    from flows.server import TemporaryServer

    server = TemporaryServer(PREFECT_AUTH)
    server.wait(180)
    yield server.api
    if handlers := sys.modules.get("prefect.logging.handlers"):
        # What this process has logged and not told yet: it would try to for a minute as it ends.
        handlers.APILogWorker.drain_all(timeout=10)
    server.stop()


@pytest.fixture
def prefect_api(shared_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give the commands that a test starts a Prefect server, so that none of them starts one of its own."""
    monkeypatch.setenv("PREFECT_API_URL", shared_server)
    # This process reads its settings when it imports Prefect, which it may have done.
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: shared_server}):
        yield shared_server


@pytest.fixture(scope="session")
def forkserver() -> None:
    """Start the process that fuzzed readers and measured work are forked from, with what either imports.

    It is one for both: the first to need it would leave the other's libraries to each of its processes.
    """
    from benchmarks.measure import PRELOAD as MEASURED
    from tests.fuzz.harness import PRELOAD as FUZZED

    multiprocessing.get_context("forkserver").set_forkserver_preload([*MEASURED, *FUZZED])
    with pytest.MonkeyPatch.context() as patch:
        # Fuzzing needs hypothesis.
        patch.setenv("PYTHONPATH", os.pathsep.join(_python_path()))
        multiprocessing.forkserver.ensure_running()


SLOW_LAST = ("engine", "server", "e2e")
LONGEST_FIRST = (
    "test_quickstart",
    "test_kill_points",
    "test_object_storage",
    "test_compare",
    "test_ends",
    "test_commands",
    "test_secrets",
    "test_train_launch",
)
"""Modules whose tests go before others of their kind, so that no process is left with a long one at the end."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run quick tests first, so that a mistake shows early; what needs a whole run of the command line comes later.

    Tests of one `xdist_group` share a process, so that what they share is made once, and it takes its time. With
    `--no-loadscope-reorder` (see Makefile) processes take tests in this order.
    """

    def rank(item: pytest.Item) -> int:
        marked = [index for index, name in enumerate(SLOW_LAST, start=2) if item.get_closest_marker(name)]
        return max(marked) if marked else int(item.get_closest_marker("xdist_group") is not None)

    def brevity(item: pytest.Item) -> int:
        if item.get_closest_marker("xdist_group") is not None:
            return -1
        return LONGEST_FIRST.index(item.path.stem) if item.path.stem in LONGEST_FIRST else len(LONGEST_FIRST)

    for item in items:
        if "finished_run" in getattr(item, "fixturenames", ()) and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group("finished_run"))
    items.sort(key=lambda item: (rank(item), brevity(item)))


def pytest_runtest_setup() -> None:
    """Let garbage be looked for among what a test makes, not among all libraries, as in a stage's own process.

    Stages collect it whenever they free a model: half of their time here otherwise.
    """
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let everything go again: some libraries report what is left at the end as a leak."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests found worth telling (``record_property``), from whatever process they ran in."""
    told: dict[str, Any] = {}
    for name, value in (prop for report in terminalreporter.getreports("passed") for prop in report.user_properties):
        told[name] = told[name] + value if name in told else value
    if told:
        terminalreporter.section("covered")
    for name, value in told.items():
        terminalreporter.write_line(f"{name}: {value}")
