"""How anything here is measured: sides alternate, warm-up is left out, and a result stands beside its bar."""

import gc
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")

Work = Callable[[], T]
"""What is measured: everything it needs is there already."""

Prepare = Callable[[], Work[T]]
"""Makes the work ready, unmeasured; can be pickled (a module's function, or `functools.partial` of one)."""

PRELOAD = ["trl.trainer.sft_trainer"]
"""Measured processes are forked from one that has imported the heavy libraries, and has done nothing with them; nor are
they taken apart."""


@dataclass(frozen=True)
class Sample(Generic[T]):
    """One repeat.

    Args:
        value: What the work returned.
        seconds: Wall-clock time.
        held_bytes: Memory in use before it began: allocated on the GPU, resident on a CPU.
        peak_bytes: The highest it came to.
    """

    value: T
    seconds: float
    held_bytes: int
    peak_bytes: int

    @property
    def extra_bytes(self) -> int:
        """What the work itself needed."""
        return max(self.peak_bytes - self.held_bytes, 0)


def sample(work: Work[T], device: str = "cpu") -> Sample[T]:
    """Run ``work`` once, with the GPU idle before and after.

    On a CPU the memory is the process's, so that what earlier work left with the allocator hides what this one takes:
    compare memory in `alternate_in_children`.
    """
    gc.collect()
    _synchronize(device)
    _reset_peak(device)
    held = _held_bytes(device)
    started = time.perf_counter()
    value = work()
    _synchronize(device)
    seconds = time.perf_counter() - started
    return Sample(value, seconds, held, _peak_bytes(device))


def alternate(
    sides: Mapping[str, Work[T]], repeats: int, *, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[Sample[T]]]:
    """Run the sides in turn (A B A B ...) in this process; return each one's samples, warm-up left out."""
    samples: dict[str, list[Sample[T]]] = {name: [] for name in sides}
    for turn in range(warmup + repeats):
        for name, work in sides.items():
            taken = sample(work, device)
            if turn >= warmup:
                samples[name].append(taken)
    return samples


def alternate_in_children(
    sides: Mapping[str, Prepare[T]], repeats: int, *, device: str = "cpu"
) -> dict[str, list[Sample[T]]]:
    """Run the sides in turn, each repeat in a fresh process, so that its peak memory is its own.

    Args:
        sides: What prepares each side's work; the value the work returns comes back pickled.
        repeats: Processes for each side.
        device: Where the work computes.
    """
    samples: dict[str, list[Sample[T]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, prepare in sides.items():
            samples[name].append(in_child(prepare, device=device))
    return samples


def in_child(prepare: Prepare[T], *, warmup: int = 0, device: str = "cpu") -> Sample[T]:
    """Prepare and run work once in a fresh process.

    Args:
        prepare: Prepares the work.
        warmup: Runs of it before the one that counts; what they leave with the allocator makes the memory of that one
            look smaller.
        device: Where it computes.

    Raises:
        RuntimeError: the process died; its own error is on stderr.
    """
    context = processes(device)
    context.set_forkserver_preload(PRELOAD)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sending, prepare, warmup, device))
    process.start()
    sending.close()
    try:
        result: Sample[T] = receiving.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{prepare}: its process ended with code {process.exitcode}") from None
    finally:
        receiving.close()
    process.join()
    return result


def processes(device: str) -> SpawnContext | ForkServerContext:
    """Return what starts processes that compute on ``device``."""
    # bitsandbytes, which peft imports where it is installed, begins CUDA as it is imported: no fork could use it then.
    if device.startswith("cuda") and find_spec("bitsandbytes") is not None:
        return multiprocessing.get_context("spawn")
    return multiprocessing.get_context("forkserver")


def _child(sending: Connection, prepare: Prepare[Any], warmup: int, device: str) -> None:
    work = prepare()
    for _ in range(warmup):
        work()
    sending.send(sample(work, device))


@dataclass(frozen=True)
class Bar:
    """What a median should reach: at least, or at most, ``limit``."""

    limit: float
    at_least: bool

    def is_met(self, value: float) -> bool:
        """Say whether ``value`` reaches it."""
        return value >= self.limit if self.at_least else value <= self.limit


def at_least(limit: float) -> Bar:
    """Return the bar of what should be high."""
    return Bar(limit, at_least=True)


def at_most(limit: float) -> Bar:
    """Return the bar of what should be low."""
    return Bar(limit, at_least=False)


@dataclass(frozen=True)
class Measurement:
    """One row of a result.

    Args:
        what: What was measured.
        values: One value a repeat; a single one for what does not vary (bytes, counts).
        unit: Of the values, for example `s` or `tokens/s`; `x` for ratios.
        bar: What the median should reach; None where there is no bar.
    """

    what: str
    values: Sequence[float]
    unit: str
    bar: Bar | None = None

    @property
    def median(self) -> float:
        """Median of the values."""
        return statistics.median(self.values)

    @property
    def verdict(self) -> str:
        """`met`, `missed` or `no bar`."""
        if self.bar is None:
            return "no bar"
        return "met" if self.bar.is_met(self.median) else "missed"


def seconds(samples: Sequence[Sample[Any]]) -> list[float]:
    """Return the samples' wall-clock times."""
    return [taken.seconds for taken in samples]


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return one ratio for each pair of repeats, which ran one after the other.

    Raises:
        ValueError: the sides have different numbers of repeats.
    """
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def memory_growth(
    stage: str, low: Sequence[float], high: Sequence[float], factor: int, added: int
) -> list[Measurement]:
    """Return how a stage's peak memory grows with its samples; the bar is 1.15, flat but for noise.

    Args:
        stage: Its name.
        low: Peaks at 1x, bytes, a repeat each.
        high: Peaks with ``factor`` times the samples, in the same order.
        factor: How many times.
        added: Samples more there are then.
    """
    return [
        Measurement(f"{stage}: peak memory at 1x", [peak / 2**20 for peak in low], "MiB"),
        Measurement(f"{stage}: peak memory, {factor}x over 1x", ratios(high, low), "x", at_most(1.15)),
        Measurement(
            f"{stage}: memory that one more sample takes",
            [(b - a) / added for a, b in zip(low, high, strict=True)],
            "bytes",
        ),
    ]


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def _reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux: 5 sets the process's high-water mark back to what it holds now. Elsewhere the peak is the process's.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _held_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS")


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    return _resident("VmHWM")


def _resident(field: str) -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    # Not ru_maxrss: a process begun by another inherits that one's.
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
