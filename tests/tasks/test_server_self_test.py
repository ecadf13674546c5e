"""Servers that serve the model are used; those that are wrong in one way are refused, with what to do."""

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from schemas.config import ScoreConfig, ServersConfig, TeacherServersConfig
from schemas.errors import ModelError, NPDError
from tasks.language_model.loading import load_ref
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ModelRef
from tasks.model_servers.completions import likely_tokens
from tasks.model_servers.self_test import Probe, make_probe
from tasks.model_servers.served import ServedModel
from tasks.rollout.engine import Requests, SamplingSettings
from tasks.rollout.server_engine import ServerEngine
from tasks.score.scoring import local_prefill, score_rollouts
from tasks.score.server import ServedPrefill
from tests.tasks.loopback_server import Answer, LoopbackServer
from tests.tasks.served_model import ModelAnswers
from tests.tiny_models import make_model, make_tokenizer, save_model


@pytest.fixture(scope="module")
def ref(tmp_path_factory: pytest.TempPathFactory) -> ModelRef:
    """A model of 264 vocabulary rows for 259 tokens, the padding rows likely."""
    model = make_model(seed=5, vocab_size=264, tie=False)
    with torch.no_grad():
        model.lm_head.weight[259:] *= 3
    return ModelRef(str(save_model(tmp_path_factory.mktemp("served"), model)), "v", 0, 512, 259, device="cpu")


@pytest.fixture(scope="module")
def right(ref: ModelRef) -> ModelAnswers:
    return ModelAnswers(load_ref(ref), make_tokenizer())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def probe(ref: ModelRef) -> Probe:
    return make_probe(ref, ServersConfig(), sequence_tokens=100, top_k=7)


@pytest.fixture(scope="module")
def server(right: ModelAnswers) -> Iterator[LoopbackServer]:
    started = LoopbackServer(right)
    yield started
    started.stop()


def verdict(server: LoopbackServer, answer: Answer, probe: Probe) -> str:
    """Return why a server is refused that answers so; "" if it is not."""
    server.answer = answer
    try:
        ServedModel(ServersConfig(urls=[server.url]), probe).close()
    except ModelError as error:
        return str(error)
    return ""


def test_a_server_of_the_model_is_used(server: LoopbackServer, right: ModelAnswers, probe: Probe) -> None:
    assert verdict(server, right, probe) == ""


