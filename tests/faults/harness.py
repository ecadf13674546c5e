"""Runs the loop, is killed at every point of writing there is, and goes on.

    python -m tests.faults.harness CONFIG [--fresh-cache] [--every N]

One run is started over and over. Each start dies (SIGKILL) at the first point that none before it has died at, so that
every point of the whole run is died at once, and every start but the first continues from what a dead process left.
Each start is a fork of this process, which has everything imported and has computed nothing.

Prints a JSON report: the points, by stage; what was done twice; and how many starts it took.
"""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import yaml

from schemas.config import RunConfig, parse_config
from schemas.object_store import is_url
from schemas.run_store import RunStore
from tasks.fork_server import import_heavy
from tasks.graph import loop
from tasks.stage import current_manifest, execute
from tests.faults.kill_points import Point, arm_local_files, arm_object_store

DIED, DONE = -9, 0


def run_once(config: RunConfig, covered: set[Point], every: int, report: int) -> None:
    """Run what is not current; die at the first point that is not in ``covered``.

    Args:
        config: Of the run.
        covered: Points that earlier starts passed or died at.
        every: Die at the Nth point that is not in ``covered``.
        report: File descriptor for JSON lines: where this start died, what it computed and how far each stage was.
    """
    store = RunStore.at(config)
    computed: list[str] = []
    passed: list[Point] = []
    progress: dict[str, list[tuple[int, str]]] = {}

    def reached(point: Point) -> bool:
        if point.phase == "before" and point.name.endswith(".parquet"):
            computed.append(point.name)
        if point in covered or point in passed:
            return False
        passed.append(point)
        if len(passed) < every:
            return False
        tell(point)
        return True

    def tell(point: Point | None) -> None:
        told = {"point": point, "passed": passed, "computed": computed, "progress": progress}
        os.write(report, json.dumps(told).encode() + b"\n")

    if is_url(config.root):
        arm_object_store(reached)
    else:
        arm_local_files(store.folder, reached)
    with store.lock.held():
        store.record_config(config)
        for key in loop(config):
            if current_manifest(store, config, key) is None:
                execute(store, config, key, partial(note, progress.setdefault(key.folder, [])))
    tell(None)


def note(steps: list[tuple[int, str]], done: int, total: int, unit: str) -> None:
    """Remember how far a stage is."""
    steps.append((done, unit))


def starts(config: RunConfig, *, every: int, fresh_cache: bool) -> Iterator[dict[str, Any]]:
    """Start the run until it ends by itself; yield what each start reported."""
    covered: set[Point] = set()
    while True:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            run_once(config, covered, every, writing)
            os._exit(DONE)
        os.close(writing)
        with os.fdopen(reading) as lines:
            told = lines.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (DIED, DONE):
            raise SystemExit(f"a start ended with {code}, after {told}")
        start: dict[str, Any] = json.loads(told)
        yield start
        if code == DONE:
            return
        covered |= {Point(*point) for point in start["passed"]}
        if fresh_cache:
            # Another machine goes on: it has nothing but what is in the object store.
            shutil.rmtree(RunStore.at(config).folder)


def repeated(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """Return what a start did that the one before it had done: files it computed again, and optimizer steps."""
    twice = {"files": len(set(before["computed"]) & set(after["computed"]))}
    for stage, steps in before["progress"].items():
        again = [done for done, unit in after["progress"].get(stage, []) if unit == "steps"]
        if stage.endswith("stage=train") and steps and again:
            twice["steps"] = max(0, steps[-1][0] - again[0] + 1)
    return twice


def main() -> int:
    """Run the harness on the config named by the first argument.

    `--fresh-cache`: each start is on a new machine. `--every N`: die at each Nth point only.
    """
    config = parse_config(yaml.safe_load(Path(sys.argv[1]).read_text(encoding="utf-8")), origin=sys.argv[1])
    import_heavy()
    if is_url(config.root):
        fsspec.get_filesystem_class(config.root.partition("://")[0])
    points: Counter[str] = Counter()
    worst: Counter[str] = Counter()
    last: dict[str, Any] | None = None
    every = int(sys.argv[sys.argv.index("--every") + 1]) if "--every" in sys.argv else 1
    for start in starts(config, every=every, fresh_cache="--fresh-cache" in sys.argv):
        if start["point"] is not None:
            name, phase = start["point"]
            points[stage_of(name)] += 1
            print(f"{phase:>20}  {name}", file=sys.stderr, flush=True)
        if last is not None:
            for what, count in repeated(last, start).items():
                worst[what] = max(worst[what], count)
        last = start
    print(json.dumps({"points": points, "total": points.total(), "repeated": worst}))
    return 0


def stage_of(name: str) -> str:
    """Return which stage a file belongs to.

    >>> stage_of("round=000/stage=score/part-00000.parquet"), stage_of("run.json")
    ('score', 'run.json')
    """
    parts = name.split("/")
    staged = [part.removeprefix("stage=") for part in parts if part.startswith("stage=")]
    return staged[0] if staged else parts[0]


if __name__ == "__main__":
    sys.exit(main())
