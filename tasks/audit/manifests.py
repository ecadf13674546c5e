"""Manifests against what lies in a run's folders, and against each other: from inputs to outputs."""

import importlib
from collections.abc import Iterable
from typing import Any

from schemas.errors import ArtifactError, NPDError
from schemas.local_files import TEMPORARY
from schemas.manifest import MANIFEST_NAME, RUN_NAME, FileRecord, Manifest, hash_json, parse_record
from schemas.run_lock import LOCK_NAME, STAGES_LOCK_NAME
from schemas.run_store import PARTIAL_NAME, REPORT_NAME, SUPERSEDED
from schemas.stage_key import StageKey
from tasks.audit.findings import Audit
from tasks.audit.stored_files import StoredFiles
from tasks.stage import plan, stage_of, stages_of

_OWN = (RUN_NAME, LOCK_NAME, STAGES_LOCK_NAME, REPORT_NAME)


def _keys_of(audit: Audit[Any], names: Iterable[str]) -> dict[str, StageKey]:
    """Return the stage in whose folder each file lies, by the file's name, of those that lie in one."""
    order = stages_of(audit.config)
    keys = {name: StageKey.of_file(name) for name in names}
    return {name: key for name, key in keys.items() if key is not None and (key.round is not None or key in order)}


def read_manifests(audit: Audit[Any], files: StoredFiles, sizes: dict[str, int]) -> list[StageKey]:
    """Read every manifest of the run, those of stages that no longer belong to the loop too.

    Returns:
        The stages that have files, in the order of the loop; then others.
    """
    present = set(_keys_of(audit, sizes).values())
    order = stages_of(audit.config)
    for key in (*order, *sorted(present - set(order), key=lambda key: key.folder)):
        name = f"{key.folder}/{MANIFEST_NAME}"
        if name not in sizes:
            if key in order:
                audit.report.unfinished.append(f"{key.label} ({'unfinished' if key in present else 'not run'})")
            continue
        try:
            manifest = parse_record(files.read(name), name, Manifest)
        except FileNotFoundError:
            audit.broken(name, "missing")
            continue
        except ArtifactError as error:
            audit.broken(name, str(error).removeprefix(f"{name}: "))
            continue
        audit.report.coverage.files += 1
        audit.report.coverage.bytes += sizes[name]
        if (manifest.stage, manifest.round) != key:
            audit.broken(name, f"is of stage `{StageKey(manifest.stage, manifest.round).label}`, not of `{key.label}`")
            continue
        audit.manifests[key] = manifest
    return [*(key for key in order if key in present), *sorted(present - set(order), key=lambda key: key.folder)]


def check_files(audit: Audit[Any], files: StoredFiles, sizes: dict[str, int], key: StageKey) -> None:
    """Hash every file that a stage's manifest names, and look for files that it does not name."""
    manifest = audit.manifests.get(key)
    inside = {name for name in sizes if name.startswith(f"{key.folder}/")} - {f"{key.folder}/{MANIFEST_NAME}"}
    if manifest is None:
        if f"{key.folder}/{MANIFEST_NAME}" in sizes:
            audit.report.unchecked.append(f"{key.label}: all of it, since its manifest cannot be relied on")
        return
    sound = True
    total, done = sum(record.bytes for record in manifest.outputs), 0
    for record in manifest.outputs:
        audit.watch(f"{key.label}: files", done, total, "bytes")
        if not record.path.startswith(f"{key.folder}/"):
            damage: str | None = f"named by the manifest of `{key.label}`, whose folder it is not in"
        else:
            try:
                damage = files.damage(record, sizes)
            except ArtifactError as error:
                damage = str(error).rpartition(f"{record.path}: ")[2]
        if damage is not None:
            sound = False
            audit.broken(record.path, damage)
        done += record.bytes
        audit.report.coverage.files += 1
        audit.report.coverage.bytes += record.bytes
    names = [record.path for record in manifest.outputs]
    if len(set(names)) < len(names):
        audit.broken(f"{key.folder}/{MANIFEST_NAME}", "outputs: names a file twice")
    for name in sorted(inside - set(names)):
        last = name.rpartition("/")[2]
        if last == PARTIAL_NAME or TEMPORARY in name:
            audit.report.notes.append(f"{name}: left by a process that died; nothing reads it")
        else:
            sound = False
            audit.broken(name, f"lies in the folder of `{key.label}`, whose manifest does not name it")
    if sound:
        audit.sound.add(key)


def check_chain(audit: Audit[Any], key: StageKey) -> None:
    """Check that a stage's inputs are the present outputs of the stages it reads, and its fingerprint theirs.

    Sources outside the run (prompt files, models) that have changed or are gone since break nothing: a run must hold
    on a machine that has only the run. They are noted.
    """
    manifest, stage = audit.manifests.get(key), stage_of(audit.config, key)
    if manifest is None:
        return
    where = f"{key.folder}/{MANIFEST_NAME}"
    read = stage.inputs(audit.config, key)
    absent = [other.label for other in read if other not in audit.manifests]
    if absent:
        audit.broken(
            where, f"inputs: it reads {', '.join(f'`{name}`' for name in absent)}, which has no valid manifest"
        )
        return
    present = [record for other in read for record in audit.manifests[other].outputs]
    audit.report.coverage.joins += len(present)
    if manifest.inputs != present:
        audit.broken(where, f"inputs: {_first_other_input(manifest.inputs, present)}")
        return
    settings = stage.config(audit.config, key)
    if manifest.stage_version != stage.version:
        audit.broken(
            where,
            f"stage_version: written by version {manifest.stage_version} of the stage, this software has "
            f"{stage.version}; `npd run` runs it again",
        )
    elif hash_json(manifest.config) != hash_json(settings):
        names = ", ".join(f"`{name}`" for name in differing_keys(manifest.config, settings))
        audit.broken(where, f"config: {names} is not what {RUN_NAME} says now; `npd run` runs the stage again")
    else:
        _check_fingerprint(audit, key, manifest, where)


