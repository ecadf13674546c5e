"""Makes the runs of a comparison: a process each, so many at a time."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.comparison_progress import RunsListener
from flows.process import RUN, run_stages_in_process
from schemas.config import RunSettings
from schemas.errors import NPDError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.stage import current_manifest, stage_of


@dataclass(frozen=True)
class Worker:
    """Makes runs, so many at a time.

    Args:
        free: Lets so many at a time.
        threads: CPU threads of each.
        listener: Hears of them.
    """

    free: threading.BoundedSemaphore
    threads: int
    listener: RunsListener | None

    def settle(
        self, store: RunStore, config: RunSettings, label: str, keys: Sequence[StageKey], lenders: Sequence[str] = ()
    ) -> None:
        """Bring stages of a held run up to date in one process.

        Args:
            store: The run.
            config: Its config.
            label: Its name for people.
            keys: The stages, in order.
            lenders: Places of runs whose results of equal fingerprints are taken over.

        Raises:
            NPDError: a stage failed; names the log.
        """
        with self.free:
            if stands(store, config, keys):
                if self.listener is not None:
                    self.listener.finished(label, up_to_date=True)
                return
            if self.listener is not None:
                self.listener.started(label)

            def on_stage(key: StageKey) -> None:
                if self.listener is not None:
                    self.listener.at_stage(label, key)

            try:
                run_stages_in_process(store, config, keys, lenders, self.threads, on_stage)
            except NPDError as error:
                if self.listener is not None:
                    self.listener.failed(label, str(error))
                log = str(store.log(RUN))
                # An error that the stage did not expect names it already.
                raise type(error)(str(error) if log in str(error) else f"{error} (log: {log})") from None
            if self.listener is not None:
                self.listener.finished(label, up_to_date=False)


def lenders(store: RunStore, seed: int, comparison: str) -> list[str]:
    """Return where other runs may have results that this one would only repeat: those of the same seed."""
    same = Path(comparison).glob(f"*/lr=*/seed-{seed}")
    return [place for path in sorted(same) if (place := str(path.absolute())) != store.url]


def stands(store: RunStore, config: RunSettings, keys: Sequence[StageKey]) -> bool:
    """Say whether the results of ``keys`` stand; their files are compared by size, since the run hashed them."""
    return all(
        all(store.manifest(needed) is not None for needed in stage_of(config, key).inputs(config, key))
        and current_manifest(store, config, key, content=False) is not None
        for key in keys
    )
