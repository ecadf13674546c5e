"""The two engines on the same weights. vLLM gets a process of its own, as in a run."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from schemas.config import GenerateConfig, VllmOptions
from schemas.errors import ModelError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import EVALUATE_RESPONSES, GENERATE, RESPONSES_FILE
from tasks.graph import BASELINE, MODELS, REFERENCE
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ModelRef
from tasks.rollout.engine import Requests, Responses, SamplingSettings, open_engine
from tasks.rollout.seeds import sample_seed
from tasks.stage import execute
from tests.tasks.rollout_runs import TRAIN, make_run
from tests.tiny_models import make_model, save_model

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("vllm")]

PROMPTS = [np.arange(5, 5 + length, dtype=np.int32) for length in (3, 9, 1, 6, 40, 9)]
SEEDS = np.array([sample_seed(0, 0, f"p{index}", 0) for index in range(len(PROMPTS))])
LOGPROB_TOLERANCE = 2e-4
"""Nats, float32 on both sides; the kernels sum in other orders."""

GREEDY = SamplingSettings(0.0, 1.0, 24, 60, (2,), 259)
SAMPLED = SamplingSettings(0.7, 0.9, 24, 60, (2,), 259)


@dataclass(frozen=True)
class VllmResults:
    greedy: Responses
    sampled: Responses
    again_reversed: Responses
    together: dict[int, Responses]
    in_turn: dict[int, Responses]
    taken: list[int]
    reports: list[int]
    refused: str
    store_folder: Path
    answering: list[str]


def model_ref(folder: Path) -> ModelRef:
    return ModelRef(str(folder), "v", 0, 512, 259, device="cpu")


def sample_with_vllm(folder: Path, run_root: Path) -> VllmResults:
    from tasks.rollout import vllm_engine

    engine = vllm_engine.VllmEngine(model_ref(folder), VllmOptions(), longest_sequence=64)
    reports: list[int] = []
    taken: list[int] = []

    def shards() -> Iterator[Requests]:
        for start in (0, 2, 4):
            taken.append(start)
            yield Requests(PROMPTS[start : start + 2], SEEDS[start : start + 2])

    ((_, greedy),) = engine.generate([Requests(PROMPTS, SEEDS)], GREEDY, reports.append)
    ((_, sampled),) = engine.generate([Requests(PROMPTS, SEEDS)], SAMPLED, reports.append)
    ((_, again),) = engine.generate([Requests(PROMPTS[::-1], SEEDS[::-1])], SAMPLED, reports.append)
    together = dict(engine.generate(shards(), GREEDY, reports.append))
    taken.clear()
    vllm_engine._QUEUE = 3
    in_turn: dict[int, Responses] = {}
    taken_before: list[int] = []
    for number, rollouts in engine.generate(shards(), GREEDY, reports.append):
        in_turn[number] = rollouts
        taken_before.append(len(taken))
    engine.close()
    try:
        open_engine(replace(model_ref(folder), device="cuda"), GenerateConfig(engine="vllm"), 64)
        refused = ""
    except ModelError as error:
        refused = str(error)
    store, config = make_run(run_root, folder, folder, generate={"engine": "vllm"}, warmup=None)
    for key in (StageKey("generate", 0), REFERENCE):
        execute(store, config, key)
    load = vllm_engine.VllmEngine.__init__
    with patch.object(vllm_engine.VllmEngine, "__init__", autospec=True, side_effect=load) as loaded:
        execute(store, config, BASELINE)
    answering = [call.args[1].path for call in loaded.call_args_list]
    return VllmResults(
        greedy, sampled, again, together, in_turn, taken_before, reports, refused, store.folder, answering
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 32, which vLLM's CPU kernels take; 264 vocabulary rows for 259 tokens, the padding rows likely."""
    import torch

    model = make_model(seed=5, hidden=128, vocab_size=264, tie=False)
    with torch.no_grad():
        model.lm_head.weight[259:] *= 3
    return save_model(tmp_path_factory.mktemp("vllm"), model)


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> VllmResults:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(sample_with_vllm, folder, tmp_path_factory.mktemp("vllm-run")).result()


def test_greedy_responses_and_their_logprobs_agree_with_the_transformers_engine(
    results: VllmResults, folder: Path
) -> None:
    from tasks.rollout.transformers_engine import TransformersEngine

    engine = TransformersEngine(model_ref(folder), batch_size=4, longest_sequence=64)
    ((_, expected),) = engine.generate([Requests(PROMPTS, SEEDS)], GREEDY, lambda count: None)
    assert np.array_equal(results.greedy.offsets, expected.offsets)
    assert np.array_equal(results.greedy.response_ids, expected.response_ids)
    assert results.greedy.finish_reason.tolist() == expected.finish_reason.tolist()
    assert np.abs(results.greedy.logprobs - expected.logprobs).max() < LOGPROB_TOLERANCE


