"""Whole runs on tiny models, every stage real: what the tables promise across stages."""

import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from flows.states import upstream
from schemas.config import RunConfig, load_config
from schemas.errors import StageError
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from schemas.tables import FILTER, GENERATE, IGNORE_LABEL, PROMPTS, TRAIN_METRICS, pack_schema, score_schema
from tasks.graph import STAGES, loop
from tasks.stage import current_manifest, execute

pytestmark = pytest.mark.xdist_group("loop")

ROOT = Path(__file__).parents[1]


def smoke_config(root: Path, teacher: Path, student: Path, *overrides: str) -> RunConfig:
    places = [f"root={root}", f"teacher.model={teacher}", f"student.model={student}"]
    return load_config(ROOT / "configs" / "smoke.yaml", [*places, *overrides])


def run_loop(config: RunConfig) -> tuple[RunStore, list[StageKey]]:
    """Run what is not current; return the store and the stages that ran."""
    store = RunStore.create(config)
    ran = []
    for key in loop(config):
        if current_manifest(store, config, key) is None:
            execute(store, config, key)
            ran.append(key)
    return store, ran


def tables(store: RunStore) -> dict[str, bytes]:
    return {store.relative(path): path.read_bytes() for path in sorted(store.folder.rglob("*.parquet"))}


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, student_dir: Path
) -> tuple[RunStore, RunConfig]:
    config = smoke_config(tmp_path_factory.mktemp("finished"), teacher_dir, student_dir)
    return run_loop(config)[0], config


def test_same_seed_same_bytes_in_every_table(
    tmp_path: Path, finished: tuple[RunStore, RunConfig], teacher_dir: Path, student_dir: Path
) -> None:
    first = tables(finished[0])
    # Another run, of another name, with its prompts and models in another place.
    teacher, student = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in (teacher_dir, student_dir))
    prompts = shutil.copyfile(ROOT / "configs" / "prompts" / "everyday.jsonl", tmp_path / "everyday.jsonl")
    again, _ = run_loop(smoke_config(tmp_path, teacher, student, "name=another", f"prompts.sources.0.path={prompts}"))
    assert tables(again) == first
    # Every stage with a table is among them: prompts, reference, warm-up and both rounds.
    assert len(first) >= 2 + 3 + 2 * 6


def test_another_seed_gives_other_samples(
    tmp_path: Path, finished: tuple[RunStore, RunConfig], teacher_dir: Path, student_dir: Path
) -> None:
    other, _ = run_loop(smoke_config(tmp_path, teacher_dir, student_dir, "seed=2", "rounds=1"))
    for key in (StageKey("reference"), StageKey("generate", 0)):
        ours = finished[0].read_table(key, GENERATE, ["prompt_id", "response_ids"])
        theirs = other.read_table(key, GENERATE, ["prompt_id", "response_ids"])
        assert not ours.equals(theirs)


def test_a_finished_run_runs_nothing_again(finished: tuple[RunStore, RunConfig]) -> None:
    store, config = finished
    before = tables(store)
    assert run_loop(config)[1] == []
    assert tables(store) == before


