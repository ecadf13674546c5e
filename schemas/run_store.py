"""The one door to a run's files: nobody else joins paths or names them."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas import local_files
from schemas.config import RunConfig, RunSettings, parse_config, parse_settings
from schemas.errors import ArtifactError, RunNotFoundError
from schemas.local_files import storage_errors
from schemas.manifest import (
    MANIFEST_NAME,
    RUN_NAME,
    FileRecord,
    Manifest,
    RunRecord,
    hash_files,
    hash_json,
    parse_record,
    record_bytes,
)
from schemas.mirror import Mirror
from schemas.provenance import now_iso, package_versions, run_identity
from schemas.run_files import RunFiles
from schemas.stage_key import StageKey
from schemas.table_files import read_parquet, write_parquet
from schemas.tables import TableSchema

REPORT_NAME = "report.html"
"""The run as a page to look at; made from the rest, so nothing reads it."""

SUPERSEDED = "superseded"
"""Folder of a run that keeps the earlier results of stages that ran again, until `npd gc`."""

PARTIAL_NAME = ".partial.json"
"""Holds the fingerprint of a stage at work; nothing reads it once the stage has a manifest."""
_OTHER_BYTES = "its bytes are not those the manifest recorded"


class RunStore(RunFiles):
    """One run: its record, its stages, their tables.

    A stage's files appear under their names only when whole, and count only once the stage's manifest names them.
    """

    def __init__(self, place: str | Path) -> None:
        super().__init__(place)
        self._records: dict[StageKey, dict[str, FileRecord]] = {}
        """What a stage's manifest names, by path, as this store has last read it from an object store."""

    # -- the run ---------------------------------------------------------------------------------------------------

    @classmethod
    def at(cls, config: RunSettings) -> "RunStore":
        """Return the store of ``root/name``, whether or not there is a run."""
        return cls(f"{config.root.rstrip('/')}/{config.name}" if config.root != "/" else f"/{config.name}")

    @classmethod
    def create(cls, config: RunSettings) -> "RunStore":
        """Open or create ``root/name``; see ``record_config``."""
        store = cls.at(config)
        store.record_config(config)
        return store

    @classmethod
    def open(cls, place: str | Path) -> "RunStore":
        """Open an existing run.

        Raises:
            RunNotFoundError: there is no run in ``place``.
        """
        store = cls(place)
        if store.record() is None:
            raise RunNotFoundError(f"{place}: no run here (no {RUN_NAME}); start one with `npd run CONFIG`")
        return store

    def record(self) -> RunRecord | None:
        """Return ``run.json``, or None if the run was never started."""
        data = self.read(RUN_NAME)
        return None if data is None else parse_record(data, f"{self.url}/{RUN_NAME}", RunRecord)

    def record_config(self, config: RunSettings, run_id: str | None = None) -> None:
        """Write ``config`` to ``run.json`` as what the run runs with from now on; a new run may carry another's id.

        Raises:
            StorageError: the place cannot be written to.
        """
        record, values, now = self.record(), config.model_dump(mode="json"), now_iso()
        config_hash = hash_json(config.identified())
        if record is not None and (record.config, record.config_hash) == (values, config_hash):
            return
        updated = RunRecord(
            run_id=record.run_id if record is not None else run_id or run_identity(config),
            config_hash=config_hash,
            config=values,
            seed=config.seed,
            packages=package_versions(),
            created=now if record is None else record.created,
            updated=now,
        )
        with storage_errors(self.url):
            self.write_bytes(self.folder / RUN_NAME, record_bytes(updated))

    @property
    def config(self) -> RunConfig:
        """The config a distillation run last ran with."""
        return parse_config(self.recorded_values(), origin=f"{self.url}/{RUN_NAME}")

    @property
    def settings(self) -> RunSettings:
        """The config a run of any kind last ran with."""
        return parse_settings(self.recorded_values(), origin=f"{self.url}/{RUN_NAME}")

    def recorded_values(self) -> dict[str, Any]:
        """Return the config the run last ran with as it was recorded, not validated.

        Raises:
            ArtifactError: there is no run.
        """
        record = self.record()
        if record is None:
            raise ArtifactError(f"{self.url}: no {RUN_NAME}")
        return record.config

    # -- stages ----------------------------------------------------------------------------------------------------

    def path(self, key: StageKey, *names: str) -> Path:
        """Return the local path of a stage's folder, or of something in it."""
        return self.folder.joinpath(key.folder, *names)

    def checkpoint(self, key: StageKey) -> Path:
        """Return the folder of a train stage's last checkpoint: model, optimizer, schedule, RNG, step."""
        return self.path(key, "checkpoint")

    def log(self, key: StageKey) -> Path:
        """Return the file that holds what a stage's process printed.

        >>> RunStore("runs/a").log(StageKey("score", 1)).name
        'round-1-score.log'
        """
        return self.folder / "logs" / f"{key.label.replace(' · ', '-').replace(' ', '-')}.log"

    def manifest(self, key: StageKey) -> Manifest | None:
        """Return a stage's manifest, or None while it has none."""
        name = f"{key.folder}/{MANIFEST_NAME}"
        self._records.pop(key, None)
        data = self.read(name)
        manifest = None if data is None else parse_record(data, f"{self.url}/{name}", Manifest)
        if manifest is not None and self.mirror is not None:
            self._records[key] = {record.path: record for record in manifest.outputs}
        return manifest

    def finished(self, key: StageKey) -> Manifest:
        """Return the manifest of a stage that must be there.

        Raises:
            ArtifactError: the stage has not run.
        """
        manifest = self.manifest(key)
        if manifest is None:
            raise ArtifactError(f"{self.url}/{key.folder}: stage `{key.label}` has not finished; run it first")
        return manifest

    def has_begun(self, key: StageKey) -> bool:
        """Say whether anything of a stage is there."""
        return bool(self.objects.sizes(key.folder)) if self.objects is not None else self.path(key).is_dir()

    def first_damage(self, manifest: Manifest, *, content: bool = True) -> str | None:
        """Return what is wrong with the first output that is not as ``manifest`` says; None if all hold.

        Args:
            manifest: Of a finished stage.
            content: Hash local files too, not only compare their sizes. Objects in a store are hashed when read.
        """
        sizes = None if self.mirror is None else self.mirror.sizes_of(manifest.outputs)
        for record in manifest.outputs:
            path = self.folder / record.path
            size = sizes.get(record.path) if sizes is not None else path.stat().st_size if path.is_file() else None
            if size != record.bytes:
                return f"{record.path}: {'missing' if size is None else _OTHER_BYTES}"
        hashed = manifest.outputs if content and sizes is None else []
        found = zip(hashed, hash_files([self.folder / record.path for record in hashed]), strict=True)
        return next((f"{record.path}: {_OTHER_BYTES}" for record, sha256 in found if sha256 != record.sha256), None)

    def begin(self, key: StageKey, fingerprint: str) -> None:
        """Make the stage's folder ready.

        Finished shards of the same fingerprint stay. A finished result of another is kept under ``superseded/``. What
        is damaged goes, and so does unfinished work of another.
        """
        partial = self.path(key, PARTIAL_NAME)
        if self.has_begun(key):
            manifest = self.manifest(key)
            if manifest is not None and manifest.fingerprint != fingerprint:
                self.supersede(key)
            elif manifest is not None or self.fingerprint_at_work(key) != fingerprint:
                self.remove(self.path(key))
            elif self.mirror is not None:
                self.mirror.restore(key.folder)
        elif self.mirror is not None:
            local_files.remove(self.path(key))
        self._records.pop(key, None)
        if not partial.is_file():
            self.write_bytes(partial, json.dumps(fingerprint).encode())
        local_files.remove_temporaries(self.path(key))

    def fingerprint_at_work(self, key: StageKey) -> Any:
        """Return the fingerprint of a stage that has begun and not finished, wherever it runs; None if none has."""
        data = self.read(f"{key.folder}/{PARTIAL_NAME}")
        try:
            return None if data is None else json.loads(data)
        except (ValueError, RecursionError):
            return None

    def outputs(self, key: StageKey) -> list[FileRecord]:
        """Hash and count every file in the stage's folder."""
        folder = self.path(key)
        files = sorted(
            (p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST_NAME and not p.name.startswith(".")),
            # From 100,000 shards on their numbers are longer.
            key=lambda p: (p.parent, len(p.name) if p.name.startswith("part-") else 0, p.name),
        )
        return [
            FileRecord(
                path=self.relative(path),
                sha256=sha256,
                bytes=path.stat().st_size,
                rows=pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None,
            )
            for path, sha256 in zip(files, hash_files(files), strict=True)
        ]

    def finish(self, key: StageKey, manifest: Manifest) -> None:
        """Write the manifest: from here on the stage is complete.

        Raises:
            RunLockedError: another process has taken the run meanwhile.
        """
        self.lock.confirm()
        self._records.pop(key, None)
        self.write_bytes(self.path(key, MANIFEST_NAME), record_bytes(manifest))
        self.remove(self.path(key, PARTIAL_NAME))

    def supersede(self, key: StageKey) -> None:
        """Put a stage's result aside, so that the stage runs again from its start; unfinished work goes."""
        try:
            manifest = self.manifest(key)
        except ArtifactError:
            manifest = None
        self._records.pop(key, None)
        if manifest is None:
            self.remove(self.path(key))
            return
        stamp = "".join(c for c in manifest.finished if c.isdigit())[:17]
        target = self.folder / SUPERSEDED / key.folder / f"{stamp}-{manifest.fingerprint[:8]}"
        # The same result, put aside twice: a crash came between.
        self.remove(target)
        self.move(self.path(key), target)

    def superseded(self) -> list[tuple[str, int]]:
        """Return the results put aside, and what processes that died left half-written: name and bytes of each file."""
        if self.objects is not None:
            return list(self.objects.sizes(SUPERSEDED).items())
        files = [p for p in (self.folder / SUPERSEDED).rglob("*") if p.is_file()]
        for leftover in local_files.leftovers(self.folder):
            files += [leftover] if leftover.is_file() else [p for p in leftover.rglob("*") if p.is_file()]
        return [(self.relative(path), path.stat().st_size) for path in sorted(set(files))]

    def drop_superseded(self) -> None:
        """Remove what ``superseded`` lists. The run must be held."""
        self.remove(self.folder / SUPERSEDED)
        local_files.remove_temporaries(self.folder)

    def stages(self) -> list[StageKey]:
        """Return the keys of the stages that have a folder, in the order of their folders."""
        if self.objects is not None:
            names = set(self.objects.sizes())
        else:
            names = {self.relative(path) for path in self.folder.glob(f"*/{MANIFEST_NAME}")}
            names |= {f"{self.relative(path)}/" for path in self.folder.glob("*/stage=*")}
        keys = {key for name in names if (key := StageKey.of_file(name)) is not None}
        # Beside the stages that all rounds share lie folders of no stage.
        found = (key for key in keys if key.round is not None or f"{key.folder}/{MANIFEST_NAME}" in names)
        return sorted(found, key=lambda key: key.folder)

    def fetch(self, path: Path) -> Path:
        """Make a file or folder of a finished stage present here, and return its path.

        Raises:
            ArtifactError: a downloaded file is missing, or is not what its stage's manifest says.
        """
        if self.mirror is not None:
            self._fetch(self.mirror, self.relative(path))
        return path

    def _fetch(self, mirror: Mirror, name: str) -> None:
        key = StageKey.of_file(f"{name}/")
        if key is None:
            return
        # A manifest names all files of its stage: read again for each, they would take the square of their number.
        record = self._records.get(key, {}).get(name)
        if record is not None:
            # Where it fails, another process may have run the stage again since.
            with suppress(ArtifactError):
                mirror.fetch(record)
                return
        manifest = self.manifest(key)
        if manifest is not None:
            mirror.fetch_all(name, [r for r in manifest.outputs if f"{r.path}/".startswith(f"{name}/")])

    def receive(self, path: Path, *, anew: bool = False) -> Path:
        """Make a file that another machine wrote for a stage at work present here, and return its path.

        ``anew``: though one is here; only the machine that runs the stage clears older attempts away (``begin``).

        Raises:
            ArtifactError: it is not in the object store; in a folder, the path is that of a file that is not there.
        """
        if self.mirror is not None and (anew or not path.is_file()):
            self.mirror.download(self.relative(path))
        return path

    # -- tables ----------------------------------------------------------------------------------------------------

    def part(self, key: StageKey, index: int) -> Path:
        """Return the path of shard ``index`` of a stage's table."""
        return self.path(key, f"part-{index:05d}.parquet")

    def write_table(self, path: Path, table: pa.Table, schema: TableSchema, *, row_group_rows: int = 4096) -> None:
        """Validate ``table`` and write it under ``path``, whole or not at all.

        Raises:
            ArtifactError: the table does not meet ``schema``.
        """
        record, name = self.record(), self.relative(path)
        run_id = "" if record is None else record.run_id
        with local_files.writing_file(path) as temporary:
            write_parquet(temporary, table, schema, name, run_id=run_id, row_group_rows=row_group_rows)
        if self.mirror is not None:
            self.mirror.upload_table(path)

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
        """Return the Parquet files that a finished stage's manifest names, in order; see ``fetch`` for their bytes."""
        return [self.folder / r.path for r in self.finished(key).outputs if r.path.endswith(".parquet")]

    def read_part(self, path: Path, schema: TableSchema, columns: list[str] | None = None) -> pa.Table:
        """Read one Parquet file of the run, validated against ``schema`` (or those of its ``columns``).

        Raises:
            ArtifactError: the file is missing, no Parquet, of another schema or version, or breaks the contract.
        """
        return read_parquet(self.fetch(path), schema, self.relative(path), columns)

    # -- writing ---------------------------------------------------------------------------------------------------

    def write_report(self, html: str) -> str:
        """Write the run's report, whole or not at all, and return where it lies.

        Raises:
            StorageError: the place cannot be written to.
        """
        with storage_errors(self.url):
            self.write_bytes(self.folder / REPORT_NAME, html.encode())
        return f"{self.url}/{REPORT_NAME}"

    def has_report(self) -> bool:
        """Say whether the run has a report."""
        if self.objects is None:
            return (self.folder / REPORT_NAME).is_file()
        return self.objects.read(REPORT_NAME) is not None

    def scratch_folder(self, key: StageKey) -> AbstractContextManager[Path]:
        """Give an empty folder on this machine that is gone when the context ends."""
        return local_files.scratch_folder(self.path(key))

    def upload_log(self, key: StageKey) -> None:
        """Put a stage's log beside the run's other files, where these are in an object store."""
        if self.log(key).is_file():
            self.upload(self.log(key))
