"""Manifests, run.json, and the small JSON files beside them: as bytes, and as other values with the right checksum."""

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from schemas.manifest import record_bytes
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import PROMPTS
from tasks.graph import MODELS
from tasks.language_model.sources import ResolvedModels, resolved_models
from tests.fuzz.harness import Reader, Record, try_reader
from tests.fuzz.mutations import changed, damaged
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table

pytestmark = [pytest.mark.usefixtures("forkserver"), pytest.mark.xdist_group("children")]

KEY = StageKey("prompts")
MODELS_FOUND = {
    "teacher_path": "models/teacher",
    "teacher_commit": None,
    "teacher_version": "v",
    "teacher_context": 8,
    "student_context": 8,
    "shared_vocab": 9,
}
TOKENS = (b"\xff", b"\x00", b"\\ud800", b"NaN", b"9" * 400, b"[" * 300, b'"', b"\n}", b"null", b'"schema_version": 1,')


def _run(folder: Path) -> RunStore:
    """Return a run with two finished stages, made when it is first asked for."""
    if not (folder / "test").is_dir():
        store = make_store(folder, make_config(folder))
        finish_stage(store, KEY, PROMPTS, [prompts_table({"a": "train", "b": "held_out"})])
        store.begin(MODELS, "test")
        ResolvedModels.model_validate(MODELS_FOUND).write(store, store.path(MODELS, "models.json"))
        store.finish(MODELS, finish_stage(store, KEY, PROMPTS, [prompts_table({"a": "train"})]))
    return RunStore(folder / "test")


@cache
def _written() -> tuple[bytes, bytes]:
    """Return a manifest and a run.json as a run has them."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        store = _run(Path(name))
        record = store.record()
        assert record is not None
        # Times and places differ from run to run; inputs may not.
        fixed = {"created": "2026-01-01", "updated": "2026-01-01", "packages": {"torch": "2"}, "config_hash": "0"}
        manifest = store.finished(KEY).model_copy(update={"started": "2026-01-01", "finished": "2026-01-02"})
        config = {**record.config, "root": "runs"}
        outputs = [output.model_copy(update={"sha256": "0" * 64}) for output in manifest.outputs]
        return (
            record_bytes(manifest.model_copy(update={"outputs": outputs})),
            record_bytes(record.model_copy(update={**fixed, "run_id": "0", "config": config})),
        )


def _sealed(value: Any) -> bytes:
    body = json.dumps(value, indent=2).removesuffix("\n}").encode()
    return body + f',\n  "checksum": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _values(data: bytes) -> Any:
    values = json.loads(data)
    del values["checksum"]
    return values


def read_manifest(data: bytes, folder: Path) -> None:
    store = _run(folder)
    store.path(KEY, "manifest.json").write_bytes(data)
    manifest = store.finished(KEY)
    assert manifest.outputs_fingerprint
    store.first_damage(manifest)
    store.table_files(KEY)
    assert KEY in store.stages()


def read_run(data: bytes, folder: Path) -> None:
    store = _run(folder)
    (store.folder / "run.json").write_bytes(data)
    opened = RunStore.open(store.folder)
    assert opened.config.model_dump_json().encode()


def read_models(data: bytes, folder: Path) -> None:
    store = _run(folder)
    store.path(MODELS, "models.json").write_bytes(data)
    assert resolved_models(store).shared_vocab >= 1


def read_unfinished(data: bytes, folder: Path) -> None:
    store = _run(folder)
    key = StageKey("score", 0)
    shutil.rmtree(store.path(key), ignore_errors=True)
    store.path(key).mkdir(parents=True)
    store.path(key, ".partial.json").write_bytes(data)
    store.path(key, "part-00000.parquet").write_bytes(b"finished work")
    store.begin(key, "fingerprint")
    # Work stays only if it is certain that it is this stage's.
    try:
        assert store.part(key, 0).is_file() == (json.loads(data) == "fingerprint")
    except (ValueError, RecursionError):
        assert not store.part(key, 0).exists()


READERS = (
    Reader("manifest, bytes", 600, lambda: damaged([_written()[0]], TOKENS), read_manifest, ("manifest.json",)),
    Reader(
        "manifest, values",
        500,
        lambda: changed([_values(_written()[0])]).map(_sealed),
        read_manifest,
        ("manifest.json",),
    ),
    Reader("run.json, bytes", 400, lambda: damaged([_written()[1]], TOKENS), read_run, ("run.json",), 3_000),
    Reader(
        "run.json, values", 700, lambda: changed([_values(_written()[1])]).map(_sealed), read_run, ("run.json",), 3_000
    ),
    Reader(
        "models.json",
        500,
        lambda: st.one_of(
            damaged([json.dumps(MODELS_FOUND).encode()], TOKENS),
            changed([MODELS_FOUND]).map(lambda value: json.dumps(value).encode()),
        ),
        read_models,
        ("models.json",),
    ),
    Reader(
        "fingerprint of unfinished work",
        200,
        lambda: damaged([b'"fingerprint"', b"[" * 3_000, b'{"a": "fingerprint"}'], TOKENS),
        read_unfinished,
        (".partial.json",),
    ),
)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_every_record_is_read_or_refused(reader: Reader, record_property: Record) -> None:
    record_property("fuzzed inputs", try_reader(__name__, reader))


def test_one_changed_byte_of_a_record_is_found() -> None:
    from schemas.errors import ArtifactError
    from schemas.manifest import Manifest, parse_record

    good = _written()[0]
    assert parse_record(good, "manifest.json", Manifest)
    for at in range(len(good)):
        for bit in (1, 32):
            bad = bytearray(good)
            bad[at] ^= bit
            with pytest.raises(ArtifactError, match=r"manifest\.json"):
                parse_record(bytes(bad), "manifest.json", Manifest)
