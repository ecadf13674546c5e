"""vLLM in a process of its own, for a GPU that is named by its number.

vLLM computes on the first GPU that its process sees. (Its `device_ids` can name others, but one choice for all engines
of a process, whose streams and caches stay on that GPU.) What a process sees cannot be changed once CUDA is at work in
it, and this one may have other models on other GPUs, now or later. So the engine gets a process that sees its GPU
alone, and here nothing changes. The two take turns: the engine asks for shards when it would alone, so that it gives
the same samples.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from schemas.config import VllmOptions
from schemas.errors import ModelError, NPDError, StageError, error_by_name
from tasks.language_model.sources import ModelRef
from tasks.rollout.engine import Engine, Finished, Requests, Responses, SamplingSettings
from tasks.rollout.vllm_engine import VllmEngine

VISIBLE = "CUDA_VISIBLE_DEVICES"
_GONE = (EOFError, BrokenPipeError, ConnectionResetError)
"""What a pipe raises whose other end has closed."""

_EXIT_SECONDS = 10.0
_OUT_OF_MEMORY = "OutOfMemoryError"


def open_vllm(model: ModelRef, options: VllmOptions, longest_sequence: int) -> Engine:
    """Load ``model`` into vLLM: in this process, or in one of its own where the model's device has a number.

    Args:
        model: What to sample from.
        options: `generate.vllm`.
        longest_sequence: No prompt with its response will be longer, in tokens.

    Raises:
        ModelError: as VllmEngine; the GPU is not visible, or several are wanted of which one is named.
    """
    gpu = named_gpu(model.device, os.environ.get(VISIBLE))
    if gpu is None:
        return VllmEngine(model, options, longest_sequence)
    if options.tensor_parallel_size > 1:
        raise ModelError(
            f"device: `{model.device}` is one GPU, and `generate.vllm.tensor_parallel_size: "
            f"{options.tensor_parallel_size}` spreads a model over several: set the device to null"
        )
    return VllmProcess(partial(VllmEngine, replace(model, device="cuda"), options, longest_sequence), gpu)


def named_gpu(device: str | None, visible: str | None) -> str | None:
    """Return what makes a process see the GPU ``device`` alone; None for a device without a number.

    Args:
        device: As in the config.
        visible: `CUDA_VISIBLE_DEVICES` of this process, which its own numbers count in; None: all are.

    Raises:
        ModelError: ``device`` is none, or no such GPU is visible.

    >>> named_gpu("cuda:1", None), named_gpu("cuda:1", "4,6"), named_gpu("cuda", "4,6"), named_gpu(None, None)
    ('1', '6', None, None)
    """
    kind, _, index = (device or "").partition(":")
    if kind != "cuda" or not index:
        return None
    if not index.isdecimal():
        raise ModelError(f"device: `{device}` is no torch device: a GPU has a number, as in `cuda:0`")
    if visible is None:
        return index
    gpus = [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
    if int(index) >= len(gpus):
        raise ModelError(f"device: `{device}` is not here; {VISIBLE} is `{visible}`, which makes {len(gpus)} visible")
    return gpus[int(index)]


class VllmProcess:
    """An engine in a process of its own; see Engine.

    Args:
        opener: Loads the engine, there; can be pickled.
        gpu: The GPU that the process sees, as `CUDA_VISIBLE_DEVICES` names it.

    Raises:
        NPDError: what ``opener`` raises; StageError where the process died.
    """

    def __init__(self, opener: Callable[[], Engine], gpu: str) -> None:
        # Not a fork: CUDA may be at work here, and does not survive one.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._gpu = gpu
        self._process = context.Process(target=_serve, args=(theirs, opener, gpu), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise

    def generate(
        self, requests: Iterable[Requests], settings: SamplingSettings, finished: Finished
    ) -> Iterator[tuple[int, Responses]]:
        """See Engine."""
        waiting = iter(requests)
        self._send(settings)
        while True:
            kind, value = self._receive()
            if kind == "end":
                return
            if kind == "wanted":
                self._send(next(waiting, None))
            elif kind == "finished":
                finished(value)
            else:
                yield value

    def counters(self) -> dict[str, float | str]:
        """See Engine."""
        return {}

    def close(self) -> None:
        """End the process, which frees the model."""
        self._pipe.close()
        self._process.join(_EXIT_SECONDS)
        self._process.kill()
        self._process.join()

    def _send(self, value: SamplingSettings | Requests | None) -> None:
        with self._alive():
            self._pipe.send(value)

    def _receive(self) -> tuple[str, Any]:
        with self._alive():
            kind, value = self._pipe.recv()
        if kind == "failed":
            raise _error(*value)
        return kind, value

    @contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except _GONE:
            self._process.join()
            raise StageError(f"the process of vLLM on GPU {self._gpu} {_ending(self._process.exitcode)}") from None


def _ending(code: int | None) -> str:
    if not code:
        return "ended before its work was done: see what it printed, then run the same command again: it continues"
    return (
        f"died (exit code {code}), most likely out of memory: lower `generate.vllm.gpu_memory_utilization` or "
        "`generate.vllm.max_num_seqs`"
    )


class _PipeClosedError(Exception):
    """The other end has closed; a class of its own, as what a pipe raises may come from within vLLM, too."""


class _EnginePipe:
    """The engine's end of the pipe.

    Args:
        pipe: It.

    Raises:
        _PipeClosedError: from every call: the other end has closed.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def send(self, kind: str, value: Any = None) -> None:
        try:
            self._pipe.send((kind, value))
        except _GONE as error:
            raise _PipeClosedError from error

    def receive(self) -> Any:
        try:
            return self._pipe.recv()
        except _GONE as error:
            raise _PipeClosedError from error


def _serve(connection: Connection, opener: Callable[[], Engine], gpu: str) -> None:
    """Be the engine's process, until the other end of ``connection`` closes."""
    # First: CUDA reads it once.
    os.environ[VISIBLE] = gpu
    pipe = _EnginePipe(connection)
    with suppress(_PipeClosedError):
        try:
            engine = opener()
            pipe.send("ready")
            while True:
                settings = pipe.receive()
                for shard in engine.generate(_requests(pipe), settings, partial(pipe.send, "finished")):
                    pipe.send("shard", shard)
                pipe.send("end")
        except _PipeClosedError:
            raise
        except Exception as error:  # the boundary of the process: every error must reach the other
            traceback.print_exc()
            pipe.send("failed", _described(error))


def _requests(pipe: _EnginePipe) -> Iterator[Requests]:
    while True:
        pipe.send("wanted")
        requests = pipe.receive()
        if requests is None:
            return
        yield requests


def _described(error: Exception) -> tuple[str, str]:
    """Return an error as its class's name and its words: the class itself may be a library's, and not travel."""
    own = isinstance(error, NPDError | MemoryError) or type(error).__name__ == _OUT_OF_MEMORY
    return type(error).__name__, str(error) if own else f"vLLM failed: {type(error).__name__}: {error}"


def _error(name: str, message: str) -> Exception:
    """Return what ``_described`` told of."""
    return MemoryError(message) if name in ("MemoryError", _OUT_OF_MEMORY) else error_by_name(name)(message)
