"""CE + top-k forward KL, straight from hidden states, a chunk of positions at a time."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tasks.language_model.head import OutputHead

KdForm = Literal["truncated", "tail", "renormalized"]


def topk_forward_kl(logits: Tensor, topk_ids: Tensor, topk_logprobs: Tensor, form: KdForm) -> Tensor:
    """Return the forward KL from the teacher's top k to the student at each position, in nats.

    - `truncated`: sum_c p_T(c) (log p_T(c) - log p_S(c)) over the k tokens, both over the full vocabulary
      (arXiv 2605.05940). Can be negative; its gradient does not vanish at p_S = p_T.
    - `tail`: the same plus one bucket for all other tokens, T log(T / S) with T = 1 - sum_c p_T(c) and S likewise for
      the student: the KL between two distributions over k + 1 outcomes, so never negative.
    - `renormalized`: both sides divided by their sum over the k tokens.

    Args:
        logits: Student logits, float32 or float64 [n, vocabulary].
        topk_ids: int64 [n, k], different ids in each row.
        topk_logprobs: Teacher log-probabilities over its full vocabulary [n, k].
        form: What happens to the mass outside the top k.

    Returns:
        [n], in the dtype of ``logits``.
    """
    # A token the teacher rules out (-inf) has probability 0 and adds nothing; 0 * inf would be NaN.
    teacher = topk_logprobs.to(logits.dtype).clamp(min=-1e4)
    picked = logits.gather(1, topk_ids)
    if form == "renormalized":
        teacher = teacher - teacher.logsumexp(-1, keepdim=True)
        return (teacher.exp() * (teacher - picked.log_softmax(-1))).sum(-1)
    normalizer = logits.logsumexp(-1, keepdim=True)
    student = picked - normalizer
    if form == "truncated":
        return (teacher.exp() * (teacher - student)).sum(-1)
    # Rounding in storage can push the k probabilities above 1 in sum; they are scaled back so that a tail is left
    # that is at least 0 and the KL stays one between distributions.
    teacher = teacher - teacher.logsumexp(-1, keepdim=True).clamp(min=0)
    probabilities = teacher.exp()
    listed = (probabilities * (teacher - student)).sum(-1)
    if topk_ids.shape[1] == logits.shape[1]:
        return listed
    tail = (1 - probabilities.sum(-1)).clamp(min=0)
    # Summed over the other logits, not 1 - sum: exact also where the student leaves next to nothing outside.
    student_tail = logits.scatter(1, topk_ids, -torch.inf).logsumexp(-1) - normalizer[:, 0]
    return listed + torch.xlogy(tail, tail) - tail * student_tail


@dataclass(frozen=True)
class Targets:
    """What the labelled positions of a pack should learn.

    Args:
        places: Position in the packed row of the state that predicts each label, int64 [n].
        labels: Token ids, int64 [n].
        topk_ids: int64 [n, k]; None in a warm-up.
        topk_logprobs: float [n, k]; None in a warm-up.
    """

    places: Tensor
    labels: Tensor
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None


@dataclass(frozen=True)
class LossSums:
    """Sums over labelled positions, in nats.

    Args:
        ce: Hard-label negative log-likelihood, scalar.
        kd: Top-k forward KL, scalar; 0 without targets.
        label_logprobs: Log-probability of each label, detached, float32 [n].
    """

    ce: Tensor
    kd: Tensor
    label_logprobs: Tensor


def loss_sums(hidden: Tensor, head: OutputHead, targets: Targets, form: KdForm, chunk: int) -> LossSums:
    """Sum CE and KD over the labelled positions without ever holding [positions x vocabulary].

    Each chunk's logits are recomputed in the backward pass. Prompt and filler positions are never projected.

    Args:
        hidden: Last hidden states [tokens, width].
        head: The student's output projection.
        targets: Labels and the teacher's top k.
        form: See ``topk_forward_kl``.
        chunk: Positions projected at a time.
    """

    def chunk_sums(states: Tensor, labels: Tensor, ids: Tensor | None, logprobs: Tensor | None) -> tuple[Tensor, ...]:
        logits = head.logits(states)
        label_logprobs = logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(-1)
        if ids is None or logprobs is None:
            kd = logits.new_zeros(())
        else:
            kd = topk_forward_kl(logits, ids, logprobs, form).sum()
        return -label_logprobs.sum(), kd, label_logprobs.detach()

    ce, kd = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
    seen = []
    for start in range(0, len(targets.labels), chunk):
        part = slice(start, start + chunk)
        sums: tuple[Tensor, ...] = checkpoint(
            chunk_sums,
            hidden[targets.places[part]],
            targets.labels[part],
            None if targets.topk_ids is None else targets.topk_ids[part],
            None if targets.topk_logprobs is None else targets.topk_logprobs[part],
            use_reentrant=False,
            preserve_rng_state=False,
        )
        ce, kd = ce + sums[0], kd + sums[1]
        seen.append(sums[2])
    return LossSums(ce, kd, torch.cat(seen) if seen else hidden.new_zeros(0, dtype=torch.float32))
