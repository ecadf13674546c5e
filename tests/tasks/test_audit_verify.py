"""`verify` on a small real run: as it is, with bytes flipped, and with wrong tables under manifests that fit them."""

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.config import RunConfig
from schemas.errors import RunNotFoundError
from schemas.manifest import hash_file, record_bytes
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import RUN_KEY
from tasks.audit.stored_files import StoredFiles
from tasks.audit.tables import stage_schema
from tasks.audit.verify import verify
from tasks.graph import MODELS, PROMPTS, loop
from tests.tasks.flipped_bytes import PLACES, files_of, flip, flipped_and_named
from tests.tasks.forged_tables import FORGERIES, forge, put, put_at, reseal
from tests.test_loop import run_loop, smoke_config

pytestmark = pytest.mark.xdist_group("verify")


class Finished(NamedTuple):
    store: RunStore
    config: RunConfig


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, student_dir: Path) -> Finished:
    """A warm-up and two rounds, two packs a step, several shards of every sharded table."""
    settings = ("train.packs_per_step=2", "pack.max_tokens=256", "pack.shard_bins=1", "generate.samples_per_prompt=4")
    return Finished(*run_of(tmp_path_factory.mktemp("audited"), teacher_dir, student_dir, *settings))


def run_of(root: Path, teacher: Path, student: Path, *settings: str) -> tuple[RunStore, RunConfig]:
    config = smoke_config(root, teacher, student, "prompts.sources.0.limit=16", *settings)
    return run_loop(config)[0], config


@pytest.fixture
def run(whole_run: Finished, tmp_path: Path) -> Finished:
    """A copy to damage."""
    store = RunStore(shutil.copytree(whole_run.store.folder, tmp_path / "smoke"))
    return Finished(store, whole_run.config)


def recount(run: Finished, key: StageKey, **counters: Any) -> None:
    manifest = run.store.finished(key)
    changed = manifest.model_copy(update={"counters": manifest.counters | counters})
    run.store.write_bytes(run.store.path(key, "manifest.json"), record_bytes(changed))


def rows_of(run: Finished, key: StageKey) -> pa.Table:
    schema = stage_schema(run.config, key)
    assert schema is not None
    return run.store.read_table(key, schema)


def first_break(run: Finished) -> str:
    report = verify(run.store)
    assert not report.holds
    return str(report.breaks[0])


def test_a_whole_run_holds_and_says_what_it_covered(whole_run: Finished) -> None:
    store, config = whole_run
    told: list[str] = []
    before = {path: path.stat().st_mtime_ns for path in files_of(store)}
    report = verify(store, lambda what, done, total, unit: told.append(what))
    assert (report.breaks, report.notes, report.unchecked, report.unfinished) == ([], [], [], [])
    assert report.coverage.files == len(before)
    assert report.coverage.bytes == sum(path.stat().st_size for path in before)
    packs = [store.finished(key) for key in loop(config) if key.stage == "pack"]
    assert report.coverage.tokens == sum(manifest.counters["tokens"] for manifest in packs)
    records = [record for key in loop(config) for record in store.finished(key).outputs]
    assert report.coverage.rows == sum(record.rows or 0 for record in records)
    assert {"round 1 · pack: rows", "prompts: table", "round 0 · export: files"} <= set(told)
    assert before == {path: path.stat().st_mtime_ns for path in files_of(store)}


@pytest.mark.parametrize("place", PLACES)
def test_one_flipped_byte_in_any_file_is_found_and_the_file_named(run: Finished, place: float) -> None:
    content, manifests, record = flipped_and_named(run.store, place)
    assert len(content[0]) > 60
    assert content[0] <= content[1]
    assert len(manifests[0]) == len(loop(run.config))
    assert manifests[0] <= manifests[1]
    assert record == ({"run.json"}, {"run.json"})
    assert verify(run.store).holds