def test_other_weights_are_refused_and_the_folder_to_serve_is_named(
    server: LoopbackServer, right: ModelAnswers, probe: Probe
) -> None:
    other = copy.deepcopy(right.model)
    with torch.no_grad():
        # About as far as some steps of training go.
        other.lm_head.weight += 0.01 * torch.randn(
            other.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    refused = verdict(server, replace(right, model=other), probe)
    assert f"{server.url}: serves other weights than {probe.folder}" in refused
    assert "tiny-folder" in refused
    assert f"`vllm serve {probe.folder}`" in refused
    assert "`generate.server.wait_seconds`" in refused
    # A teacher too large to be loaded here is taken at its word.
    assert verdict(server, replace(right, model=other), replace(probe, local=None)) == ""


def test_a_snapshot_so_near_that_rounding_hides_it_is_refused_by_its_likeness(
    server: LoopbackServer, right: ModelAnswers, ref: ModelRef, tmp_path: Path
) -> None:
    earlier = copy.deepcopy(right.model)
    with torch.no_grad():
        earlier.lm_head.weight *= 1.0005
    folder = save_model(tmp_path / "earlier", earlier)
    probe = make_probe(ref, ServersConfig(), sequence_tokens=9, top_k=0, earlier=replace(ref, path=str(folder)))
    assert verdict(server, replace(right, model=earlier), replace(probe, earlier=None)) == ""
    assert f"nearer to those of {folder}" in verdict(server, replace(right, model=earlier), probe)
    assert verdict(server, right, probe) == ""


@pytest.mark.parametrize(
    ("wrong", "needed", "words"),
    [
        ({"tokenizer": make_tokenizer(swap=True)}, {}, "its tokenizer splits"),
        ({}, {"sequence_tokens": 129}, "takes sequences of 128 tokens at most, .* `--max-model-len 129`"),
        ({}, {"top_k": 21}, "max allowed: 20; .* higher `--max-logprobs`, or lower `score.top_k`"),
        ({"logprobs_mode": "raw_logits"}, {}, "gives logits, .* `--logprobs-mode raw_logprobs`"),
        (
            {"logprobs_mode": "processed_logprobs"},
            {},
            "not those .* at temperature 1 .* `--logprobs-mode raw_logprobs`",
        ),
        ({"without": "prompt_logprobs"}, {}, "without `prompt_logprobs`"),
        ({"without": "token_ids"}, {}, "without `token_ids`"),
    ],
)
def test_a_server_that_answers_otherwise_is_refused(
    server: LoopbackServer, right: ModelAnswers, probe: Probe, wrong: dict[str, Any], needed: dict[str, Any], words: str
) -> None:
    refused = verdict(server, replace(right, **wrong), replace(probe, **needed))
    assert re.search(words, refused), refused


@pytest.mark.parametrize("bare", [[1, 5, 6], []])
def test_scores_and_targets_are_those_of_the_local_prefill(
    server: LoopbackServer, right: ModelAnswers, ref: ModelRef, bare: list[int]
) -> None:
    """Padding rows are among the most likely, so that more must be asked for; empty and one-token responses."""
    server.answer = right
    generator = np.random.default_rng(0)
    prompts, responses = (
        Ragged.from_rows([generator.integers(3, 259, size).astype(np.int32) for size in sizes])
        for sizes in ((5, 17, 1, 9), (7, 1, 0, 13))
    )
    known = np.array(bare, np.int32)
    settings = ScoreConfig(top_k=7)
    expected = score_rollouts(
        local_prefill(right.model, settings), prompts, responses, known, top_k=7, shared_vocab=259
    )
    done: list[int] = []
    served = ServedPrefill(ref, TeacherServersConfig(urls=[server.url], max_in_flight=2), 64, top_k=7)
    found = score_rollouts(served, prompts, responses, known, top_k=7, shared_vocab=259, on_tokens=done.append)
    served.close()
    np.testing.assert_allclose(found.nll.conditional, expected.nll.conditional, atol=1e-4)
    np.testing.assert_allclose(found.nll.unconditional, expected.nll.unconditional, atol=1e-4)
    np.testing.assert_array_equal(found.conditional.topk_ids, expected.conditional.topk_ids)
    np.testing.assert_allclose(found.conditional.topk_logprobs, expected.conditional.topk_logprobs, atol=1e-4)
    assert max(body.get("prompt_logprobs", 0) for body in server.completions) > 7


def always(choice: dict[str, Any]) -> Answer:
    return lambda path, body: (200, {"choices": [choice]})


def test_targets_that_are_none_are_refused_as_they_come(
    server: LoopbackServer, right: ModelAnswers, ref: ModelRef
) -> None:
    """They would end training, hours later."""
    server.answer = right
    served = ServedPrefill(ref, TeacherServersConfig(urls=[server.url]), 64, top_k=2)
    one = Ragged.from_rows([np.array([5], np.int32)])
    own: dict[str, Any] = {"5": {"logprob": -0.5, "rank": 1}}
    for answer in (
        own | {"9": {"logprob": float("nan"), "rank": 2}},
        own | {"9": {"logprob": 0.5, "rank": 2}},
        own | {"-9": {"logprob": -1.0, "rank": 2}},
        own | {"05": {"logprob": -0.6, "rank": 2}},
        own | {"9": {"logprob": None, "rank": 2}},
        own | {"9": -1.0},
        {},
    ):
        choice = {"prompt_logprobs": [None, answer]}
        server.answer = always(choice)
        with pytest.raises(ModelError, match=rf"{server.url}: its answer is not one of vLLM's own server"):
            served(one, one, top_k=2, topk_rows=np.array([True]), shared_vocab=259, on_tokens=None)
    served.close()


def test_responses_that_are_none_are_refused_as_they_come(
    server: LoopbackServer, right: ModelAnswers, ref: ModelRef
) -> None:
    server.answer = right
    engine = ServerEngine(ref, ServersConfig(urls=[server.url]), 64)
    settings = SamplingSettings(max_new_tokens=2, context=64, temperature=1.0, top_p=1.0, end_ids=(2,), vocab_size=259)
    requests = Requests([np.array([5], np.int32)], np.zeros(1, np.int64))
    wrong: list[tuple[list[int], list[float] | None, str]] = [
        ([5, 6], [-1.0], "2 tokens with 1 log-probabilities"),
        ([5, -6], [-1.0, -1.0], "an id below 0"),
        ([5, 6], [-1.0, float("nan")], "nan is no log-probability"),
        ([5, 6], None, "is not one of vLLM's own server"),
        ([5, 6, 2], [-1.0] * 3, "went on beyond its limit of 2"),
        ([2, 6], [-1.0] * 2, "or beyond an end token"),
        ([5], [-1.0], "ended before its limit of 2 without an end token"),
        ([5, 260], [-1.0] * 2, "a padding row"),
    ]
    for tokens, logprobs, words in wrong:
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": logprobs}}
        server.answer = always(choice)
        with pytest.raises(NPDError, match=f"{server.url}: .*{words}"):
            list(engine.generate([requests], settings, lambda count: None))
    engine.close()


def test_the_prompts_own_token_is_a_target_only_by_its_rank() -> None:
    def entry(*tokens: tuple[int, float, int]) -> dict[str, dict[str, float]]:
        return {str(token): {"logprob": logprob, "rank": rank} for token, logprob, rank in tokens}

    answer = [
        None,
        entry((7, -9.0, 40), (5, -1.0, 1), (3, -2.0, 2)),  # the own token, 7, is unlikely
        entry((5, -1.0, 1), (9, -1.0, 2)),  # it is among the most likely; equals: the lower id first
        entry((8, -2.0, 2), (4, -0.5, 1)),
    ]
    found = likely_tokens(answer, 1, asked=2, top_k=2, shared_vocab=100)
    assert found is not None
    assert found[0].tolist() == [[5, 3], [5, 9], [4, 8]]
    assert found[1].tolist() == [[-1, -2], [-1, -1], [-0.5, -2]]
    assert likely_tokens(answer, 1, asked=2, top_k=2, shared_vocab=9) is None
