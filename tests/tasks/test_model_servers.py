"""How the servers of a model are used: bounded, tried again, left out. Against real HTTP servers on loopback."""

import resource
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

from schemas.config import ServersConfig
from schemas.errors import ConfigError, ModelError, StageError
from schemas.stage_key import StageKey
from tasks.graph import BASELINE, STAGES
from tasks.model_servers import pool
from tasks.model_servers.api import Body, ServerApi
from tasks.model_servers.served import ServedModel
from tests.run_fixtures import make_config
from tests.tasks.loopback_server import MODEL, Answer, LoopbackServer, echo, error

Start = Callable[[Answer], LoopbackServer]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts servers, and ends them. Pauses between tries are short."""
    monkeypatch.setattr(pool, "_FIRST_PAUSE", 0.01)
    started: list[LoopbackServer] = []

    def start(answer: Answer) -> LoopbackServer:
        started.append(LoopbackServer(answer))
        return started[-1]

    yield start
    for server in started:
        server.stop()


async def find_model(api: ServerApi) -> None:
    """A self-test that a server passes if it answers."""
    await api.find_model()


def served(*servers: LoopbackServer, **settings: Any) -> ServedModel:
    return ServedModel(ServersConfig(urls=[server.url for server in servers], **settings), find_model)


def prompts(count: int) -> Iterator[tuple[int, Body]]:
    return ((index, {"prompt": [index]}) for index in range(count))


def answers(model: ServedModel, count: int) -> dict[int, int]:
    """Return the answer to each of ``count`` prompts, which is itself from a server that works."""
    try:
        return {index: choice.fields["token_ids"][0] for index, choice in model.answers(prompts(count))}
    finally:
        model.close()


def same(count: int) -> dict[int, int]:
    return {index: index for index in range(count)}


def failing(*faults: tuple[int, Any] | None) -> Answer:
    """Answer the first requests with ``faults``, one each; then work."""
    waiting = list(faults)
    lock = threading.Lock()

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        if path == "/v1/completions":
            with lock:
                if waiting:
                    return waiting.pop(0)
        return echo(path, body)

    return answer


def test_servers_share_the_work_and_hold_no_more_than_they_may(start: Start) -> None:
    first, second = start(echo), start(echo)
    taken = answered = most_open = 0

    def counted() -> Iterator[tuple[int, Body]]:
        nonlocal taken
        for request in prompts(40):
            taken += 1
            yield request

    model = served(first, second, max_in_flight=3)
    for _ in model.answers(counted()):
        # What was taken before this answer came, and is not answered.
        most_open = max(most_open, taken - answered)
        answered += 1
    model.close()
    assert answered == 40
    assert most_open <= 6
    for server in (first, second):
        assert server.most_in_flight <= 3
        assert len(server.completions) >= 10


@pytest.fixture
def twenty_files() -> Iterator[None]:
    """Lets this process open twenty files beside those it has, as far as it does not ask for more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(path.name) for path in Path("/dev/fd").iterdir()}
    free = (number for number in count() if number not in taken)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(islice(free, 20, None)), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("twenty_files")
def test_each_request_in_flight_gets_a_connection(start: Start) -> None:
    together = threading.Barrier(40, timeout=10)

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions":
            together.wait()
        return echo(path, body)

    assert answers(served(start(answer), max_in_flight=40, retry_seconds=0), 40) == same(40)


def test_more_connections_than_the_system_lets_are_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (64, 64))
    with pytest.raises(ConfigError, match=r"generate\.server\.max_in_flight: 1 servers with 256 requests .* have 64"):
        served(start(echo))


def test_what_fails_in_the_world_is_sent_again(start: Start) -> None:
    server = start(failing(error(503, "loading"), error(429, "busy"), None, error(500, "oops")))
    model = served(server, max_in_flight=1)
    assert answers(model, 5) == same(5)
    assert model.counters() == {"servers": 1, "retries": 4}


def test_a_server_that_stays_away_is_left_out_while_another_serves(start: Start) -> None:
    first, second = start(echo), start(echo)
    model = served(first, second, max_in_flight=2, retry_seconds=0.1)
    found = {}
    for index, choice in model.answers(prompts(60)):
        found[index] = choice.fields["token_ids"][0]
        if len(found) == 10:
            first.stop()
    model.close()
    assert found == same(60)
    assert model.counters()["servers"] == 1


def test_a_server_that_comes_back_gets_work_again(start: Start) -> None:
    server = start(echo)
    model = served(server, max_in_flight=2, retry_seconds=30)
    found = {}
    for index, choice in model.answers(prompts(20)):
        found[index] = choice.fields["token_ids"][0]
        if len(found) == 5:
            server.stop()
            threading.Timer(0.1, server.start).start()
    model.close()
    assert found == same(20)


def swapped() -> Answer:
    """Answer that the model is there once; then fail, and have none."""
    tests = iter([[MODEL]])

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return (200, {"data": next(tests, [])}) if path == "/v1/models" else error(503, "restarting")

    return answer


def test_a_server_that_comes_back_with_another_model_gets_no_work(start: Start) -> None:
    server = start(swapped())
    assert answers(served(server, start(echo), max_in_flight=2), 20) == same(20)
    assert len(server.completions) <= 2
    with pytest.raises(StageError, match=r"no server is left.*serves nothing"):
        answers(served(start(swapped())), 1)


def test_without_a_server_left_the_stage_fails_and_names_it(start: Start) -> None:
    server = start(echo)
    model = served(server, retry_seconds=0.05)
    server.stop()
    with pytest.raises(StageError, match=rf"generate\.server: no server is left: {server.url}: ConnectError") as found:
        answers(model, 3)
    assert "continue the run" in str(found.value)


