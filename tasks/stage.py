"""How any stage runs: is it current, what it is given, and the manifest it leaves."""

import importlib
import json
import logging
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from schemas.config import RLConfig, RunConfig, RunSettings
from schemas.local_files import storage_errors
from schemas.manifest import FileRecord, Manifest, hash_json
from schemas.provenance import now_iso, package_versions
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.graph import STAGES, C, Stage, loop
from tasks.rl.graph import RL_LOOP, RL_STAGES
from tasks.stage_clock import StageClock

_logger = logging.getLogger(__name__)

Progress = Callable[[int, int, str], None]
"""Called with work done, work in all, and the unit of both; often, from the stage's own thread."""


def no_progress(done: int, total: int, unit: str) -> None:
    """Ignore progress."""


@dataclass
class StageJob(Generic[C]):
    """What a stage's ``run`` is given.

    Args:
        store: The run's files.
        config: The whole config; a stage reads the part that STAGES names for it.
        key: Which stage of which round.
        progress: Tell people how far the work is.
        counters: What the stage counts; goes into its manifest.
        clock: Counts the stage's seconds, where it runs as a stage.
    """

    store: RunStore
    config: C
    key: StageKey
    progress: Progress = no_progress
    counters: dict[str, Any] = field(default_factory=dict)
    clock: StageClock | None = None

    def start_over(self) -> None:
        """Tell that nothing of earlier attempts is used: its seconds are no more part of the result than its tokens."""
        if self.clock is not None:
            self.clock.start_over()

    def warn(self, message: str) -> None:
        """Tell people of something that does not stop the stage: now in the log, later in manifest and terminal."""
        _logger.warning("%s: %s", self.key.label, message)
        self.counters.setdefault("warnings", []).append(message)

    @property
    def round(self) -> int:
        """The round's index from 0 (WARMUP for the warm-up)."""
        if self.key.round is None:
            raise ValueError(f"stage {self.key.stage} belongs to no round")
        return self.key.round


@dataclass(frozen=True)
class StagePlan:
    """What would make a stage's result current."""

    config: dict[str, Any]
    fingerprint: str
    inputs: list[FileRecord]


def graph_of(config: RunSettings) -> Mapping[str, Stage[Any]]:
    """Return the kinds of stage that the kind of run that ``config`` is of has, by name."""
    return RL_STAGES if isinstance(config, RLConfig) else STAGES


def stage_of(config: RunSettings, key: StageKey) -> Stage[Any]:
    """Return the stage that ``key`` names in the kind of run that ``config`` is of."""
    return graph_of(config)[key.stage]


def stages_of(config: RunSettings) -> list[StageKey]:
    """Return every stage of a run of ``config``, of whatever kind it is, in the order in which they run."""
    return loop(config) if isinstance(config, RunConfig) else list(RL_LOOP)


def downstream(config: RunSettings, key: StageKey) -> list[StageKey]:
    """Return the stages that read, directly or not, what ``key`` writes; in the order in which they run."""
    touched = {key}
    for other in stages_of(config):
        if touched & set(stage_of(config, other).inputs(config, other)):
            touched.add(other)
    return [other for other in stages_of(config) if other in touched and other != key]


def plan(store: RunStore, config: RunSettings, key: StageKey) -> StagePlan:
    """Return the fingerprint and input files ``key`` has now.

    The fingerprint hashes the stage's version, the config it reads, the content of sources outside the run, and of
    every input stage its fingerprint and what it wrote.

    Raises:
        ArtifactError: an input stage has not finished.
    """
    stage = stage_of(config, key)
    read = stage.config(config, key)
    manifests = [store.finished(needed) for needed in stage.inputs(config, key)]
    module = importlib.import_module(stage.module)
    sources = module.source_fingerprints(config) if hasattr(module, "source_fingerprints") else {}
    fingerprint = hash_json(
        {
            "stage": key.stage,
            "round": key.round,
            "version": stage.version,
            "config": read,
            "sources": sources,
            "inputs": [[m.stage, m.round, m.fingerprint, m.outputs_fingerprint] for m in manifests],
        }
    )
    return StagePlan(read, fingerprint, [record for manifest in manifests for record in manifest.outputs])


def current_manifest(store: RunStore, config: RunSettings, key: StageKey, *, content: bool = True) -> Manifest | None:
    """Return the stage's manifest if its result still stands: same fingerprint, every file as recorded.

    Without ``content``, files are compared by size alone.

    Raises:
        ArtifactError: an input stage has not finished.
    """
    manifest = store.manifest(key)
    if manifest is None or manifest.fingerprint != plan(store, config, key).fingerprint:
        return None
    return manifest if store.first_damage(manifest, content=content) is None else None


