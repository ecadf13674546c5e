import itertools
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from schemas.config import GuardConfig, TrainConfig
from schemas.tables import IGNORE_LABEL
from tasks.language_model.sources import ModelRef
from tasks.train.packs import PackReader
from tasks.train.policy_probe import TOP_K, ProbeRow, listed_kl, open_probe, probe_kl, probe_size, read_probe_row
from tests.tasks.training_runs import random_packs
from tests.tiny_models import make_model, save_model

CPU = torch.device("cpu")


@pytest.fixture
def reader(tmp_path: Path) -> PackReader:
    path = tmp_path / "part-00000.parquet"
    pq.write_table(random_packs(packs=5, sequences=6), path)
    return PackReader([path])


def model_ref(folder: Path) -> ModelRef:
    return ModelRef(path=str(folder), version="v", step=0, context=512, shared_vocab=259, dtype="float32", device="cpu")


@pytest.mark.parametrize(("vocabulary", "k"), [(1, 1), (7, 7), (9, 1), (263, 64)])
def test_listed_kl_is_the_kl_of_the_listed_tokens_and_the_rest(vocabulary: int, k: int) -> None:
    random = torch.Generator().manual_seed(vocabulary)
    then = torch.randn(5, vocabulary, generator=random, dtype=torch.float64).log_softmax(-1)
    now = (then + torch.randn(5, vocabulary, generator=random, dtype=torch.float64)).log_softmax(-1)
    ids = then.topk(k, dim=-1).indices

    def grouped(logprobs: Tensor) -> Tensor:
        listed = logprobs.gather(1, ids).exp()
        return torch.cat([listed, 1 - listed.sum(-1, keepdim=True)], 1)[:, : k + (k < vocabulary)]

    p, q = grouped(now), grouped(then)
    found = listed_kl(now.gather(1, ids), then.gather(1, ids))
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-5)
    exact = (now.exp() * (now - then)).sum(-1)
    assert (found <= exact + 1e-5).all()
    if k == vocabulary:
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    assert listed_kl(then.gather(1, ids), then.gather(1, ids)).abs().max() == 0


def test_a_certain_sampler_costs_finitely_much() -> None:
    certain = torch.tensor([[0.0, -200.0]])
    assert 0 < listed_kl(torch.tensor([[-5.0, -6.0]]), certain).item() < 30


def test_the_probe_measures_the_distance_between_two_models(tmp_path: Path, reader: PackReader) -> None:
    sampler, student = make_model(seed=1), make_model(seed=1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    row = read_probe_row(reader, 60, [0])
    probe = open_probe(model_ref(save_model(tmp_path / "sampler", sampler)), CPU, row, TrainConfig(precision="fp32"))
    assert probe_kl(sampler, probe).item() < 1e-6

    # Every sequence alone, in float64, over the whole vocabulary of 259, of which the sampler's 64 are listed.
    starts = [*torch.nonzero(row.position_ids[0] == 0)[:, 0].tolist(), row.input_ids.shape[1]]
    distances = []
    for start, stop in itertools.pairwise(starts):
        ids = row.input_ids[:, start:stop]
        with torch.no_grad():
            now, then = (
                model.double()(input_ids=ids, use_cache=False).logits[0].log_softmax(-1) for model in (student, sampler)
            )
        for place in row.places[(row.places >= start) & (row.places < stop)].tolist():
            p, q = now[place - start].exp(), then[place - start].exp()
            listed = q.topk(TOP_K).indices
            rest_p, rest_q = 1 - p[listed].sum(), 1 - q[listed].sum()
            distances.append((p[listed] * (p[listed] / q[listed]).log()).sum() + rest_p * (rest_p / rest_q).log())
    expected = torch.stack(distances).mean().item()
    assert len(distances) == len(row.places)
    assert expected > 0.01
    assert probe_kl(student.float(), probe).item() == pytest.approx(expected, rel=1e-4)


def test_a_probe_is_whole_sequences_of_the_packs_with_their_response_tokens(reader: PackReader) -> None:
    row = read_probe_row(reader, 40, [3, 1])
    assert 40 <= len(row.places) < 40 + 5 * 14
    known = {}
    for pack in range(len(reader)):
        columns = reader[pack]
        ids, labels, lengths = (columns[n].flatten().to_numpy() for n in ("input_ids", "labels", "seq_lengths"))
        for stop, length in zip(np.cumsum(lengths), lengths, strict=True):
            known[tuple(ids[stop - length : stop].tolist())] = labels[stop - length : stop]
    starts = [*torch.nonzero(row.position_ids[0] == 0)[:, 0].tolist(), row.input_ids.shape[1]]
    seen = set()
    for start, stop in itertools.pairwise(starts):
        sequence = tuple(row.input_ids[0, start:stop].tolist())
        seen.add(sequence)
        predicts = [place - start for place in row.places.tolist() if start <= place < stop]
        assert predicts == (np.flatnonzero(known[sequence] != IGNORE_LABEL) - 1).tolist()
        assert row.position_ids[0, start:stop].tolist() == list(range(stop - start))
    assert len(seen) == len(starts) - 1
    again: ProbeRow = read_probe_row(reader, 40, [3, 1])
    assert torch.equal(row.input_ids, again.input_ids)
    assert not torch.equal(row.input_ids, read_probe_row(reader, 40, [3, 2]).input_ids)


def test_a_probe_has_all_there_is_or_no_more_than_a_step(reader: PackReader) -> None:
    every = sum(int((reader[pack]["labels"].flatten().to_numpy() != IGNORE_LABEL).sum()) for pack in range(len(reader)))
    assert len(read_probe_row(reader, 10_000, [0]).places) == every
    tokens = int(reader.seq_lengths.values.sum())
    assert probe_size(reader, 2, GuardConfig()) == tokens * 2 // 5
    assert probe_size(reader, 2, GuardConfig(probe_tokens=7)) == 7
