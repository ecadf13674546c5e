"""How long a stage has been worked on, over all attempts at it."""

import json
import threading
import time
from contextlib import suppress
from pathlib import Path

from schemas import local_files
from schemas.run_store import RunStore
from schemas.stage_key import StageKey

CLOCK_NAME = ".seconds.json"
"""In the folder of an unfinished stage: the seconds that went into it so far. It stays on this machine: a store that is
slow or away must not hold up the stage's own thread, which tells of progress."""

_NOTE_SECONDS = 30.0
"""How often they are noted: what a kill can make a stage forget."""

_WORTH_SECONDS = 1.0
"""Fewer are not noted where an attempt ends."""


class StageClock:
    """Counts the seconds of a stage that is about to begin, from those of earlier attempts on this machine on.

    Made before ``RunStore.begin``, which empties the working copy of a run in an object store, notes included.

    Args:
        store: The run.
        key: The stage.
        fingerprint: Of the stage now: attempts at another count for nothing.

    Raises:
        ArtifactError: what the stage has left cannot be read.
        StorageError: the object store is out of reach.
    """

    def __init__(self, store: RunStore, key: StageKey, fingerprint: str) -> None:
        self._path = store.path(key, CLOCK_NAME)
        self._before = _noted(self._path) if store.fingerprint_at_work(key) == fingerprint else 0.0
        self._begun = time.perf_counter()
        # Due at once where a note may have gone with the working copy.
        self._last = self._begun - (_NOTE_SECONDS + 1 if self._before else 0)
        self._lock = threading.Lock()

    @property
    def seconds(self) -> float:
        """Of this attempt and those before it."""
        return self._before + time.perf_counter() - self._begun

    def start_over(self) -> None:
        """Forget the attempts before this one."""
        self._before = 0.0

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
        if self.seconds > _WORTH_SECONDS:
            self._note()

    def finished(self) -> None:
        """Forget the note: the manifest has the seconds."""
        local_files.remove(self._path)

    def _note(self) -> None:
        # A full disk stops the stage by itself, with a better word.
        with suppress(OSError), local_files.writing_file(self._path) as temporary:
            temporary.write_text(json.dumps(round(self.seconds, 3)), encoding="utf-8")


def _noted(path: Path) -> float:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return 0.0
    return float(found) if isinstance(found, int | float) and 0 <= found < 1e12 else 0.0
