"""The loss of one chunk of logits as one Triton kernel; the formulas are those of `tasks.train.loss`.

A program takes a row of the vocabulary: it reads the row twice and writes it once, where PyTorch's operators go over it
about ten times. Imported only where it is used.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tasks.train.loss import Objective, Parts

_BLOCK, WARPS = 4096, 8
_FORMS = {"truncated": 0, "tail": 1, "renormalized": 2}


def parts_(
    logits: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, objective: Objective, with_gradient: bool
) -> Parts:
    """Return loss, CE and KD per position [n]; ``logits`` [n, vocabulary] become the gradient of the loss in place.

    Args:
        logits: float32 or float64 [n, vocabulary], contiguous; overwritten also without a gradient.
        labels: int64 [n].
        ids: int64 [n, k], different ids in each row.
        logprobs: The teacher's, float [n, k].
        objective: Weight and form of the loss.
        with_gradient: Whether the gradient is wanted.
    """
    rows, vocabulary = logits.shape
    top_k = ids.shape[1]
    loss, ce, kd = (torch.empty(rows, dtype=logits.dtype, device=logits.device) for _ in range(3))
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device_of(logits):
        kernel[(rows,)](
            logits,
            labels,
            ids.contiguous(),
            logprobs.to(logits.dtype).contiguous(),
            loss,
            ce,
            kd,
            vocabulary,
            top_k,
            **constants(objective, vocabulary, top_k, with_gradient),
            num_warps=WARPS,
        )
    return Parts(loss, ce, kd)


def constants(objective: Objective, vocabulary: int, top_k: int, with_gradient: bool) -> dict[str, Any]:
    """Return what the kernel is compiled for."""
    return {
        "WEIGHT": objective.kd_weight,
        "FORM": _FORMS[objective.kd_form],
        "WITH_GRADIENT": with_gradient,
        "LISTED": triton.next_power_of_2(top_k),
        "BLOCK": min(_BLOCK, triton.next_power_of_2(vocabulary)),
    }


def _row(
    logits: tl.tensor,
    labels: tl.tensor,
    ids: tl.tensor,
    logprobs: tl.tensor,
    losses: tl.tensor,
    ces: tl.tensor,
    kds: tl.tensor,
    vocabulary: tl.tensor,
    top_k: tl.tensor,
    WEIGHT: tl.constexpr,
    FORM: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # int64: a chunk of a large vocabulary has more entries than int32 counts.
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    place = tl.arange(0, LISTED)
    is_listed = place < top_k
    token = tl.load(ids + row * top_k + place, mask=is_listed, other=0)
    label = tl.load(labels + row)

    # A token the teacher rules out (-inf) has probability 0 and adds nothing; 0 * inf would be NaN.
    teacher = tl.maximum(tl.load(logprobs + row * top_k + place, mask=is_listed, other=float("-inf")), -1e4)
    p = tl.where(is_listed, tl.exp(teacher), 0.0)
    if FORM == 1:
        # Rounding in storage can push the k probabilities above 1 in sum.
        teacher -= tl.maximum(tl.log(tl.sum(p, 0)), 0.0)
    if FORM == 2:
        highest = tl.max(tl.where(is_listed, teacher, float("-inf")), 0)
        teacher -= highest + tl.log(tl.sum(tl.where(is_listed, tl.exp(teacher - highest), 0.0), 0))
    p = tl.where(is_listed, tl.exp(teacher), 0.0)

    listed = tl.load(logits + token, mask=is_listed, other=float("-inf"))
    label_logit = tl.load(logits + label)
    # Threads of this program read here what others of it write below, and the other way round.
    tl.debug_barrier()
    tl.store(logits + token, float("-inf"), mask=is_listed)
    tl.debug_barrier()

    # Log-sum-exp of all but the listed, in one pass (Milakov and Gimelshein, arXiv 1805.02867).
    peak = tl.full((), -1e30, logits.dtype.element_ty)
    rest = tl.full((), 0.0, logits.dtype.element_ty)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(logits + column, mask=column < vocabulary, other=float("-inf"))
        higher = tl.maximum(peak, tl.max(values, 0))
        rest = rest * tl.exp(peak - higher) + tl.sum(tl.exp(values - higher), 0)
        peak = higher
    outside = peak + tl.log(rest)
    listed_peak = tl.max(listed, 0)
    below = listed - listed_peak
    below_sum = tl.log(tl.sum(tl.exp(below), 0))
    of_listed = listed_peak + below_sum
    highest = tl.maximum(outside, of_listed)
    normalizer = highest + tl.log(tl.exp(outside - highest) + tl.exp(of_listed - highest))
    student = listed - normalizer
    ce = normalizer - label_logit

    teacher_outside = tl.full((), 0.0, logits.dtype.element_ty)
    if FORM == 2:
        kd = tl.sum(tl.where(is_listed, p * (teacher - (below - below_sum)), 0.0), 0)
    else:
        kd = tl.sum(tl.where(is_listed, p * (teacher - student), 0.0), 0)
    if FORM == 1:
        teacher_outside = tl.maximum(1.0 - tl.sum(p, 0), 0.0)
        if teacher_outside > 0.0:
            kd += teacher_outside * (tl.log(teacher_outside) - (outside - normalizer))
    tl.store(losses + row, (1 - WEIGHT) * ce + WEIGHT * kd)
    tl.store(ces + row, ce)
    tl.store(kds + row, kd)

    if WITH_GRADIENT:
        q = tl.exp(student)
        student_outside = tl.exp(outside - normalizer)
        if FORM == 0:
            total = tl.sum(p, 0)
            to_rest = total * student_outside
            to_listed = total * q - p
        elif FORM == 1:
            to_rest = student_outside - teacher_outside
            to_listed = q - p
        else:
            to_rest = teacher_outside
            to_listed = tl.exp(below - below_sum) - p
        share = (1 - WEIGHT) * student_outside + WEIGHT * to_rest
        share = tl.where(rest > 0.0, share / tl.where(rest > 0.0, rest, 1.0), 0.0)
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < vocabulary
            values = tl.load(logits + column, mask=inside, other=float("-inf"))
            tl.store(logits + column, share * tl.exp(values - peak), mask=inside)
        # The listed and the label once more, after every thread has written the row.
        tl.debug_barrier()
        is_label = is_listed & (token == label)
        gradient = (1 - WEIGHT) * q + WEIGHT * to_listed
        tl.store(logits + token, tl.where(is_label, gradient + (WEIGHT - 1), gradient), mask=is_listed)
        label_is_listed = tl.max(is_label.to(tl.int32), 0) > 0
        tl.store(logits + label, share * tl.exp(label_logit - peak) + (WEIGHT - 1), mask=label_is_listed == 0)


# Not as a decorator: type checkers know nothing of it.
kernel = triton.jit(_row)
