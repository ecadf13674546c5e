import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas import manifest as manifest_module
from schemas.errors import ArtifactError, ConfigError, RunNotFoundError
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import EVALUATE_METRICS, FILTER, GENERATE, PROMPTS
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table, rollout_table

KEY = StageKey("generate", 0)


def rollouts(count: int = 3) -> pa.Table:
    return rollout_table([[1, 2]] * count, [[3, 4, 5]] * count)


def test_tables_carry_their_schema_and_the_runs_id(tmp_path: Path) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    finish_stage(store, KEY, GENERATE, [rollouts()])
    record = store.record()
    assert record is not None
    metadata = pq.read_schema(store.part(KEY, 0)).metadata
    assert metadata[b"npd.schema"] == b"generate"
    assert metadata[b"npd.schema_version"] == b"1"
    assert metadata[b"npd.run_id"] == record.run_id.encode()
    assert store.read_table(KEY, GENERATE).equals(rollouts())


def test_run_id_does_not_depend_on_name_or_place(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    first = make_store(tmp_path / "a", config).record()
    moved = make_config(tmp_path, prompts={"sources": [{"type": "jsonl", "path": "/elsewhere/prompts.jsonl"}]})
    second = make_store(tmp_path / "b", moved.model_copy(update={"name": "other"})).record()
    third = make_store(tmp_path / "c", config.model_copy(update={"seed": 5})).record()
    assert first is not None
    assert second is not None
    assert third is not None
    assert first.run_id == second.run_id != third.run_id


def test_changed_config_keeps_the_runs_id(tmp_path: Path) -> None:
    before = make_store(tmp_path, make_config(tmp_path)).record()
    after = make_store(tmp_path, make_config(tmp_path, score={"top_k": 3})).record()
    assert before is not None
    assert after is not None
    assert before.run_id == after.run_id
    assert before.config_hash != after.config_hash
    assert RunStore.open(tmp_path / "test").config.score.top_k == 3


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("finish_reason", pa.array(["stop", "length", "tired"]), "finish_reason"),
        ("response_ids", pa.array([[1, 2, 3], None, [1, 2, 3]], pa.list_(pa.int32())), "response_ids"),
    ],
)
def test_rows_that_break_the_contract_are_not_written(
    tmp_path: Path, column: str, values: pa.Array, message: str
) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    table = rollouts()
    table = table.set_column(table.column_names.index(column), column, values)
    with pytest.raises(ArtifactError, match=rf"round=000/stage=generate/part-00000.parquet.*{message}"):
        store.write_table(store.part(KEY, 0), table, GENERATE)
    assert not list(store.folder.rglob("*.parquet"))
    assert not list(store.folder.rglob(".tmp-*"))


def test_missing_column_and_wrong_type_are_named() -> None:
    with pytest.raises(ArtifactError, match="lacks column"):
        GENERATE.validate(rollouts().drop(["seed"]), "here")
    wrong = rollouts().set_column(7, "response_ids", pa.array([[1.0]] * 3, pa.list_(pa.float64())))
    with pytest.raises(ArtifactError, match=r"here.*response_ids.*list<.*double>.*int32"):
        GENERATE.validate(wrong, "here")


def test_reading_checks_what_it_reads(tmp_path: Path) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    finish_stage(store, KEY, GENERATE, [rollouts()])
    path = store.part(KEY, 0)
    with pytest.raises(ArtifactError, match=r"holds table `generate` v1, expected `prompts`"):
        store.read_part(path, PROMPTS)
    pq.write_table(rollouts(), path)
    with pytest.raises(ArtifactError, match=r"holds table `\?`"):
        store.read_part(path, GENERATE)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(ArtifactError, match=r"part-00000.parquet: not a readable Parquet file"):
        store.read_part(path, GENERATE)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"part-00000.parquet: missing"):
        store.read_part(path, GENERATE)


def test_a_stage_is_complete_only_with_manifest_and_whole_files(tmp_path: Path) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    store.begin(KEY, "f")
    store.write_table(store.part(KEY, 0), rollouts(), GENERATE)
    with pytest.raises(ArtifactError, match="has not finished"):
        store.read_table(KEY, GENERATE)
    manifest = finish_stage(store, KEY, GENERATE, [rollouts(), rollouts(1)])
    assert store.first_damage(manifest) is None
    assert [record.rows for record in manifest.outputs] == [3, 1]
    data = bytearray(store.part(KEY, 1).read_bytes())
    told = f"{KEY.folder}/part-00001.parquet: its bytes are not those the manifest recorded"
    store.part(KEY, 1).write_bytes(data[:-1])
    assert store.first_damage(manifest) == store.first_damage(manifest, content=False) == told
    data[40] ^= 1
    store.part(KEY, 1).write_bytes(data)
    assert store.first_damage(manifest) == told
    assert store.first_damage(manifest, content=False) is None


def test_a_stages_files_are_hashed_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    manifest = finish_stage(store, KEY, GENERATE, [rollouts(count) for count in (1, 2, 3)])
    two, plain = threading.Barrier(2, timeout=30), manifest_module.hash_file

    def hashed(path: Path) -> str:
        if path.name < "part-00002.parquet":
            two.wait()
        return plain(path)

    monkeypatch.setattr(manifest_module, "hash_file", hashed)
    monkeypatch.setattr(manifest_module, "_HASHED_AT_ONCE", 2)
    assert store.outputs(KEY) == manifest.outputs
    assert store.first_damage(manifest) is None


