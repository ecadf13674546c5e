"""An engine that sees one GPU, in a process of its own; the engine stands in for vLLM."""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from schemas.config import GenerateConfig, VllmOptions
from schemas.errors import ModelError, StageError
from tasks.language_model.sources import ModelRef
from tasks.rollout import vllm_process
from tasks.rollout.engine import Engine, Finished, Requests, Responses, SamplingSettings, open_engine
from tasks.rollout.vllm_process import VISIBLE, VllmProcess, named_gpu

SETTINGS = SamplingSettings(1.0, 1.0, 8, 64, (2,), 259)


class SeenEngine:
    """Answers every prompt with the number of the GPU it sees, the prompt's length, and how many shards it has taken.

    It holds two shards at a time, as vLLM's queue holds so many requests.
    """

    def generate(
        self, requests: Iterable[Requests], settings: SamplingSettings, finished: Finished
    ) -> Iterator[tuple[int, Responses]]:
        waiting, taken = enumerate(requests), 0
        held: list[tuple[int, Requests]] = []
        gpu = int(os.environ[VISIBLE])
        while True:
            while len(held) < 2 and (shard := next(waiting, None)) is not None:
                held.append(shard)
                taken += 1
            if not held:
                return
            number, shard_requests = held.pop(0)
            rows = [np.array([gpu, len(ids), taken], np.int32) for ids in shard_requests.prompts]
            finished(len(rows))
            yield number, Responses.from_rows(rows, [np.zeros(3, np.float32)] * len(rows), settings.end_ids)

    def counters(self) -> dict[str, float | str]:
        return {}

    def close(self) -> None:
        pass


class UnportableError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


def fail(error: Callable[[], Exception]) -> Engine:
    raise error()


def die() -> Engine:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def asked(lengths: list[list[int]]) -> Iterator[Requests]:
    for shard in lengths:
        yield Requests([np.zeros(length, np.int32) for length in shard], np.zeros(len(shard), np.int64))


@pytest.mark.parametrize(
    ("device", "visible", "gpu"),
    [
        (None, None, None),
        ("cpu", None, None),
        ("cuda", "3", None),
        ("cuda:0", None, "0"),
        ("cuda:1", None, "1"),
        ("cuda:0", "4,6", "4"),
        ("cuda:1", "4, 6", "6"),
        ("cuda:1", "GPU-a,MIG-b", "MIG-b"),
    ],
)
def test_a_number_counts_among_the_visible_gpus(device: str | None, visible: str | None, gpu: str | None) -> None:
    assert named_gpu(device, visible) == gpu


@pytest.mark.parametrize(("device", "visible"), [("cuda:1", "6"), ("cuda:0", ""), ("cuda:2", "4,6")])
def test_a_gpu_that_is_not_visible_is_refused(device: str, visible: str) -> None:
    with pytest.raises(ModelError, match=f"device: `{device}` is not here.*`{visible}`"):
        named_gpu(device, visible)


@pytest.mark.parametrize("visible", [None, "4,6"])
def test_what_is_no_number_is_refused(visible: str | None) -> None:
    with pytest.raises(ModelError, match="device: `cuda:one` is no torch device"):
        named_gpu("cuda:one", visible)


