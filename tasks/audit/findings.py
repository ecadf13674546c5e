"""What an audit of a run has seen so far: broken links, notes, and how much was looked at."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.manifest import Manifest
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.audit.rollout_index import PromptIndex, RolloutIndex
from tasks.graph import C

Watch = Callable[[str, int, int, str], None]
"""Called with what is being checked, work done, work in all, and the unit of both."""


@dataclass(frozen=True)
class Break:
    """One broken link.

    Args:
        where: The file or folder, as manifests name it.
        what: What does not hold, in plain words.
        more: Further rows of the same file that break the same rule.
    """

    where: str
    what: str
    more: int = 0

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" (and {self.more:,} more rows of this file)" if self.more else "")


@dataclass
class Coverage:
    """How much was looked at: whole files hashed, their bytes, table rows read, packed tokens traced, rows joined."""

    files: int = 0
    bytes: int = 0
    rows: int = 0
    tokens: int = 0
    joins: int = 0


@dataclass
class Report:
    """What ``verify`` found.

    Args:
        breaks: In the order of the loop, the first one first.
        notes: What is worth knowing and breaks nothing.
        unfinished: Stages of the loop that have no result.
        unchecked: What could not be looked at because something before it is broken.
        coverage: How much was looked at.
    """

    breaks: list[Break] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    coverage: Coverage = field(default_factory=Coverage)

    @property
    def holds(self) -> bool:
        """Whether everything that is there holds."""
        return not self.breaks


@dataclass
class Audit(Generic[C]):
    """A verification at work.

    Args:
        store: The run's files.
        config: What the run last ran with.
        run_id: What every table must carry.
        watch: Told how far it is.
        report: What was found.
        manifests: Those that can be read.
        sound: Stages whose files are as their manifests say, and whose tables meet their schemas.
        prompts: Ids and splits, once read.
        rollouts: Of rollout tables still needed, ids, lengths and digests.
        kept: Of ledgers still needed, what they keep, by row of the rollout table.
    """

    store: RunStore
    config: C
    run_id: str
    watch: Watch
    report: Report
    manifests: dict[StageKey, Manifest] = field(default_factory=dict)
    sound: set[StageKey] = field(default_factory=set)
    prompts: PromptIndex | None = None
    rollouts: dict[StageKey, RolloutIndex] = field(default_factory=dict)
    kept: dict[StageKey, NDArray[np.bool_]] = field(default_factory=dict)

    def broken(self, where: str, what: str, more: int = 0) -> None:
        """Record a broken link."""
        self.report.breaks.append(Break(where, what, more))

    def expect_rows(
        self,
        where: str,
        first_row: int,
        ids: pa.ChunkedArray | pa.Array,
        column: str,
        holds: NDArray[np.bool_],
        say: Callable[[int], str],
    ) -> bool:
        """Record the first row that does not hold, and how many there are; return whether all do.

        Args:
            where: The file.
            first_row: Row of the file at which ``holds`` begins.
            ids: What names each row.
            column: The column that is wrong.
            holds: bool [rows].
            say: Returns what is wrong with a row, by its place in ``holds``.
        """
        self.report.coverage.joins += holds.size
        if holds.all():
            return True
        row = int(np.argmin(holds))
        wrong = int(holds.size - np.count_nonzero(holds))
        self.broken(where, f"row {first_row + row}, {ids[row].as_py()}, `{column}`: {say(row)}", wrong - 1)
        return False

    def counter(self, key: StageKey, name: str) -> int | float | None:
        """Return a number that a stage counted; None, and a broken link, if its manifest has none."""
        manifest = self.manifests.get(key)
        value = None if manifest is None else manifest.counters.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        if manifest is not None:
            self.broken(f"{key.folder}/manifest.json", f"counters.{name}: no number, but later stages build on it")
        return None

    def expect_counter(self, key: StageKey, name: str, found: float) -> None:
        """Record a broken link if the stage counted something else than ``found``."""
        counted = self.counter(key, name)
        if counted is not None and counted != found:
            self.broken(f"{key.folder}/manifest.json", f"counters.{name} is {counted}, the stage's files hold {found}")

    def needs(self, key: StageKey, *needed: StageKey) -> bool:
        """Say whether all of ``needed`` can be relied on; note what is left unchecked of ``key`` if not."""
        absent = [other.label for other in needed if other not in self.sound]
        if absent:
            self.report.unchecked.append(f"{key.label}: its rows, since {', '.join(absent)} cannot be relied on")
        return not absent