def test_a_request_that_always_fails_on_a_healthy_server_ends_the_stage(start: Start) -> None:
    def poisoned(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return error(500, "CUDA error") if body.get("prompt") == [2] else echo(path, body)

    with pytest.raises(StageError, match="HTTP 500: CUDA error, and so again"):
        answers(served(start(poisoned), max_in_flight=1, retry_seconds=0.1), 5)


def test_what_the_server_refuses_is_not_sent_again(start: Start) -> None:
    server = start(lambda path, body: echo(path, body) if path == "/v1/models" else error(400, "too long"))
    with pytest.raises(ModelError, match=rf"{server.url}/v1/completions: HTTP 400: too long"):
        answers(served(server, max_in_flight=1), 5)
    assert len(server.completions) == 1


@pytest.mark.parametrize(
    "content",
    [[], {}, {"choices": []}, {"choices": None}, {"choices": ["x"]}, iter([b"["] * 9_999), iter([b'{"\xff"'])],
)
def test_what_is_no_answer_of_vllm_is_told_with_the_server(start: Start, content: Any) -> None:
    server = start(lambda path, body: echo(path, body) if path == "/v1/models" else (200, content))
    with pytest.raises(ModelError, match=rf"{server.url}.*(is not one of vLLM's|is no JSON object)"):
        answers(served(server), 1)
    server = start(lambda path, body: (200, {"data": content}))
    with pytest.raises(ModelError, match=server.url):
        served(server)


def test_an_answer_that_drips_in_is_waited_for_no_longer_than_told(start: Start) -> None:
    def spaces() -> Iterator[bytes]:
        for _ in range(50):
            time.sleep(0.1)
            yield b" "

    def dripping(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return echo(path, body) if path == "/v1/models" else (200, spaces())

    with pytest.raises(StageError, match=r"no whole answer within 0\.3 s"):
        answers(served(start(dripping), timeout_seconds=0.3, retry_seconds=0), 1)


def test_the_start_waits_for_a_server_as_long_as_it_is_told(start: Start) -> None:
    server = start(echo)
    server.stop()
    with pytest.raises(ModelError, match=r"no server answers.*wait_seconds"):
        served(server)
    threading.Timer(0.1, server.start).start()
    assert answers(served(server, wait_seconds=30), 3) == same(3)


def test_one_of_two_servers_may_be_away_at_the_start(start: Start) -> None:
    away, server = start(echo), start(echo)
    away.stop()
    assert answers(served(away, server, retry_seconds=0), 5) == same(5)


def test_a_wrong_server_stops_the_start_even_beside_a_right_one(start: Start) -> None:
    wrong = start(lambda path, body: (200, {"data": [MODEL | {"id": "a"}, MODEL | {"id": "b"}]}))
    with pytest.raises(ModelError, match=rf"{wrong.url}: serves `a`, `b`; name the one to use"):
        served(start(echo), wrong)
    served(wrong, model="b").close()


def test_the_key_comes_from_the_environment(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start(echo)
    monkeypatch.setenv("TINY_KEY", "secret-1")
    served(server, api_key_env="TINY_KEY").close()
    assert set(server.authorization) == {"Bearer secret-1"}
    # A secret that is mounted as a file ends with a newline.
    monkeypatch.setenv("TINY_KEY", "secret-1\n")
    served(server, api_key_env="TINY_KEY").close()
    assert set(server.authorization) == {"Bearer secret-1"}
    for wrong in ("", " \n", "sec\nret", "secrét"):
        monkeypatch.setenv("TINY_KEY", wrong)
        with pytest.raises(ConfigError, match=r"generate\.server\.api_key_env: .*`TINY_KEY` is empty, or") as refused:
            served(server, api_key_env="TINY_KEY")
        assert not wrong.strip() or wrong not in str(refused.value)
    monkeypatch.delenv("TINY_KEY")
    with pytest.raises(ConfigError, match=r"generate\.server\.api_key_env: .*`TINY_KEY` is not set"):
        served(server, api_key_env="TINY_KEY")
    locked = start(lambda path, body: error(401, "Unauthorized"))
    with pytest.raises(ModelError, match=r"HTTP 401: Unauthorized; name the variable .* `server.api_key_env`"):
        served(locked)


def test_no_model_is_asked_of_servers_that_are_not_its_own(tmp_path: Path) -> None:
    """The teacher's answers come from its servers or from here, an evaluated student's from here."""
    students = {"engine": "server", "server": {"urls": ["http://student"]}}
    teachers = {"engine": "server", "server": {"urls": ["http://teacher"]}}
    here = make_config(tmp_path)
    student_served = make_config(tmp_path, generate=students)
    both_served = make_config(tmp_path, generate=students, score=teachers)
    assert student_served.teacher_sampling.engine == student_served.local_sampling.engine == "transformers"
    assert both_served.teacher_sampling.server.urls == ["http://teacher"]
    assert both_served.local_sampling.engine == "transformers"
    # A stage runs again only where something else answers.
    reference, evaluate, generate = StageKey("reference"), StageKey("evaluate", 0), StageKey("generate", 0)
    for key, by_student_servers, by_teacher_servers in (
        (reference, False, True),
        (BASELINE, False, True),
        (evaluate, False, False),
        (generate, True, False),
    ):
        read = STAGES[key.stage].config
        assert (read(student_served, key) != read(here, key)) == by_student_servers, key
        assert (read(both_served, key) != read(student_served, key)) == by_teacher_servers, key