@pytest.mark.parametrize("before", [None, "4,6"])
def test_engines_in_turn_see_each_its_gpu_and_this_process_all(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """The same GPU twice, and another: stage baseline samples from two models."""
    monkeypatch.delenv(VISIBLE, raising=False)
    if before is not None:
        monkeypatch.setenv(VISIBLE, before)
    seen = []
    for device in ("cuda:1", "cuda:1", "cuda:0"):
        gpu = named_gpu(device, os.environ.get(VISIBLE))
        assert gpu is not None
        engine = VllmProcess(SeenEngine, gpu)
        ((_, rollouts),) = engine.generate(asked([[5]]), SETTINGS, lambda count: None)
        seen.append(str(rollouts.row(0)[0]))
        assert os.environ.get(VISIBLE) == before
        engine.close()
    assert seen == (["1", "1", "0"] if before is None else ["6", "6", "4"])


def test_shards_come_and_go_as_they_do_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [[3, 9], [1], [6, 40, 9], [2]]
    monkeypatch.setenv(VISIBLE, "7")
    there, here = VllmProcess(SeenEngine, "7"), SeenEngine()
    for wanted in (lengths, lengths[:1], []):
        counts: list[list[int]] = [[], []]
        found, expected = (
            [(number, [row.tolist() for row in rollouts.rows()]) for number, rollouts in answers]
            for answers in (
                there.generate(asked(wanted), SETTINGS, counts[0].append),
                here.generate(asked(wanted), SETTINGS, counts[1].append),
            )
        )
        assert found == expected
        assert counts[0] == counts[1]
    there.close()


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (partial(ModelError, "no such weights"), ModelError, "no such weights"),
        (partial(MemoryError, "too large"), MemoryError, "too large"),
        (partial(EOFError, "weights file is truncated"), StageError, "EOFError: weights file is truncated"),
        (partial(ConnectionResetError, "by the core"), StageError, "ConnectionResetError: by the core"),
        (partial(UnportableError, "queer", "error"), StageError, "UnportableError: queer error"),
    ],
)
def test_what_goes_wrong_there_is_raised_here(
    monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], kind: type[Exception], words: str
) -> None:
    monkeypatch.setenv(VISIBLE, "4,6")
    with pytest.raises(kind, match=words):
        VllmProcess(partial(fail, error), "6")
    assert os.environ[VISIBLE] == "4,6"


class TruncatedEngine(SeenEngine):
    """Raises while it answers what a pipe raises, too."""

    def generate(
        self, requests: Iterable[Requests], settings: SamplingSettings, finished: Finished
    ) -> Iterator[tuple[int, Responses]]:
        yield from super().generate(requests, settings, finished)
        raise EOFError("weights file is truncated")


def test_an_engine_may_raise_what_a_pipe_raises() -> None:
    engine = VllmProcess(TruncatedEngine, "6")
    with pytest.raises(StageError, match="EOFError: weights file is truncated"):
        list(engine.generate(asked([[1]]), SETTINGS, lambda count: None))
    engine.close()


def leave() -> Engine:
    sys.exit(0)


def test_a_process_that_ends_of_itself_is_not_called_out_of_memory() -> None:
    with pytest.raises(StageError, match="on GPU 6 ended before its work was done") as caught:
        VllmProcess(leave, "6")
    assert "memory" not in str(caught.value)


class DyingEngine(SeenEngine):
    """Dies of its second shard, and no later than it is asked again."""

    def generate(
        self, requests: Iterable[Requests], settings: SamplingSettings, finished: Finished
    ) -> Iterator[tuple[int, Responses]]:
        for answer in super().generate(requests, settings, finished):
            yield answer
            die()


DIED = r"on GPU 6 died \(exit code -9\).*gpu_memory_utilization"


def test_a_process_that_is_killed_says_what_to_lower() -> None:
    with pytest.raises(StageError, match=DIED):
        VllmProcess(die, "6")
    engine = VllmProcess(DyingEngine, "6")
    for _ in range(2):
        with pytest.raises(StageError, match=DIED):
            list(engine.generate(asked([[1], [2]]), SETTINGS, lambda count: None))
    engine.close()


def opened(monkeypatch: pytest.MonkeyPatch, device: str | None, **options: Any) -> tuple[str, str | None]:
    """Where `open_engine` loads a model, and the device the engine is then told."""
    found = []
    monkeypatch.setattr(vllm_process, "VllmEngine", lambda model, *others: found.append(("here", model.device)))
    monkeypatch.setattr(vllm_process, "VllmProcess", lambda opener, gpu: found.append((gpu, opener.args[0].device)))
    config = GenerateConfig(engine="vllm", vllm=VllmOptions(**options))
    open_engine(ModelRef("folder", "v", 0, 512, 259, device=device), config, 64)
    ((place, told),) = found
    return place, told


def test_only_a_named_gpu_takes_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "4,6")
    assert opened(monkeypatch, "cuda:1") == ("6", "cuda")
    assert opened(monkeypatch, "cuda:0") == ("4", "cuda")
    for device in (None, "cpu", "cuda"):
        assert opened(monkeypatch, device, tensor_parallel_size=2) == ("here", device)
    with pytest.raises(ModelError, match=r"tensor_parallel_size: 2.*set the device to null"):
        opened(monkeypatch, "cuda:1", tensor_parallel_size=2)