def test_a_new_bound_filters_again_and_nothing_before(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    run_loop(smoke_config(tmp_path, teacher_dir, student_dir, "rounds=1"))
    changed = smoke_config(tmp_path, teacher_dir, student_dir, "rounds=1", "filter.max_delta_ifd={quantile: 0.5}")
    _, ran = run_loop(changed)
    assert ran == [StageKey(stage, 0) for stage in ("filter", "pack", "train", "export", "evaluate")]


def test_how_the_student_samples_does_not_touch_the_teachers_references(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    run_loop(smoke_config(tmp_path, teacher_dir, student_dir, "rounds=1"))
    _, ran = run_loop(smoke_config(tmp_path, teacher_dir, student_dir, "rounds=1", "generate.temperature=0.5"))
    assert ran[0] == StageKey("generate", 0)


def test_a_setting_that_says_only_where_runs_nothing_again(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    run_loop(smoke_config(tmp_path, teacher_dir, student_dir, "rounds=1"))
    moved = smoke_config(tmp_path, teacher_dir, student_dir, "rounds=1", "devices.teacher=cpu", "train.report_to=[]")
    assert run_loop(moved)[1] == []


@pytest.mark.parametrize("stage", ["generate", "score"])
def test_an_interrupted_stage_continues_from_its_finished_shards(
    tmp_path: Path, finished: tuple[RunStore, RunConfig], teacher_dir: Path, student_dir: Path, stage: str
) -> None:
    config = smoke_config(tmp_path, teacher_dir, student_dir)
    store, key = RunStore.create(config), StageKey(stage, 0)
    for earlier in loop(config)[: loop(config).index(key)]:
        execute(store, config, earlier)

    def stop_after_the_second_shard(done: int, total: int, unit: str) -> None:
        if store.part(key, 1).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(store, config, key, stop_after_the_second_shard)
    kept = {path.name: path.stat().st_mtime_ns for path in store.path(key).glob("part-*.parquet")}
    assert sorted(kept) == ["part-00000.parquet", "part-00001.parquet"]
    execute(store, config, key)
    for name, written in kept.items():
        assert store.path(key, name).stat().st_mtime_ns == written
    for path in finished[0].path(key).glob("part-*.parquet"):
        assert store.path(key, path.name).read_bytes() == path.read_bytes()


def test_one_damaged_byte_runs_its_stage_again(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    config = smoke_config(tmp_path, teacher_dir, student_dir, "rounds=1")
    store, _ = run_loop(config)
    before = tables(store)
    path = store.part(StageKey("score", 0), 1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert run_loop(config)[1] == [StageKey("score", 0)]
    assert tables(store) == before


def test_held_out_prompts_never_reach_training(finished: tuple[RunStore, RunConfig]) -> None:
    store, config = finished
    prompts = store.read_table(StageKey("prompts"), PROMPTS)
    held_out = prompts.filter(pc.equal(prompts["split"], "held_out"))["prompt_id"].to_pylist()
    assert len(held_out) == config.prompts.held_out
    rollouts = pa.concat_tables(
        [store.read_table(StageKey("reference"), GENERATE)]
        + [store.read_table(StageKey("generate", index), GENERATE) for index in range(config.rounds)]
    )
    prompt_of = dict(zip(rollouts["sample_id"].to_pylist(), rollouts["prompt_id"].to_pylist(), strict=True))
    for index in (WARMUP, *range(config.rounds)):
        schema = pack_schema(None if index == WARMUP else config.score.top_k)
        packed = store.read_table(StageKey("pack", index), schema, ["sample_ids", "seq_lengths"])
        trained = {prompt_of[sample] for row in packed["sample_ids"].to_pylist() for sample in row}
        assert trained
        assert not trained & set(held_out)


def test_packed_targets_are_the_scored_ones_of_their_sample(finished: tuple[RunStore, RunConfig]) -> None:
    """From a packed token back to its sample's rollout and score, over the real stages."""
    store, config = finished
    schema = score_schema(config.score.top_k, config.score.topk_dtype)
    scores = {row["sample_id"]: row for row in store.read_table(StageKey("score", 0), schema).to_pylist()}
    rollouts = {row["sample_id"]: row for row in store.read_table(StageKey("generate", 0), GENERATE).to_pylist()}
    ledger = store.read_table(StageKey("filter", 0), FILTER)
    kept = set(ledger.filter(ledger["keep"])["sample_id"].to_pylist())
    seen: set[str] = set()
    for pack in store.read_table(StageKey("pack", 0), pack_schema(config.score.top_k)).to_pylist():
        start = 0
        for sample, length in zip(pack["sample_ids"], pack["seq_lengths"], strict=True):
            rollout, score = rollouts[sample], scores[sample]
            prompt = len(rollout["prompt_ids"])
            part = slice(start, start + length)
            assert pack["input_ids"][part] == rollout["prompt_ids"] + rollout["response_ids"]
            assert pack["labels"][part] == [IGNORE_LABEL] * prompt + rollout["response_ids"]
            assert pack["teacher_topk_ids"][part][prompt:] == score["teacher_topk_ids"]
            assert pack["teacher_topk_logprobs"][part][prompt:] == score["teacher_topk_logprobs"]
            assert pack["sampled_logprobs"][part][prompt:] == rollout["sampled_logprobs"]
            seen.add(sample)
            start += length
    assert seen == kept


def test_the_scored_student_is_the_one_that_sampled(finished: tuple[RunStore, RunConfig]) -> None:
    """The sampler's own log-probabilities, summed up, are the student's conditional NLL of the score table."""
    store, config = finished
    schema = score_schema(config.score.top_k, config.score.topk_dtype)
    for index in range(config.rounds):
        scores = store.read_table(StageKey("score", index), schema, ["sample_id", "student_nll"])
        nll = dict(zip(scores["sample_id"].to_pylist(), scores["student_nll"].to_pylist(), strict=True))
        rollouts = store.read_table(StageKey("generate", index), GENERATE)
        versions = set(rollouts["policy_version"].to_pylist())
        assert len(versions) == 1
        for row in rollouts.to_pylist():
            assert -np.mean(row["sampled_logprobs"]) == pytest.approx(nll[row["sample_id"]], abs=1e-4)
    steps = [store.read_table(StageKey("generate", r), GENERATE)["policy_step"][0].as_py() for r in range(2)]
    assert steps[0] == 0 < steps[1] == store.finished(StageKey("train", 0)).counters["policy_step"]


def test_overlap_samples_from_the_student_before_the_round_that_trains(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    config = smoke_config(tmp_path, teacher_dir, student_dir, "rounds=3", "overlap=true")
    store, _ = run_loop(config)
    trained = [store.finished(StageKey("train", index)).counters["policy_step"] for index in range(3)]
    sampled = [store.read_table(StageKey("generate", index), GENERATE)["policy_step"][0].as_py() for index in range(3)]
    assert sampled == [0, 0, trained[0]]
    versions = [
        store.read_table(StageKey("generate", index), GENERATE)["policy_version"][0].as_py() for index in range(3)
    ]
    assert versions[0] == versions[1] != versions[2]
    # Nothing that sampling reads comes from the training it runs beside.
    for index in (1, 2):
        for stage in ("generate", "score"):
            assert StageKey("train", index - 1) not in upstream(config, StageKey(stage, index))
    lags = [set(store.read_table(StageKey("filter", index), FILTER)["policy_lag"].to_pylist()) for index in range(3)]
    assert lags == [{0}, {trained[0]}, {trained[1] - trained[0]}]
    counted = [store.finished(StageKey("filter", index)).counters["policy_lag"] for index in range(3)]
    assert counted == [max(of_round) for of_round in lags]
    for index in range(3):
        steps = store.read_table(StageKey("train", index), TRAIN_METRICS)
        expected = [step - 1 - sampled[index] for step in steps["step"].to_pylist()]
        assert steps["policy_lag"].to_pylist() == expected


def test_rounds_between_refreshes_train_on_the_packs_that_are_there(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    """Two rounds on one round's packs are one round of twice the epochs, exported half-way."""
    config = smoke_config(tmp_path / "a", teacher_dir, student_dir, "refresh_every=2")
    sparse, _ = run_loop(config)
    assert [key.stage for key in loop(config) if key.round == 1] == ["train", "export", "evaluate"]
    one, _ = run_loop(smoke_config(tmp_path / "b", teacher_dir, student_dir, "rounds=1", "train.epochs_per_round=4"))
    weights = [
        store.path(StageKey("export", index), "model", "model.safetensors").read_bytes()
        for store, index in ((sparse, 1), (one, 0), (sparse, 0))
    ]
    assert weights[0] == weights[1] != weights[2]


def test_manifests_follow_inputs_to_outputs(finished: tuple[RunStore, RunConfig]) -> None:
    store, config = finished
    for key in loop(config):
        manifest = store.finished(key)
        assert store.first_damage(manifest) is None
        assert manifest.outputs
        known = [r for needed in STAGES[key.stage].inputs(config, key) for r in store.finished(needed).outputs]
        assert manifest.inputs == known
        assert manifest.counters["seconds"] >= 0
        assert manifest.counters["peak_memory_bytes"] > 2**20


def test_no_file_holds_the_time_but_manifests_and_run_json(finished: tuple[RunStore, RunConfig]) -> None:
    store, _ = finished
    year = store.finished(StageKey("prompts")).started[:7].encode()
    holders = {
        path.name
        for path in store.folder.rglob("*")
        if path.is_file() and path.suffix in {".json", ".parquet", ".md"} and year in path.read_bytes()
    }
    assert holders <= {"manifest.json", "run.json"}


def test_everything_filtered_out_names_the_bound_and_leaves_nothing(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    config = smoke_config(
        tmp_path, teacher_dir, student_dir, "rounds=1", "filter.min_delta_ifd=50", "filter.max_delta_ifd=60"
    )
    with pytest.raises(StageError, match=r"filter.min_delta_ifd"):
        run_loop(config)
    store = RunStore.open(tmp_path / "smoke")
    assert store.manifest(StageKey("score", 0)) is not None
    assert store.manifest(StageKey("filter", 0)) is None
    assert not list(store.path(StageKey("filter", 0)).glob("*.parquet"))
    # The finished work stands: with a bound that keeps something, only filter and what follows runs.
    _, ran = run_loop(smoke_config(tmp_path, teacher_dir, student_dir, "rounds=1"))
    assert ran[0] == StageKey("filter", 0)


def test_readme_queries_run(
    finished: tuple[RunStore, RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Reading the artifacts")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(finished[0].folder.parent)
    for block in blocks:
        exec(compile(block.replace("runs/quickstart", "smoke"), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "kept" in printed
    assert "policy_kl" in printed
