"""What a finished stage says of itself, and of the run as a whole."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.errors import ArtifactError

MANIFEST_NAME = "manifest.json"
RUN_NAME = "run.json"


class FileRecord(BaseModel):
    """One file of a stage: ``path`` is relative to the run's folder; ``rows`` is None for files that are no table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    sha256: str
    bytes: int
    rows: int | None = None


class Manifest(BaseModel):
    """Written last, atomically: a stage is complete if and only if this is there and its outputs hash to it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_name: Literal["npd.manifest"] = "npd.manifest"
    schema_version: int = 1
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


class RunRecord(BaseModel):
    """``run.json``: the resolved config as last run, and what ran it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_name: Literal["npd.run"] = "npd.run"
    schema_version: int = 1
    run_id: str
    """Hash of the first config without name and places: equal for two runs of one config, wherever they are."""
    config_hash: str
    config: dict[str, Any]
    seed: int
    packages: dict[str, str]
    created: str
    updated: str


R = TypeVar("R", bound=BaseModel)


def hash_json(value: Any) -> str:
    """Return the sha256 of ``value`` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(path: Path, kind: type[R]) -> R | None:
    """Read a manifest or run record; None if there is none.

    Raises:
        ArtifactError: the file is not what it should be; names the file and the first wrong key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from None
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"{path}: {key}: {first['msg']}. Delete the file to run its stage again.") from None
