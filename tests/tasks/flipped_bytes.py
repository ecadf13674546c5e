"""Bytes flipped in every file of a run, and what `verify` says of them."""

from pathlib import Path

from schemas.run_store import RunStore
from tasks.audit.findings import Report
from tasks.audit.verify import verify

PLACES = [0.0, 0.37, 0.5, 1.0]
"""Shares of a file's length: the very ends, and places in between."""


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def named(report: Report) -> set[str]:
    return {entry.where for entry in report.breaks}


def files_of(store: RunStore) -> list[Path]:
    return [p for p in store.folder.rglob("*") if p.is_file() and p.suffix != ".lock" and p.parent.name != "logs"]


def flipped_and_named(store: RunStore, place: float) -> list[tuple[set[str], set[str]]]:
    """Flip one byte in every file at ``place``, and put it right again; return what was flipped and what was named.

    What the manifests name comes first, then the manifests, then run.json: without the one before there is nothing to
    compare the other with.
    """
    files = files_of(store)
    manifests = [path for path in files if path.name == "manifest.json"]
    record = store.folder / "run.json"
    found = []
    for paths in ([p for p in files if p not in (*manifests, record)], manifests, [record]):
        for path in paths:
            flip(path, round(place * (path.stat().st_size - 1)))
        found.append(({store.relative(path) for path in paths}, named(verify(store))))
        for path in paths:
            flip(path, round(place * (path.stat().st_size - 1)))
    return found
