from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from schemas.config import GenerateConfig, RunConfig
from schemas.errors import PromptError
from schemas.manifest import Manifest
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import GENERATE
from tasks import generate
from tasks.language_model.chat import encode_prompts
from tasks.language_model.loading import load_tokenizer
from tasks.language_model.sources import ModelRef, policy_model
from tasks.rollout.engine import Finished, Requests, Responses, SamplingSettings
from tasks.stage import StageJob, execute
from tests.tasks.rollout_runs import TRAIN, make_run

KEY = StageKey("generate", 0)


def run_stage(
    root: Path, teacher_dir: Path, student_dir: Path, **sections: Any
) -> tuple[RunStore, RunConfig, Manifest]:
    store, config = make_run(root, teacher_dir, student_dir, **sections)
    return store, config, execute(store, config, KEY)


def part_bytes(store: RunStore) -> list[bytes]:
    return [path.read_bytes() for path in store.table_files(KEY)]


def test_every_train_prompt_is_answered_in_order(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config, manifest = run_stage(tmp_path, teacher_dir, student_dir, generate={"samples_per_prompt": 2})
    table = store.read_table(KEY, GENERATE)
    assert [path.name for path in store.table_files(KEY)] == [f"part-0000{index}.parquet" for index in range(3)]
    assert table.column("prompt_id").to_pylist() == [f"p{index:02d}" for index in range(TRAIN) for _ in range(2)]
    assert table.column("sample_id").to_pylist()[:3] == ["r000-p00-000", "r000-p00-001", "r000-p01-000"]
    assert table.column("sample_index").to_pylist() == [0, 1] * TRAIN
    assert set(table.column("round").to_pylist()) == {0}
    policy = policy_model(store, config, 0)
    assert set(table.column("policy_version").to_pylist()) == {policy.version}
    assert len(set(table.column("seed").to_pylist())) == 2 * TRAIN
    tokenizer = load_tokenizer(policy.path)
    for row in table.to_pylist():
        content = "Say " + "ha" * int(row["prompt_id"][1:])
        assert row["prompt_ids"] == encode_prompts(tokenizer, [[{"role": "user", "content": content}]])[0].tolist()
        assert row["response"] == tokenizer.decode(row["response_ids"], skip_special_tokens=True)
        assert (row["response_ids"][-1] == tokenizer.eos_token_id) == (row["finish_reason"] == "stop")
        assert max(row["sampled_logprobs"]) < 0
    tokens = sum(len(ids) for ids in table.column("response_ids").to_pylist())
    counters = manifest.counters
    assert (counters["prompts"], counters["samples"], counters["tokens"]) == (TRAIN, 2 * TRAIN, tokens)
    assert counters["stop"] == table.column("finish_reason").to_pylist().count("stop")
    assert counters["stop"] + counters["length"] == 2 * TRAIN
    assert counters["engine"] == "transformers"
    assert counters["tokens_per_second"] > 0
    assert counters["decoding"] == "slots"
    assert counters["slot_use"] == 1.0


def test_the_teacher_need_not_be_on_the_machine_that_samples(tmp_path: Path, student_dir: Path) -> None:
    manifest = run_stage(tmp_path, tmp_path / "on another machine", student_dir)[2]
    assert manifest.counters["samples"] == TRAIN


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    first = part_bytes(run_stage(tmp_path / "a", teacher_dir, student_dir)[0])
    assert first == part_bytes(run_stage(tmp_path / "b", teacher_dir, student_dir)[0])
    assert first != part_bytes(run_stage(tmp_path / "c", teacher_dir, student_dir, seed=4)[0])


def test_rounds_sample_differently_from_the_same_weights(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config, _ = run_stage(tmp_path, teacher_dir, student_dir)
    first = store.read_table(KEY, GENERATE)
    export = StageKey("export", 0)
    student = Path(policy_model(store, config, 0).path)
    store.begin(export, "export")
    with store.writing_folder(store.path(export, "model")) as folder:
        for file in student.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    manifest = store.finished(KEY).model_copy(
        update={"stage": "export", "outputs": store.outputs(export), "counters": {"policy_step": 17}}
    )
    store.finish(export, manifest)
    execute(store, config, StageKey("generate", 1))
    second = store.read_table(StageKey("generate", 1), GENERATE)
    assert second.column("sample_id")[0].as_py() == "r001-p00-000"
    assert set(second.column("policy_step").to_pylist()) == {17}
    assert second.column("policy_version")[0] == first.column("policy_version")[0]
    assert second.column("response_ids") != first.column("response_ids")


def test_an_interrupted_stage_continues_from_its_finished_shards(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    whole = part_bytes(run_stage(tmp_path / "whole", teacher_dir, student_dir)[0])
    store, config = make_run(tmp_path / "killed", teacher_dir, student_dir)

    def die_in_the_third_shard(done: int, total: int, unit: str) -> None:
        if done == TRAIN:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        execute(store, config, KEY, die_in_the_third_shard)
    assert store.manifest(KEY) is None
    left = sorted(path.name for path in store.path(KEY).glob("part-*"))
    assert left == ["part-00000.parquet", "part-00001.parquet"]
    store.part(KEY, 0).unlink()
    kept_since = store.part(KEY, 1).stat().st_mtime_ns
    manifest = execute(store, config, KEY)
    assert part_bytes(store) == whole
    assert store.part(KEY, 1).stat().st_mtime_ns == kept_since
    assert (manifest.counters["shards"], manifest.counters["shards_kept"]) == (3, 1)
    assert manifest.counters["samples"] == TRAIN


def test_shards_may_be_done_in_any_order(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.rollout.transformers_engine import TransformersEngine

    class LastFirst(TransformersEngine):
        def generate(
            self, requests: Iterable[Requests], settings: SamplingSettings, finished: Finished
        ) -> Iterator[tuple[int, Responses]]:
            yield from reversed(list(super().generate(requests, settings, finished)))

    def open_last_first(model: ModelRef, config: GenerateConfig, longest: int, earlier: ModelRef | None) -> LastFirst:
        return LastFirst(model, config.batch_size, longest)

    in_order = part_bytes(run_stage(tmp_path / "in_order", teacher_dir, student_dir)[0])
    monkeypatch.setattr(generate, "open_engine", open_last_first)
    store, config = make_run(tmp_path / "last_first", teacher_dir, student_dir)
    seen: list[int] = []
    execute(store, config, KEY, lambda done, total, unit: seen.append(done))
    assert part_bytes(store) == in_order
    assert seen[-1] == TRAIN


def test_no_model_is_loaded_when_every_shard_is_there(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = make_run(tmp_path, teacher_dir, student_dir)
    store.begin(KEY, "fingerprint")
    first, second = StageJob(store, config, KEY), StageJob(store, config, KEY)
    generate.run(first)

    def refuse(*arguments: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(generate, "open_engine", refuse)
    generate.run(second)
    assert second.counters["shards_kept"] == 3
    for counter in ("samples", "tokens", "stop", "length"):
        assert second.counters[counter] == first.counters[counter]
    store.part(KEY, 0).unlink()
    with pytest.raises(AssertionError, match="was loaded"):
        generate.run(StageJob(store, config, KEY))


def test_progress_moves_during_a_shard_and_ends_at_all_samples(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    store, config = make_run(tmp_path, teacher_dir, student_dir, generate={"shard_prompts": 100, "batch_size": 2})
    seen: list[tuple[int, int, str]] = []
    execute(store, config, KEY, lambda done, total, unit: seen.append((done, total, unit)))
    assert seen[-1] == (TRAIN, TRAIN, "samples")
    assert len({done for done, _, _ in seen}) >= TRAIN // 2
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_prompts_beyond_the_context_stop_the_stage_or_are_left_out(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    store, config = make_run(tmp_path / "error", teacher_dir, student_dir, context=30)
    lengths = {row["prompt_id"]: len(row["prompt_ids"]) for row in whole_table(tmp_path, teacher_dir, student_dir)}
    fitting = [prompt_id for prompt_id, length in lengths.items() if length < 30]
    first_row = len(fitting) + 1
    assert 1 < len(fitting) < TRAIN
    with pytest.raises(PromptError, match=rf"prompts\.jsonl: row {first_row}: .*context of 30 tokens.*too_long: drop"):
        execute(store, config, KEY)
    assert store.manifest(KEY) is None
    store, config = make_run(
        tmp_path / "drop",
        teacher_dir,
        student_dir,
        context=30,
        prompts={"too_long": "drop"},
    )
    manifest = execute(store, config, KEY)
    table = store.read_table(KEY, GENERATE)
    assert table.column("prompt_id").to_pylist() == fitting
    assert manifest.counters["dropped_prompts"] == TRAIN - len(fitting)
    whole = [len(p) + len(r) for p, r in zip(table["prompt_ids"].to_pylist(), table["response_ids"].to_pylist())]
    assert max(whole) <= 30


def whole_table(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (
        run_stage(tmp_path / "whole", teacher_dir, student_dir)[0].read_table(KEY, GENERATE).to_pylist()
    )
    return rows


def test_nothing_that_fits_is_an_error(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, config = make_run(tmp_path, teacher_dir, student_dir, context=5, prompts={"too_long": "drop"})
    with pytest.raises(PromptError, match="none of the 7 prompts"):
        generate.run(StageJob(store, config, KEY))


def test_settings_reach_the_sampler(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    greedy = {"temperature": 0.0, "samples_per_prompt": 2, "max_new_tokens": 5}
    store, _, _ = run_stage(tmp_path, teacher_dir, student_dir, generate=greedy)
    responses = store.read_table(KEY, GENERATE).column("response_ids").to_pylist()
    assert all(len(response) <= 5 for response in responses)
    assert responses[0::2] == responses[1::2]


def test_importing_the_stages_loads_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, tasks.generate, tasks.reference\n"
        "print([name for name in ('torch', 'transformers', 'vllm') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_the_table_has_the_columns_of_its_schema(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    store, _, _ = run_stage(tmp_path, teacher_dir, student_dir)
    table: pa.Table = store.read_table(KEY, GENERATE)
    assert table.schema == GENERATE.columns
    assert np.isfinite(np.concatenate(table.column("sampled_logprobs").to_pylist())).all()