def _check_fingerprint(audit: Audit[Any], key: StageKey, manifest: Manifest, where: str) -> None:
    module = importlib.import_module(stage_of(audit.config, key).module)
    try:
        outside = hasattr(module, "source_fingerprints") and bool(module.source_fingerprints(audit.config))
        expected = plan(audit.store, audit.config, key).fingerprint
    except NPDError as error:
        if not hasattr(module, "source_fingerprints"):
            raise
        audit.report.notes.append(f"{key.label}: sources outside the run cannot be compared: {error}")
        return
    if manifest.fingerprint == expected:
        return
    if outside:
        what = {"prompts": "prompt files", "evaluate": "`lm-eval` tasks"}.get(key.stage, "files")
        audit.report.notes.append(
            f"{key.label}: its {what} outside the run are not those it was made from any more; the results here stand, "
            "but `npd run` would make them again"
        )
    else:
        audit.broken(where, "fingerprint: is not that of its settings and inputs")


def _first_other_input(recorded: list[FileRecord], present: list[FileRecord]) -> str:
    known = {record.path: record for record in present}
    for record in recorded:
        found = known.get(record.path)
        if found is None:
            return f"{record.path} was read, but no stage it reads has it now"
        if found != record:
            return f"{record.path} was read with sha256 {record.sha256[:12]}…, it has {found.sha256[:12]}… now"
    names = {record.path for record in recorded}
    missed = [record.path for record in present if record.path not in names]
    return f"{missed[0]} is there, but was not read" if missed else "not in the order of the stages it reads"


def differing_keys(left: Any, right: Any, prefix: str = "") -> list[str]:
    """Return the paths of the values in which two JSON objects differ.

    >>> differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4})
    ['a.c', 'd']
    """
    if not (isinstance(left, dict) and isinstance(right, dict)):
        return [] if left == right else [prefix]
    names: list[str] = []
    for name in dict.fromkeys([*left, *right]):
        path = f"{prefix}.{name}" if prefix else str(name)
        same = name in left and name in right
        names += differing_keys(left[name], right[name], path) if same else [path]
    return names


def check_other_files(audit: Audit[Any], files: StoredFiles, sizes: dict[str, int]) -> None:
    """Hash what is kept of stages that ran again, and note what belongs to nothing."""
    manifests = [name for name in sizes if name.startswith(f"{SUPERSEDED}/") and name.endswith(f"/{MANIFEST_NAME}")]
    named: set[str] = set()
    for name in manifests:
        folder = name.removesuffix(f"/{MANIFEST_NAME}")
        audit.watch(folder, 0, 0, "files")
        try:
            named |= _check_earlier(audit, files, sizes, folder)
        except FileNotFoundError:
            # It was listed.
            audit.report.notes.append(f"{folder}: an earlier result that was deleted (`npd gc`) as it was looked at")
            named |= {other for other in sizes if other.startswith(f"{folder}/")}
    of_stages = _keys_of(audit, sizes)
    for name in sizes:
        if name in _OWN or name in named or name.startswith("logs/") or name in of_stages:
            continue
        if TEMPORARY in name:
            audit.report.notes.append(f"{name}: left by a process that died; `npd gc` deletes it")
        elif name.startswith(f"{SUPERSEDED}/"):
            audit.broken(name, "lies among earlier results, and no manifest names it")
        else:
            audit.report.notes.append(f"{name}: belongs to no stage, and was not checked")


def _check_earlier(audit: Audit[Any], files: StoredFiles, sizes: dict[str, int], folder: str) -> set[str]:
    """Hash an earlier result, and return the names of the files that its manifest accounts for.

    Raises:
        FileNotFoundError: a file that was listed is not there any more.
    """
    name = f"{folder}/{MANIFEST_NAME}"
    try:
        manifest = parse_record(files.read(name), name, Manifest)
    except ArtifactError as error:
        audit.broken(name, str(error).removeprefix(f"{name}: "))
        return {other for other in sizes if other.startswith(f"{folder}/")}
    key, named = StageKey(manifest.stage, manifest.round), {name}
    for record in manifest.outputs:
        moved = folder + record.path.removeprefix(key.folder)
        named.add(moved)
        if moved not in sizes:
            audit.broken(moved, "missing from an earlier result that is kept")
        elif sizes[moved] != record.bytes or files.hash(moved) != record.sha256:
            audit.broken(moved, "its bytes are not those the manifest of this earlier result recorded (sha256)")
        audit.report.coverage.files += 1
        audit.report.coverage.bytes += record.bytes
    audit.report.notes.append(f"{folder}: an earlier result of `{key.label}`; `npd gc` deletes it")
    return named