def test_a_flipped_byte_alone_is_the_first_broken_link(run: Finished) -> None:
    path = run.store.part(StageKey("score", 0), 1)
    flip(path, path.stat().st_size // 3)
    report = verify(run.store)
    assert str(report.breaks[0]) == (
        "round=000/stage=score/part-00001.parquet: its bytes are not those the manifest recorded (sha256)"
    )
    assert any("round 0 · pack: its rows, since round 0 · score" in what for what in report.unchecked)


@pytest.mark.parametrize("key", FORGERIES, ids=lambda key: key.label)
def test_wrong_tables_under_manifests_that_fit_them_are_found(run: Finished, key: StageKey) -> None:
    for shard, change, _ in FORGERIES[key]:
        forge(*run, key, change, shard)
    reseal(*run)
    report = verify(run.store)
    assert report.breaks[0].where.startswith(key.folder)
    files = [run.store.relative(path) for path in run.store.table_files(key)]
    for shard, _, expected in FORGERIES[key]:
        found = [str(entry) for entry in report.breaks if entry.where in (files[shard], key.folder)]
        assert any(re.search(expected, text) for text in found), (expected, found)


def test_response_tokens_of_two_steps_exchanged_are_found(run: Finished) -> None:
    def exchange(table: pa.Table) -> pa.Table:
        tokens = table.column("response_tokens").to_pylist()
        other = next(row for row in range(len(tokens)) if tokens[row] != tokens[0])
        tokens[0], tokens[other] = tokens[other], tokens[0]
        return table.set_column(
            table.schema.get_field_index("response_tokens"), "response_tokens", pa.array(tokens, pa.int64())
        )

    forge(*run, StageKey("train", 1), exchange)
    reseal(*run)
    assert "the packs of this step have" in first_break(run)


def test_a_held_out_prompt_among_the_rollouts_is_found(run: Finished) -> None:
    prompts = rows_of(run, PROMPTS)
    held_out = prompts.column("prompt_id")[prompts.column("split").to_pylist().index("held_out")].as_py()
    forge(
        *run, StageKey("generate", 0), lambda t: put("prompt_id", held_out)(put("sample_id", f"r000-{held_out}-000")(t))
    )
    reseal(*run)
    assert "a held-out prompt: it must never be trained on" in first_break(run)


def test_a_sample_that_is_there_twice_is_found_across_shards(run: Finished) -> None:
    key = StageKey("generate", 1)
    first = rows_of(run, key).slice(0, 1)
    forge(*run, key, lambda t: pa.concat_tables([first, t.slice(1)]), shard=1)
    reseal(*run)
    assert "is there 2 times" in first_break(run)


def test_a_dropped_sample_in_a_pack_is_found(run: Finished) -> None:
    key = StageKey("filter", 0)
    ledger = rows_of(run, key)
    dropped = ledger.column("sample_id")[ledger.column("keep").to_pylist().index(False)].as_py()
    forge(*run, StageKey("pack", 0), put_at("sample_ids", 0, dropped))
    reseal(*run)
    assert f"sample {dropped} is packed, but the round does not keep it" in first_break(run)


def test_exchanged_weights_are_found_by_the_samples_they_did_not_sample(run: Finished) -> None:
    weights = [run.store.path(StageKey("export", index), "model", "model.safetensors") for index in (WARMUP, 0)]
    shutil.copyfile(weights[1], weights[0])
    reseal(*run)
    assert first_break(run).startswith("round=000/stage=generate/part-00000.parquet: row 0")


def test_a_table_of_another_run_is_found(run: Finished) -> None:
    path = run.store.part(StageKey("score", 0), 0)
    table = pq.read_table(path, partitioning=None)
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {RUN_KEY: b"0" * 16}), path)
    reseal(*run)
    assert "part-00000.parquet: is of run `0000000000000000`, this run is" in first_break(run)


