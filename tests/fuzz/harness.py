"""Runs one reader on many inputs, in a process of its own, so that a crash, a hang or too much memory is seen."""

import faulthandler
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import resource
import tempfile
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from schemas.errors import NPDError

MODULES = ("config", "prompts", "manifests", "tables")
"""Modules ``tests.fuzz.test_fuzz_*`` with readers, each in its ``READERS``."""

FACTOR = int(os.environ.get("NPD_FUZZ", "1"))

MEMORY_BYTES = 2 << 30
"""Address space that the inputs of one reader may need beyond what the process begins with."""

SECONDS = 240
"""After so long a reader hangs."""

Record = Callable[[str, object], None]
"""pytest's ``record_property``."""

PRELOAD = ["tests.fuzz.harness", *(f"tests.fuzz.test_fuzz_{name}" for name in MODULES)]
"""What the process that all readers' are forked from imports."""


@dataclass(frozen=True)
class Reader:
    """A reader of untrusted bytes.

    Args:
        name: For people.
        inputs: Distinct inputs it must at least be tried on.
        strategy: Makes them.
        read: Reads bytes that it may write below a folder; a result is checked there.
        names: What every error's text must hold one of.
        longest: Characters of its longest error.
    """

    name: str
    inputs: int
    strategy: Callable[[], SearchStrategy[bytes]]
    read: Callable[[bytes, Path], None]
    names: tuple[str, ...]
    longest: int = 2_000


def try_reader(module: str, reader: Reader) -> int:
    """Run ``reader``, found again by name in ``module``; fail with the input that breaks it.

    Returns:
        Distinct inputs it was tried on.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        process = context.Process(target=_child, args=(module, reader.name, str(place)))
        process.start()
        process.join(SECONDS * FACTOR)
        hangs = process.is_alive()
        if hangs:
            process.kill()
            process.join()
        report = place / "report.json"
        found: dict[str, Any] = json.loads(report.read_text()) if report.is_file() else {}
        if hangs or "inputs" not in found:
            last = (place / "input").read_bytes() if (place / "input").is_file() else b""
            how = f"hangs:\n{(place / 'stack').read_text()}" if hangs else f"ended with {process.exitcode}"
            raise AssertionError(
                f"{reader.name} {found.get('error', how)}\nlast input, {len(last)} bytes: {last[:2000]!r}"
            )
    inputs = int(found["inputs"])
    assert inputs >= reader.inputs, f"{reader.name}: only {inputs} distinct inputs"
    return inputs


def _child(module: str, name: str, place: str) -> None:
    folder = Path(place)
    with (folder / "stack").open("w") as stack:
        faulthandler.dump_traceback_later(SECONDS * FACTOR * 0.9, file=stack)
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, resource.RLIM_INFINITY))
        readers: tuple[Reader, ...] = importlib.import_module(module).READERS
        try:
            report: dict[str, Any] = {"inputs": _run(next(r for r in readers if r.name == name), folder)}
        except Exception:
            report = {"error": traceback.format_exc()}
        (folder / "report.json").write_text(json.dumps(report))
        faulthandler.cancel_dump_traceback_later()


def _run(reader: Reader, place: Path) -> int:
    seen: set[bytes] = set()
    folder = place / "work"
    folder.mkdir()

    def holds(data: bytes) -> None:
        digest = hashlib.sha256(data).digest()
        if digest in seen:
            return
        (place / "input").write_bytes(data)
        try:
            reader.read(data, folder)
        except NPDError as error:
            _check_message(str(error), reader)
        left = list(folder.rglob(".tmp-*"))
        assert not left, f"left behind: {left}"
        seen.add(digest)

    # Some inputs come twice, so one run of so many examples is not enough.
    wanted, first = reader.inputs * FACTOR, 0 if FACTOR == 1 else random.getrandbits(32)
    for round_ in range(20):
        if len(seen) >= wanted:
            break
        limits = settings(
            max_examples=wanted - len(seen) + 5,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )
        seed(first + round_)(limits(given(reader.strategy())(holds)))()
    return len(seen)


def _check_message(text: str, reader: Reader) -> None:
    assert any(name in text for name in reader.names), f"names none of {reader.names}: {text[:500]!r}"
    assert len(text) <= reader.longest, f"{len(text)} characters: {text[:500]!r}"
    assert "Traceback" not in text, text
    steering = [c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c != "\n"]
    assert not steering, f"control characters {steering}: {text[:500]!r}"
