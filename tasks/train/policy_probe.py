"""How far the student has moved from the policy that sampled its packs: the KL at some of the samples it trains on."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from schemas.config import GuardConfig, OptimizerConfig
from schemas.tables import IGNORE_LABEL
from tasks.language_model.head import OutputHead, hidden_states, pad_rows_if_needed
from tasks.language_model.loading import load_ref
from tasks.language_model.prefill import most_likely
from tasks.language_model.sources import ModelRef
from tasks.train.packs import PackReader

TOP_K = 64
"""Tokens whose probabilities are compared one by one; all others count as one more outcome."""

_MOST_PACKS = 8
_CHUNK = 1024
_LEAST_REST = 1e-6
"""Least mass of the sampler outside its top k: below it float32 sums of k probabilities say nothing."""


@dataclass(frozen=True)
class ProbeRow:
    """Sequences packed into one row, and which of their positions are looked at.

    Args:
        input_ids: int64 [1, tokens].
        position_ids: int64 [1, tokens], restarting with each sequence.
        places: Positions whose hidden state predicts a response token, int64 [n].
    """

    input_ids: Tensor
    position_ids: Tensor
    places: Tensor

    def to(self, device: torch.device) -> "ProbeRow":
        """Return it on ``device``."""
        return ProbeRow(self.input_ids.to(device), self.position_ids.to(device), self.places.to(device))


@dataclass(frozen=True)
class PolicyProbe:
    """Some of a round's samples with what their sampler thinks at each response position.

    Args:
        row: The samples.
        ids: The sampler's most likely tokens, int64 [n, k].
        logprobs: Their log-probabilities, float32 [n, k].
    """

    row: ProbeRow
    ids: Tensor
    logprobs: Tensor


def listed_kl(current: Tensor, sampler: Tensor) -> Tensor:
    """Return D_KL(current || sampler) in nats over k listed tokens and one outcome for all others, [n].

    Never above the KL over the whole vocabulary, and equal to it where all others keep their shares of the rest.

    Args:
        current: Log-probabilities of the listed tokens over the whole vocabulary, [n, k].
        sampler: The sampler's, [n, k].
    """
    now, then = current.double(), sampler.double()
    rest_now, rest_then = ((1 - values.exp().sum(-1)).clamp(min=_LEAST_REST) for values in (now, then))
    listed: Tensor = (now.exp() * (now - then)).sum(-1)
    return (listed + rest_now * (rest_now.log() - rest_then.log())).clamp(min=0)


def read_probe_row(reader: PackReader, tokens: int, seed: list[int]) -> ProbeRow:
    """Return sequences of a few packs, drawn at random, until they hold ``tokens`` response tokens (at least one).

    Args:
        reader: The round's packs.
        tokens: Response tokens wanted.
        seed: Of what is drawn.
    """
    random = np.random.default_rng(seed)
    packs = random.permutation(len(reader))[:_MOST_PACKS]
    ids, positions, places, found, length = [], [], [], 0, 0
    for turn, pack in enumerate(packs):
        wanted = found + -(-(tokens - found) // (len(packs) - turn))
        columns = reader[int(pack)]
        values, labels, lengths = (
            columns[name].flatten().to_numpy(zero_copy_only=False) for name in ("input_ids", "labels", "seq_lengths")
        )
        ends = np.cumsum(lengths, dtype=np.int64)
        for sequence in random.permutation(len(ends)):
            if found >= wanted:
                break
            span = slice(int(ends[sequence] - lengths[sequence]), int(ends[sequence]))
            predicted = np.flatnonzero(labels[span][1:] != IGNORE_LABEL)
            ids.append(values[span])
            positions.append(np.arange(span.stop - span.start))
            places.append(predicted + length)
            found, length = found + len(predicted), length + span.stop - span.start
    return ProbeRow(_row(ids)[None], _row(positions)[None], _row(places))


def _row(parts: list[NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def probe_size(reader: PackReader, packs_per_step: int, config: GuardConfig) -> int:
    """Return the response tokens of a probe: `probe_tokens`, but no more than a step has tokens, so it stays cheap."""
    return min(config.probe_tokens, int(reader.seq_lengths.values.sum()) * packs_per_step // len(reader))


@torch.no_grad()
def open_probe(sampler: ModelRef, device: torch.device, row: ProbeRow, settings: OptimizerConfig) -> PolicyProbe:
    """Ask the snapshot that sampled; it is loaded for this alone and gone afterwards.

    It is run as the student trains, in float32 or with autocast, so that a snapshot is at no distance from itself.

    Args:
        sampler: The snapshot.
        device: Where the student will train.
        row: The samples.
        settings: How it will train.
    """
    model = load_ref(replace(sampler, device=str(device), dtype="float32"), packed=True)
    target, head = row.to(device), OutputHead.of(model)
    ids, logprobs = [], []
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
        pad_rows_if_needed(model)
        states = hidden_states(model, target.input_ids, target.position_ids)[0]
        for places in target.places.split(_CHUNK):
            logits = head.logits(states[places])
            values, found = most_likely(logits, min(TOP_K, logits.shape[1]))
            ids.append(found.long())
            logprobs.append(values - logits.logsumexp(-1, keepdim=True))
    return PolicyProbe(target, torch.cat(ids), torch.cat(logprobs))


@torch.no_grad()
def probe_kl(model: PreTrainedModel, probe: PolicyProbe) -> Tensor:
    """Return the mean D_KL(model || sampler) over the probe's positions, nats per token, float64 scalar."""
    states = hidden_states(model, probe.row.input_ids, probe.row.position_ids)[0]
    head = OutputHead.of(model)
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    for places, ids, logprobs in zip(
        probe.row.places.split(_CHUNK), probe.ids.split(_CHUNK), probe.logprobs.split(_CHUNK), strict=True
    ):
        logits = head.logits(states[places])
        total += listed_kl(logits.gather(1, ids) - logits.logsumexp(-1, keepdim=True), logprobs).sum()
    return total / len(probe.row.places)