def test_sampled_logprobs_are_at_temperature_1_over_the_full_vocabulary(results: VllmResults, folder: Path) -> None:
    import torch

    from tasks.language_model.loading import load_model

    model = load_model(folder, device="cpu")
    sampled = results.sampled
    for index, prompt in enumerate(PROMPTS):
        row = sampled.row(index)
        ids = torch.tensor(np.concatenate([prompt, row]), dtype=torch.long)
        with torch.inference_mode():
            logprobs = model(ids[None], use_cache=False).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        expected = logprobs.gather(-1, ids[len(prompt) :, None]).squeeze(-1).numpy()
        found = sampled.logprobs[sampled.offsets[index] : sampled.offsets[index + 1]]
        assert np.abs(found - expected).max() < LOGPROB_TOLERANCE


def test_a_sample_depends_on_its_own_prompt_and_seed_alone(results: VllmResults) -> None:
    count = len(PROMPTS)
    for index in range(count):
        assert np.array_equal(results.sampled.row(index), results.again_reversed.row(count - 1 - index))


def test_ends_limits_and_padding_rows_are_respected(results: VllmResults) -> None:
    for rollouts in (results.greedy, results.sampled):
        assert rollouts.response_ids.max() < 259
        for index, prompt in enumerate(PROMPTS):
            row = rollouts.row(index)
            stopped = rollouts.finish_reason[index] == "stop"
            assert 2 not in row[:-1]
            assert (row[-1] == 2) == stopped
            assert stopped or len(row) == min(24, 60 - len(prompt))
    assert sum(results.reports) == 5 * len(PROMPTS)


def test_shards_in_one_queue_get_the_responses_they_get_alone(results: VllmResults) -> None:
    for shards in (results.together, results.in_turn):
        assert sorted(shards) == [0, 1, 2]
        for number, rollouts in shards.items():
            for place in range(2):
                assert np.array_equal(rollouts.row(place), results.greedy.row(2 * number + place))


def test_a_full_queue_takes_no_further_shard_until_one_ends(results: VllmResults) -> None:
    # Three requests fill the queue: two shards of two do so at first.
    assert results.taken[0] == 2
    assert results.taken[-1] == 3


def test_in_a_process_of_its_own_it_gives_the_same_responses(results: VllmResults, folder: Path) -> None:
    from tasks.rollout.vllm_engine import VllmEngine
    from tasks.rollout.vllm_process import VllmProcess

    engine = VllmProcess(partial(VllmEngine, model_ref(folder), VllmOptions(), 64), "0")
    for settings, expected in ((GREEDY, results.greedy), (SAMPLED, results.sampled)):
        ((_, found),) = engine.generate([Requests(PROMPTS, SEEDS)], settings, lambda count: None)
        assert np.array_equal(found.response_ids, expected.response_ids)
        assert np.array_equal(found.offsets, expected.offsets)
    engine.close()


def test_a_gpu_where_vllm_was_built_for_none_is_refused(results: VllmResults) -> None:
    assert "device: `cuda`: the vLLM installed here runs on `cpu` only" in results.refused


def test_the_table_is_the_same_from_both_engines(results: VllmResults, folder: Path, tmp_path: Path) -> None:
    store, config = make_run(tmp_path, folder, folder)
    key = StageKey("generate", 0)
    execute(store, config, key)
    ours = store.read_table(key, GENERATE)
    theirs = RunStore.open(results.store_folder).read_table(key, GENERATE)
    assert theirs.schema == ours.schema
    for column in ("sample_id", "prompt_id", "sample_index", "round", "policy_version", "prompt_ids", "seed"):
        assert theirs.column(column) == ours.column(column), column


def test_held_out_prompts_get_the_same_answers_from_both_engines(
    results: VllmResults, folder: Path, tmp_path: Path
) -> None:
    store, config = make_run(tmp_path, folder, folder, warmup=None)
    for key in (REFERENCE, BASELINE):
        execute(store, config, key)
    theirs = RunStore.open(results.store_folder)
    # Teacher and start.
    assert results.answering == [str(folder), str(theirs.path(MODELS, "student"))]
    assert [each.finished(REFERENCE).counters["engine"] for each in (store, theirs)] == ["transformers", "vllm"]
    tables = [each.read_part(each.path(BASELINE, RESPONSES_FILE), EVALUATE_RESPONSES) for each in (store, theirs)]
    assert tables[0].column("model").unique().to_pylist() == ["teacher", "start"]
    assert tables[0].equals(tables[1])


def test_actors_of_a_ray_cluster_sample_with_vllm_what_one_process_does(
    results: VllmResults, folder: Path, tmp_path: Path
) -> None:
    vllm, key = {"engine": "vllm", "shard_prompts": 2}, StageKey("generate", 0)
    store, config = make_run(tmp_path, folder, folder, generate=vllm, ray={"actors": 2})
    manifest = execute(store, config, key)
    counters = {"engine": "vllm", "actors": 2, "shards": 4, "samples": TRAIN}
    assert counters.items() <= manifest.counters.items()
    found = store.read_table(key, GENERATE)
    alone = RunStore.open(results.store_folder).read_table(key, GENERATE)
    for column in ("sample_id", "seed", "prompt_ids", "response_ids", "finish_reason"):
        assert found.column(column) == alone.column(column), column
    logprobs, expected = (Ragged.from_arrow(table["sampled_logprobs"]) for table in (found, alone))
    assert np.abs(logprobs.values - expected.values).max() < LOGPROB_TOLERANCE
