"""`verify` of an RL run: what holds, and what it finds under manifests that fit."""

import shutil
from pathlib import Path

import pytest

from schemas.config import RLConfig
from schemas.errors import ArtifactError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.audit.verify import verify
from tasks.graph import PROMPTS
from tasks.rl.graph import BASELINE, EVALUATE, RL, RL_LOOP
from tests.tasks.flipped_bytes import PLACES, flipped_and_named
from tests.tasks.forged_tables import Change, forge, put, reseal
from tests.tasks.rl_runs import checked_prompts, rl_config, run_rl, source_store

METRICS, RESPONSES, ROLLOUTS = "metrics.parquet", "responses.parquet", "part-00000.parquet"


PROMPT_IDS = checked_prompts(named=True).column("prompt_id").to_pylist()
TRAIN_ID, HELD_OUT_ID = PROMPT_IDS[0], PROMPT_IDS[-1]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, student_dir: Path) -> RunStore:
    source = source_store(tmp_path_factory.mktemp("source"), student_dir, checked_prompts(named=True))
    # Every second step learns once more from what the one before it sampled.
    config = rl_config(tmp_path_factory.mktemp("rl"), source.folder, num_iterations=2, lr_scheduler_type="constant")
    store = RunStore.at(config)
    run_rl(store, config)
    return store


@pytest.fixture
def run(whole_run: RunStore, tmp_path: Path) -> tuple[RunStore, RLConfig]:
    """A copy to damage."""
    store = RunStore(shutil.copytree(whole_run.folder, tmp_path / "rl"))
    config = store.settings
    assert isinstance(config, RLConfig)
    return store, config


def test_a_whole_rl_run_holds_and_says_what_it_covered(whole_run: RunStore) -> None:
    report = verify(whole_run)
    assert (report.breaks, report.notes, report.unchecked, report.unfinished) == ([], [], [], [])
    records = [record for key in RL_LOOP for record in whole_run.finished(key).outputs]
    assert report.coverage.files == 1 + len(RL_LOOP) + len(records)
    assert report.coverage.rows == sum(record.rows or 0 for record in records)


@pytest.mark.parametrize(
    ("key", "file", "change", "what"),
    [
        (PROMPTS, ROLLOUTS, put("prompt_id", "x" * 16), "`messages`: are those of prompt"),
        (RL, ROLLOUTS, put("prompt_id", HELD_OUT_ID, 1), f"row 1, {HELD_OUT_ID}, `prompt_id`: is no train prompt"),
        (RL, ROLLOUTS, put("step", 9), "`step`: 9 of 4"),
        (RL, ROLLOUTS, lambda table: table.slice(1), "counters.samples"),
        (RL, ROLLOUTS, put("reward", 7.0), "`reward`: 0, its rollouts make it 0.58"),
        (RL, METRICS, put("score", 0.5), "`score`: 0.5, its rollouts make it 0"),
        (RL, METRICS, put("truncation_rate", 0.5, 1), "row 1, 2, `truncation_rate`: 0.5, its rollouts make it None"),
        (RL, METRICS, put("step", 7), "`step`: should be 1 to 4, each once"),
        (BASELINE, RESPONSES, put("prompt_id", TRAIN_ID), "`prompt_id`: is no held-out prompt"),
        (EVALUATE, RESPONSES, put("model", "start"), "`model`: should be `rl`"),
        (EVALUATE, METRICS, put("value", 0.25), "the rl's responses make it"),
    ],
)
def test_what_a_forged_table_says_is_compared_with_what_it_stands_on(
    run: tuple[RunStore, RLConfig], key: StageKey, file: str, change: Change, what: str
) -> None:
    store, _ = run
    (shard,) = [number for number, path in enumerate(store.table_files(key)) if path.name == file]
    forge(*run, key, change, shard)
    reseal(*run)
    breaks = [str(entry) for entry in verify(store).breaks]
    assert breaks
    assert any(what in entry for entry in breaks), breaks


@pytest.mark.parametrize("place", PLACES)
def test_one_flipped_byte_in_any_file_of_an_rl_run_is_found_and_the_file_named(
    run: tuple[RunStore, RLConfig], place: float
) -> None:
    store, _ = run
    content, manifests, record = flipped_and_named(store, place)
    assert content[0] == {record.path for key in RL_LOOP for record in store.finished(key).outputs}
    assert content[0] <= content[1]
    assert manifests[0] == {f"{key.folder}/manifest.json" for key in RL_LOOP}
    assert manifests[0] <= manifests[1]
    assert record == ({"run.json"}, {"run.json"})
    assert verify(store).holds


def test_what_a_stage_stands_on_is_followed(run: tuple[RunStore, RLConfig]) -> None:
    store, _ = run
    (store.path(RL) / "manifest.json").unlink()
    with pytest.raises(ArtifactError):
        store.finished(RL)
    report = verify(store)
    assert any("reads `rl`, which has no valid manifest" in str(entry) for entry in report.breaks)
    assert report.unfinished == ["rl (unfinished)"]