def test_begin_keeps_shards_of_the_same_fingerprint_only(tmp_path: Path) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    store.begin(KEY, "one")
    store.write_table(store.part(KEY, 0), rollouts(), GENERATE)
    (store.path(KEY) / ".tmp-left").write_bytes(b"half")
    store.begin(KEY, "one")
    assert store.part(KEY, 0).is_file()
    assert not list(store.path(KEY).glob(".tmp-*"))
    store.begin(KEY, "two")
    assert not store.part(KEY, 0).exists()


def test_damaged_manifest_names_the_file(tmp_path: Path) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    finish_stage(store, KEY, GENERATE, [rollouts()])
    path = store.path(KEY, "manifest.json")
    for text in ("", "{", '{"stage": 3}', "\x00\xff"):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=r"manifest.json"):
            store.manifest(KEY)


def test_opening_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match="no run here") as error:
        RunStore.open(tmp_path)
    assert error.value.exit_code == 2
    with pytest.raises(ConfigError, match="credentials") as refused:
        RunStore("s3://key:hidden@bucket/run")
    assert "hidden" not in str(refused.value)
    with pytest.raises(ConfigError, match="nosuchscheme"):
        RunStore("nosuchscheme://bucket/run")


def test_empty_tables_keep_their_columns(tmp_path: Path) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    finish_stage(store, StageKey("filter", 0), FILTER, [])
    assert store.read_table(StageKey("filter", 0), FILTER, ["keep"]).schema.names == ["keep"]


def test_keys_name_folders_and_people() -> None:
    assert StageKey("train", WARMUP).folder == "warmup/stage=train"
    assert StageKey("export", 12).folder == "round=012/stage=export"
    assert StageKey("score", 1).label == "round 1 · score"
    assert StageKey("pack", WARMUP).label == "warm-up · pack"


def test_stages_lists_what_is_on_disk(tmp_path: Path) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    finish_stage(store, StageKey("prompts"), PROMPTS, [prompts_table({"a": "train"})])
    finish_stage(store, StageKey("evaluate", WARMUP), EVALUATE_METRICS, [])
    finish_stage(store, KEY, GENERATE, [rollouts()])
    assert set(store.stages()) == {StageKey("prompts"), StageKey("evaluate", WARMUP), KEY}


def test_metadata_can_be_read_with_nulls_in_nullable_columns(tmp_path: Path) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    table = pa.table(
        {
            "sample_id": ["a", "b"],
            "delta_ifd": [None, 0.5],
            "zone": [None, "learnable"],
            "keep": [False, True],
            "reason": ["not_scorable", "kept"],
            "min_delta_ifd": [0.0, 0.0],
            "max_delta_ifd": [0.8, 0.8],
            "policy_lag": [0, 0],
        },
        schema=FILTER.columns,
    )
    finish_stage(store, StageKey("filter", 0), FILTER, [table])
    assert store.read_table(StageKey("filter", 0), FILTER).equals(table)


def test_a_result_of_other_settings_is_kept_until_it_is_dropped(tmp_path: Path) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    finish_stage(store, KEY, GENERATE, [rollouts()])
    before = store.part(KEY, 0).read_bytes()
    store.begin(KEY, "other settings")
    assert store.manifest(KEY) is None
    assert [path.name for path in store.path(KEY).iterdir()] == [".partial.json"]
    kept = [name for name, _ in store.superseded()]
    assert [Path(name).name for name in kept] == ["manifest.json", "part-00000.parquet"]
    assert all(name.startswith(f"superseded/{KEY.folder}/") for name in kept)
    assert (store.folder / kept[1]).read_bytes() == before
    assert KEY not in [key for key in store.stages() if store.manifest(key) is not None]

    finish_stage(store, KEY, GENERATE, [rollouts()])
    store.supersede(KEY)
    assert len(store.superseded()) == 4
    # Put aside once more, as after a crash that came in between.
    shutil.copytree((store.folder / store.superseded()[-1][0]).parent, store.path(KEY))
    store.supersede(KEY)
    assert len(store.superseded()) == 4
    # What a process that died was writing goes with it.
    finish_stage(store, KEY, GENERATE, [rollouts()])
    left = [store.folder / ".tmp-1", store.path(KEY) / ".tmp-2" / "model.safetensors"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    assert {store.relative(path) for path in left} < {name for name, _ in store.superseded()}
    store.drop_superseded()
    assert store.superseded() == []
    assert not (store.folder / "superseded").exists()
    assert store.first_damage(store.finished(KEY)) is None


def test_records_of_another_version_are_refused_with_the_way_forward(tmp_path: Path) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    finish_stage(store, KEY, GENERATE, [rollouts()])
    for path, read in (
        (store.path(KEY, "manifest.json"), lambda: store.manifest(KEY)),
        (store.folder / "run.json", store.record),
    ):
        path.write_text(path.read_text().replace('"schema_version": 2', '"schema_version": 1'))
        with pytest.raises(ArtifactError, match=rf"{path.name}: schema_version: .*\(v1, this one reads v2\)\. Delete"):
            read()


def test_every_flipped_bit_of_a_record_is_found(tmp_path: Path) -> None:
    store = make_store(tmp_path, make_config(tmp_path))
    finish_stage(store, KEY, GENERATE, [rollouts()])
    path = store.path(KEY, "manifest.json")
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            store.manifest(KEY)
    path.write_bytes(data)
    assert store.manifest(KEY) is not None


def test_a_hundred_thousand_shards_stay_in_order(tmp_path: Path) -> None:
    store, key = make_store(tmp_path, make_config(tmp_path)), StageKey("prompts")
    parts = [store.part(key, index) for index in (9, 99_999, 100_000)]
    finish_stage(store, key, PROMPTS, [])
    for index, path in enumerate(parts):
        store.write_table(path, prompts_table({f"p{index}": "train"}), PROMPTS)
    assert [record.path for record in store.outputs(key)] == [store.relative(path) for path in parts]