def standing(store: RunStore, config: RunSettings, *, through: int | None = None) -> dict[StageKey, Manifest]:
    """Return the manifests of what can be shown as the result of ``config``, in the order in which stages run.

    Left out is a stage that ran with other settings or on other inputs than are there, and one that reads such a stage
    or one that is at work: it runs again. Sources outside the run and the stages' files are not looked at, nor are
    settings that one of the two sides does not know: a run of an earlier version can be shown.

    Args:
        store: The run.
        config: Its settings.
        through: Leave out rounds after this one; None: none.

    Raises:
        ArtifactError: a manifest is damaged.
    """
    found: dict[StageKey, Manifest] = {}
    present: dict[str, str] = {}
    stale: set[StageKey] = set()
    for key in stages_of(config):
        if through is not None and key.round is not None and key.round > through:
            continue
        manifest, stage = store.manifest(key), stage_of(config, key)
        if stale & set(stage.inputs(config, key)) or (manifest is None and store.has_begun(key)):
            stale.add(key)
        elif manifest is not None:
            wanted = json.loads(json.dumps(stage.config(config, key)))
            same_inputs = all(present.get(record.path, record.sha256) == record.sha256 for record in manifest.inputs)
            if same_inputs and _agree(manifest.config, wanted):
                found[key] = manifest
                present |= {record.path: record.sha256 for record in manifest.outputs}
            else:
                stale.add(key)
    return found


def _agree(recorded: Any, wanted: Any) -> bool:
    """Say whether two settings are equal in what both of them have."""
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        return all(_agree(recorded[name], wanted[name]) for name in recorded.keys() & wanted.keys())
    if isinstance(recorded, list) and isinstance(wanted, list):
        return len(recorded) == len(wanted) and all(map(_agree, recorded, wanted))
    return bool(recorded == wanted)


def take_over(store: RunStore, config: RunSettings, key: StageKey, lenders: Sequence[RunStore]) -> Manifest | None:
    """Copy a finished stage of equal fingerprint from the first of ``lenders`` that has one; None if none has.

    Equal fingerprints mean equal version, settings, sources and inputs, so the copied manifest is true of this run too:
    when and where its work was done, and how long it took.
    """
    fingerprint = plan(store, config, key).fingerprint
    for lender in lenders:
        manifest = lender.manifest(key)
        if manifest is None or manifest.fingerprint != fingerprint or lender.first_damage(manifest) is not None:
            continue
        if store.manifest(key) is None:
            # An attempt of its own that did not end leaves nothing behind.
            store.remove(store.path(key))
        store.begin(key, fingerprint)
        _copy_outputs(store, key, manifest, lender)
        store.finish(key, manifest)
        return manifest
    return None


def _copy_outputs(store: RunStore, key: StageKey, manifest: Manifest, lender: RunStore) -> None:
    """Copy a stage's files, those of a folder together: a stage takes a folder that is there for whole."""
    folders: dict[Path, list[Path]] = {}
    for record in manifest.outputs:
        path = Path(record.path)
        inside = path.relative_to(key.folder)
        if len(inside.parts) == 1:
            store.write_copy(store.folder / path, lender.fetch(lender.folder / path))
        else:
            folders.setdefault(Path(key.folder) / inside.parts[0], []).append(path)
    for folder, paths in folders.items():
        store.remove(store.folder / folder)
        with store.writing_folder(store.folder / folder) as temporary:
            for path in paths:
                target = temporary / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(lender.fetch(lender.folder / path), target)


def settle(
    store: RunStore, config: RunSettings, key: StageKey, lenders: Sequence[RunStore], progress: Progress = no_progress
) -> Manifest:
    """Return the stage's manifest: its own if the result stands, else one taken over, else that of running it now.

    Raises:
        NPDError: whatever the stage found wrong.
    """
    return (
        current_manifest(store, config, key)
        or take_over(store, config, key, lenders)
        or execute(store, config, key, progress)
    )


def execute(store: RunStore, config: RunSettings, key: StageKey, progress: Progress = no_progress) -> Manifest:
    """Run a stage in this process, continuing from its finished shards, and write its manifest.

    Raises:
        NPDError: whatever the stage found wrong; no manifest is written.
        StorageError: the run's place, or this machine's disk, cannot be written to.
    """
    with storage_errors(f"{store.url}: stage `{key.label}`"), store.lock.stage_at_work():
        return _execute(store, config, key, progress)


def _execute(store: RunStore, config: RunSettings, key: StageKey, progress: Progress) -> Manifest:
    planned, stage = plan(store, config, key), stage_of(config, key)
    started, clock = now_iso(), StageClock(store, key, planned.fingerprint)
    store.begin(key, planned.fingerprint)

    def ticking(done: int, total: int, unit: str) -> None:
        clock.tick()
        progress(done, total, unit)

    job = StageJob(store, config, key, ticking, clock=clock)
    try:
        importlib.import_module(stage.module).run(job)
    except BaseException:
        clock.interrupted()
        raise
    seconds = clock.seconds
    clock.finished()
    counters = {**job.counters, "seconds": round(seconds, 3), "peak_memory_bytes": _peak_memory_bytes()}
    if "tokens" in counters and "tokens_per_second" not in counters:
        counters["tokens_per_second"] = round(counters["tokens"] / seconds, 1)
    manifest = Manifest(
        stage=key.stage,
        round=key.round,
        fingerprint=planned.fingerprint,
        stage_version=stage.version,
        config=planned.config,
        inputs=planned.inputs,
        outputs=store.outputs(key),
        started=started,
        finished=now_iso(),
        host=socket.gethostname(),
        packages=package_versions(),
        counters=counters,
    )
    store.finish(key, manifest)
    return manifest


def _peak_memory_bytes() -> int:
    """Return what this process held at most, or the largest of those it started."""
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak if sys.platform == "darwin" else peak * 1024
