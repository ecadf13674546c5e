"""What a finished stage says of itself, and of the run as a whole."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from schemas.errors import ArtifactError
from schemas.untrusted_text import readable

MANIFEST_NAME = "manifest.json"
RUN_NAME = "run.json"

_HASHED_AT_ONCE = 256
"""Files that wait to be hashed: a stage may have hundreds of thousands."""


class FileRecord(BaseModel):
    """One file of a stage: ``path`` is relative to the run's folder; ``rows`` is None for files that are no table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    sha256: str
    bytes: int
    rows: int | None = None

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if path.startswith(("/", "\\")) or ".." in PurePosixPath(path).parts or "\0" in path or not path:
            raise ValueError("leaves the run's folder")
        if max(len(part) for part in path.encode(errors="replace").split(b"/")) > 255 or len(path) > 1024:
            raise ValueError("is longer than a path can be")
        return path


class Record(BaseModel):
    """A JSON file that carries a checksum of its own bytes, so that one flipped byte anywhere in it is found."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    REMEDY: ClassVar[str]
    """What to do with a file that cannot be used."""


class Manifest(Record):
    """Written last, atomically: a stage is complete if and only if this is there and its outputs hash to it."""

    REMEDY: ClassVar[str] = "Delete the file to run its stage again"

    schema_name: Literal["npd.manifest"] = "npd.manifest"
    schema_version: Literal[2] = 2
    stage: str
    round: int | None
    fingerprint: str
    """Hash of the inputs' fingerprints, the config this stage reads, its sources and its version."""
    stage_version: int
    config: dict[str, Any]
    inputs: list[FileRecord]
    outputs: list[FileRecord]
    started: str
    finished: str
    host: str
    packages: dict[str, str]
    counters: dict[str, Any]
    """Tokens, seconds, tokens per second, peak memory (bytes), and what the stage counts of its own."""

    @property
    def outputs_fingerprint(self) -> str:
        """Hash of what the stage wrote (names and contents)."""
        return hash_json([[record.path, record.sha256] for record in self.outputs])


class RunRecord(Record):
    """``run.json``: the resolved config as last run, and what ran it."""

    REMEDY: ClassVar[str] = "Delete the file and start with `npd run CONFIG`, which writes it again"

    schema_name: Literal["npd.run"] = "npd.run"
    schema_version: Literal[2] = 2
    run_id: str
    """Hash of the first config without name and places: equal for two runs of one config, wherever they are."""
    config_hash: str
    config: dict[str, Any]
    seed: int
    packages: dict[str, str]
    created: str
    updated: str


R = TypeVar("R", bound=Record)

_SEAL = re.compile(rb',\n  "checksum": "([0-9a-f]{64})"\n}\n\Z')


def hash_json(value: Any) -> str:
    """Return the sha256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the sha256 of each file's bytes, in order; several are read at a time, on a core each."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(paths), _HASHED_AT_ONCE):
            yield from pool.map(hash_file, paths[start : start + _HASHED_AT_ONCE])


def record_bytes(record: Record) -> bytes:
    """Return a record as its file holds it: JSON whose last key is the sha256 of all bytes before that key."""
    body = record.model_dump_json(indent=2).removesuffix("\n}").encode()
    return body + f',\n  "checksum": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def parse_record(data: bytes, where: str, kind: type[R]) -> R:
    """Read what ``record_bytes`` wrote.

    Args:
        data: The file's bytes.
        where: The file, for errors.
        kind: What it should be.

    Raises:
        ArtifactError: the file is not what it should be; names it, the first wrong key, and what to do.
    """
    seal = _SEAL.search(data)
    if seal is None or hashlib.sha256(data[: seal.start()]).hexdigest().encode() != seal[1]:
        raise ArtifactError(f"{where}: {_broken(data, kind)}. {kind.REMEDY}")
    try:
        return kind.model_validate_json(data[: seal.start()] + b"}")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = readable(".".join(str(part) for part in first["loc"])) or "the file"
        raise ArtifactError(f"{where}: {key}: {readable(first['msg'])}. {kind.REMEDY}") from None


def _broken(data: bytes, kind: type[Record]) -> str:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return "not valid JSON"
    version = found.get("schema_version") if isinstance(found, dict) else None
    expected = kind.model_fields["schema_version"].default
    if version != expected and isinstance(version, int) and 0 <= version < 10**6:
        return f"schema_version: written by another version of this software (v{version}, this one reads v{expected})"
    return "checksum: its bytes are not those that were written"
