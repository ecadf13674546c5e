"""How long a stage has been worked on, over all attempts at it."""

import json
import threading
import time
from contextlib import suppress

from schemas.errors import StorageError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey

CLOCK_NAME = ".seconds.json"
"""In the folder of an unfinished stage: the seconds that went into it so far."""

_NOTE_SECONDS = 30.0
"""How often they are noted: what a kill can make a stage forget."""

_WORTH_SECONDS = 1.0
"""An attempt that was shorter leaves no note."""


class StageClock:
    """Counts the seconds of a stage that has begun (``RunStore.begin``), from those of earlier attempts on.

    Args:
        store: The run.
        key: The stage.
    """

    def __init__(self, store: RunStore, key: StageKey) -> None:
        self._store, self._key = store, key
        self._before = _noted(store, key)
        self._begun = self._last = time.perf_counter()
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Of this attempt and those before it."""
        return self._before + time.perf_counter() - self._begun

    def tick(self) -> None:
        """Note the seconds if it is time to; may be called often, from any thread."""
        with self._lock:
            due = time.perf_counter() - self._last > _NOTE_SECONDS
            if due:
                self._last = time.perf_counter()
        if due:
            self._note()

    def interrupted(self) -> None:
        """Note the seconds of an attempt that ends without a result."""
        if time.perf_counter() - self._begun > _WORTH_SECONDS:
            self._note()

    def finished(self) -> None:
        """Forget the note: the manifest has the seconds."""
        self._store.remove(self._store.path(self._key, CLOCK_NAME))

    def _note(self) -> None:
        # A full disk or a store that is away stops the stage by itself, with a better word.
        with suppress(StorageError, OSError):
            self._store.write_bytes(
                self._store.path(self._key, CLOCK_NAME), json.dumps(round(self.seconds, 3)).encode()
            )


def _noted(store: RunStore, key: StageKey) -> float:
    try:
        found = json.loads(store.read(f"{key.folder}/{CLOCK_NAME}") or b"0")
    except (ValueError, RecursionError):
        return 0.0
    return float(found) if isinstance(found, int | float) and 0 <= found < 1e12 else 0.0