def test_counters_that_the_tables_do_not_bear_out_are_found(run: Finished) -> None:
    counters = {
        PROMPTS: ["held_out"],
        StageKey("generate", 0): ["samples", "tokens"],
        StageKey("filter", 0): ["samples", "kept"],
        StageKey("pack", 0): ["bins", "sequences", "tokens", "response_tokens"],
        StageKey("train", 1): ["start_step", "policy_step", "packs", "response_tokens", "epochs_done"],
    }
    for key, names in counters.items():
        recount(run, key, **dict.fromkeys(names, 10**6))
    found = [str(entry) for entry in verify(run.store).breaks]
    for key, names in counters.items():
        for name in names:
            hold = "the steps make" if name == "epochs_done" else "the stage's files hold"
            told = f"{key.folder}/manifest.json: counters.{name} is 1000000, {hold}"
            assert any(text.startswith(told) for text in found), told


def test_a_manifest_that_says_what_cannot_be_is_found(run: Finished) -> None:
    key, other = StageKey("filter", 0), StageKey("filter", 1)
    manifest = run.store.finished(key)
    first, *rest = manifest.outputs
    stray = run.store.finished(other).outputs[0]
    for change, expected in (
        ({"outputs": [first, first, *rest]}, "stage=filter/manifest.json: outputs: names a file twice"),
        ({"outputs": [stray, *rest]}, f"{stray.path}: named by the manifest of `round 0 · filter`, whose folder it is"),
        ({"outputs": [first.model_copy(update={"rows": 99}), *rest]}, "rows, the manifest recorded 99"),
        ({"stage_version": 99}, "stage_version: written by version 99 of the stage"),
    ):
        changed: Any = change
        run.store.write_bytes(run.store.path(key, "manifest.json"), record_bytes(manifest.model_copy(update=changed)))
        assert any(expected in str(entry) for entry in verify(run.store).breaks), expected


def test_a_stage_whose_table_or_model_is_gone_without_a_trace_is_found(run: Finished) -> None:
    """Files gone, under manifests that name none of them."""
    filtered, exported = StageKey("filter", 1), StageKey("export", 1)
    for path in run.store.table_files(filtered):
        path.unlink()
    run.store.path(exported, "model", "model.safetensors").unlink()
    run.store.path(MODELS, "models.json").write_text("{}")
    reseal(*run)
    found = [str(entry) for entry in verify(run.store).breaks]
    for expected in (
        "models/models.json: is not what stage `models` writes",
        "round=001/stage=filter: has 0 files of table `filter`: none",
        "round=001/stage=export/model: holds no model: config.json or safetensors files are missing",
    ):
        assert expected in found


def test_policy_steps_that_were_not_trained_are_found(run: Finished) -> None:
    recount(run, StageKey("train", 0), policy_step=3)
    reseal(*run)
    assert "counters.policy_step is 3, the stage's files hold" in first_break(run)


def test_inputs_that_are_not_there_any_more_are_found(run: Finished) -> None:
    key = StageKey("filter", 0)
    path = run.store.table_files(key)[0]
    schema = stage_schema(run.config, key)
    assert schema is not None
    run.store.write_table(path, run.store.read_part(path, schema), schema, row_group_rows=1)
    manifest = run.store.finished(key).model_copy(update={"outputs": run.store.outputs(key)})
    run.store.write_bytes(run.store.path(key, "manifest.json"), record_bytes(manifest))
    now = hash_file(path)[:12]
    found = first_break(run)
    assert found.startswith("round=000/stage=pack/manifest.json: inputs: round=000/stage=filter/part-00000.parquet")
    assert now in found


@pytest.mark.parametrize("stage", ["score", "evaluate"])
def test_a_fingerprint_that_is_not_that_of_its_inputs_is_found(run: Finished, stage: str) -> None:
    key = StageKey(stage, 1)
    manifest = run.store.finished(key).model_copy(update={"fingerprint": "0" * 64})
    run.store.write_bytes(run.store.path(key, "manifest.json"), record_bytes(manifest))
    assert first_break(run).startswith(f"{key.folder}/manifest.json: fingerprint: is not that of its settings")


def test_a_changed_setting_names_the_first_stage_that_it_touches(run: Finished) -> None:
    changed = run.config.model_copy(update={"filter": run.config.filter.model_copy(update={"max_delta_ifd": 0.7})})
    run.store.record_config(changed)
    assert "stage=filter/manifest.json: config: `filter.max_delta_ifd` is not what run.json says now" in first_break(
        run
    )


