import shutil
from pathlib import Path

import pytest

from flows.configs import read_config, recorded_config
from flows.states import StageState, outdated_after, stage_key, stage_states, upstream, upstream_problem
from schemas.config import RunConfig
from schemas.errors import ArtifactError, ConfigError
from schemas.manifest import record_bytes
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from tasks.graph import PROMPTS
from tasks.stage import execute
from tests.flows.conftest import FinishedRun
from tests.run_fixtures import make_config


@pytest.fixture
def store(finished_run: FinishedRun, tmp_path: Path) -> RunStore:
    """A copy of a finished run that a test may change; it lies elsewhere than it was made."""
    return RunStore(shutil.copytree(finished_run.folder, tmp_path / "copy"))


def labels_in(store: RunStore, state: StageState, *overrides: str) -> list[str]:
    config = recorded_config(store, list(overrides))
    return [key.label for key, found in stage_states(store, config).items() if found is state]


def test_every_stage_of_a_finished_run_is_complete(store: RunStore) -> None:
    states = stage_states(store, store.config)
    assert len(states) == 4 + 1 + 2 * 7
    assert set(states.values()) == {StageState.COMPLETE}


def test_a_new_bound_outdates_the_filter_and_what_follows_and_nothing_before(store: RunStore) -> None:
    outdated = labels_in(store, StageState.OUTDATED, "filter.max_delta_ifd=0.3")
    assert outdated[0] == "round 0 · filter"
    assert "round 0 · generate" not in outdated
    assert "round 0 · score" not in outdated
    # The next round's samples come from a policy trained on other packs.
    assert "round 1 · generate" in outdated


def test_a_damaged_file_outdates_its_stage_and_its_readers(store: RunStore) -> None:
    store.part(StageKey("score", 1), 0).unlink()
    outdated = labels_in(store, StageState.OUTDATED)
    expected = [f"round 1 · {stage}" for stage in ("score", "filter", "pack", "train", "export", "evaluate")]
    assert outdated == expected


def test_a_stage_without_manifest_is_unfinished_and_without_folder_not_run(store: RunStore) -> None:
    (store.path(StageKey("train", 1)) / "manifest.json").unlink()
    store.supersede(StageKey("evaluate", 1))
    assert labels_in(store, StageState.UNFINISHED) == ["round 1 · train"]
    assert labels_in(store, StageState.MISSING) == ["round 1 · evaluate"]
    assert labels_in(store, StageState.OUTDATED) == ["round 1 · export"]


def test_running_a_stage_again_unchanged_outdates_nothing(store: RunStore) -> None:
    key = StageKey("filter", 0)
    store.supersede(key)
    execute(store, store.config, key)
    assert outdated_after(store, store.config, key) == []


def test_running_a_stage_again_with_another_setting_outdates_its_readers(store: RunStore) -> None:
    key = StageKey("filter", 1)
    config = recorded_config(store, ["filter.max_delta_ifd.quantile=0.5"])
    store.supersede(key)
    execute(store, config, key)
    assert [other.label for other in outdated_after(store, config, key)] == [
        f"round 1 · {stage}" for stage in ("pack", "train", "export", "evaluate")
    ]


def test_a_stage_waits_for_what_it_reads(store: RunStore) -> None:
    key = StageKey("pack", 1)
    assert upstream_problem(store, store.config, key) is None
    store.supersede(StageKey("score", 1))
    problem = upstream_problem(store, store.config, key)
    assert problem is not None
    assert "`round 1 · score`, which is not run" in problem


def test_what_reaches_a_stage_does_not_include_what_follows_it(store: RunStore) -> None:
    before = upstream(store.config, StageKey("filter", 0))
    assert [key.label for key in before] == ["prompts", "models", "round 0 · generate", "round 0 · score"]


@pytest.mark.parametrize(
    ("stage", "index", "message"),
    [
        ("scoring", 0, "no such stage; there are prompts, models"),
        ("score", None, "no round given; this run has 0, 1"),
        ("score", 2, "no round 2; this run has 0, 1"),
        ("evaluate", 5, r"this run has -1 \(warm-up\), 0, 1"),
        ("models", 0, "leave the round out"),
    ],
)
def test_a_stage_that_the_run_does_not_have_is_refused(
    tmp_path: Path, stage: str, index: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_key(make_config(tmp_path), stage, index)


def test_named_stages_are_found(tmp_path: Path) -> None:
    config = make_config(tmp_path, warmup={})
    assert stage_key(config, "prompts", None) == PROMPTS
    assert stage_key(config, "train", -1) == StageKey("train", WARMUP)


def test_a_moved_run_keeps_its_place_and_its_config(store: RunStore) -> None:
    config = recorded_config(store, ["train.kd_weight=0.5"])
    assert isinstance(config, RunConfig)
    assert RunStore(Path(config.root) / config.name).folder == store.folder
    assert config.train.kd_weight == 0.5
    assert read_config(str(store.folder)).train == store.config.train
    with pytest.raises(ConfigError, match="keeps its name"):
        recorded_config(store, ["name=other"])


def test_a_setting_that_is_no_longer_allowed_can_be_set_right(store: RunStore) -> None:
    record = store.record()
    assert record is not None
    values = record.config | {"overlap": True}
    values["train"]["guard"] |= {"action": "refresh"}
    store.write_bytes(store.folder / "run.json", record_bytes(record.model_copy(update={"config": values})))
    with pytest.raises(ConfigError, match="overlap"):
        recorded_config(store)
    changed = recorded_config(store, ["overlap=false"])
    assert isinstance(changed, RunConfig)
    assert not changed.overlap


def test_a_record_of_an_earlier_version_is_brought_up_to_date(store: RunStore) -> None:
    record, config = store.record(), store.config
    assert record is not None
    store.write_bytes(store.folder / "run.json", record_bytes(record.model_copy(update={"config_hash": "0" * 64})))
    store.record_config(config)
    again = store.record()
    assert again is not None
    assert (again.config_hash, again.run_id) == (record.config_hash, record.run_id)


def test_a_folder_without_a_run_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no run here"):
        read_config(str(tmp_path))