def test_a_manifest_in_the_wrong_folder_is_found(run: Finished) -> None:
    shutil.copyfile(
        run.store.path(StageKey("score", 0), "manifest.json"), run.store.path(StageKey("score", 1), "manifest.json")
    )
    assert "is of stage `round 0 · score`, not of `round 1 · score`" in first_break(run)


def test_a_manifest_that_is_a_link_to_nowhere_is_found(run: Finished) -> None:
    path = run.store.path(StageKey("filter", 1), "manifest.json")
    path.unlink()
    path.symlink_to("nowhere")
    assert first_break(run) == "round=001/stage=filter/manifest.json: missing"


def test_a_file_that_no_manifest_names_is_found_and_one_that_is_gone_too(run: Finished) -> None:
    stray = run.store.path(StageKey("pack", 0), "part-00099.parquet")
    shutil.copyfile(run.store.part(StageKey("pack", 0), 0), stray)
    assert "part-00099.parquet: lies in the folder of `round 0 · pack`, whose manifest does not name it" in first_break(
        run
    )
    stray.unlink()
    run.store.path(MODELS, "student", "config.json").unlink()
    assert first_break(run) == "models/student/config.json: missing"


def test_sources_outside_the_run_are_noted_and_break_nothing(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    teacher = Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))
    store, _ = run_of(tmp_path, teacher, student_dir, "rounds=1", "warmup=null")
    flip(teacher / "model.safetensors", -1)
    report = verify(store)
    assert report.holds
    assert any("models: its files outside the run are not those" in note for note in report.notes)
    shutil.rmtree(teacher)
    report = verify(store)
    assert report.holds
    assert any("models: sources outside the run cannot be compared" in note for note in report.notes)


def test_an_unfinished_run_verifies_what_is_there_and_says_what_is_not(run: Finished) -> None:
    for stage in ("evaluate", "export", "train"):
        shutil.rmtree(run.store.path(StageKey(stage, 1)))
    run.store.path(StageKey("pack", 1), "manifest.json").unlink()
    report = verify(run.store)
    assert report.holds
    assert report.unfinished == [
        "round 1 · pack (unfinished)",
        "round 1 · train (not run)",
        "round 1 · export (not run)",
        "round 1 · evaluate (not run)",
    ]
    run.store.path(StageKey("score", 0), "manifest.json").unlink()
    assert "inputs: it reads `round 0 · score`, which has no valid manifest" in first_break(run)


def test_earlier_results_are_hashed_too(run: Finished) -> None:
    key = StageKey("evaluate", 1)
    kept = Path(
        shutil.copytree(run.store.path(key), run.store.folder / "superseded" / key.folder / "20260101-abcdef01")
    )
    report = verify(run.store)
    assert report.holds
    assert any("an earlier result of `round 1 · evaluate`" in note for note in report.notes)
    flip(kept / "metrics.parquet", 40)
    assert first_break(run).startswith(f"{run.store.relative(kept)}/metrics.parquet: its bytes are not those")


@pytest.mark.parametrize("first", ["read", "hash"])
def test_an_earlier_result_that_is_deleted_meanwhile_breaks_nothing(
    run: Finished, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    key = StageKey("evaluate", 1)
    shutil.copytree(run.store.path(key), run.store.folder / "superseded" / key.folder / "20260101-abcdef01")
    look = getattr(StoredFiles, first)

    def meanwhile(files: StoredFiles, name: str) -> Any:
        if name.startswith("superseded/"):
            run.store.drop_superseded()
        return look(files, name)

    monkeypatch.setattr(StoredFiles, first, meanwhile)
    report = verify(run.store)
    assert report.breaks == []
    (note,) = (note for note in report.notes if note.startswith("superseded/"))
    assert note.endswith("an earlier result that was deleted (`npd gc`) as it was looked at")


def test_no_run_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError):
        verify(RunStore(tmp_path))
