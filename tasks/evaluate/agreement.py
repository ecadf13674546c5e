"""Token-level agreement of two models on the same text."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from tasks.language_model.head import OutputHead, hidden_states, input_device
from tasks.language_model.prefill import prefill_batches
from tasks.language_model.ragged import Ragged


@dataclass(frozen=True)
class Mean:
    """A mean over response tokens with the standard error that prompts, not tokens, give it.

    Args:
        value: Token-weighted mean.
        stderr: Standard error, prompts as the independent units.
        tokens: Response tokens in the mean.
    """

    value: float
    stderr: float
    tokens: int


def token_weighted_mean(values: NDArray[np.float64], offsets: NDArray[np.int64]) -> Mean:
    """Return the mean of flat per-token ``values`` [tokens] in responses given by ``offsets``.

    The standard error is that of a ratio estimator over responses (Cochran 1977, 6.4), since tokens of one response
    are not independent; NaN-free: 0 for fewer than two responses.
    """
    lengths = np.diff(offsets)
    filled = lengths > 0
    sums = np.add.reduceat(values, offsets[:-1][filled]) if filled.any() else np.empty(0)
    counts = lengths[filled].astype(np.float64)
    if not len(sums):
        return Mean(float("nan"), 0.0, 0)
    mean = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Mean(mean, 0.0, int(counts.sum()))
    residuals = sums - mean * counts
    n = len(sums)
    stderr = float(np.sqrt((residuals**2).sum() * n / (n - 1)) / counts.sum())
    return Mean(mean, stderr, int(counts.sum()))


def agreement(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compare next-token distributions position by position.

    Args:
        teacher: Logits [n, vocabulary].
        student: Logits [n, vocabulary]; padding may make one vocabulary longer, whose extra rows are no tokens.

    Returns:
        KL(teacher || student) and KL(student || teacher) in nats, and whether both have the same most likely token
        (1.0 or 0.0); each float64 [n].
    """
    shared = min(teacher.shape[1], student.shape[1])
    p = teacher[:, :shared].float().log_softmax(-1)
    q = student[:, :shared].float().log_softmax(-1)
    forward = (p.exp() * (p - q)).sum(-1)
    reverse = (q.exp() * (q - p)).sum(-1)
    same = p.argmax(-1) == q.argmax(-1)
    return forward.double(), reverse.double(), same.double()


@torch.no_grad()
def compare_models(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    prompts: Ragged,
    responses: Ragged,
    *,
    batch_tokens: int,
    logits_chunk: int,
    on_tokens: Callable[[int], None],
) -> dict[str, Mean]:
    """Return the metrics of ``student`` against ``teacher`` on the given responses.

    Args:
        teacher: In eval mode.
        student: In eval mode.
        prompts: int32 token rows.
        responses: int32 token rows, as many.
        batch_tokens: Tokens of one packed forward pass.
        logits_chunk: Positions projected at a time.
        on_tokens: Told the tokens of each pass.
    """
    names = ("kl_teacher_student", "kl_student_teacher", "top1_agreement")
    flat = np.zeros((len(names), len(responses.values)))
    models = (teacher, student)
    heads = [OutputHead.of(model) for model in models]
    devices = [input_device(model) for model in models]
    for batch in prefill_batches(prompts, responses, batch_tokens):
        states = [
            hidden_states(
                model,
                torch.from_numpy(batch.input_ids).to(device),
                torch.from_numpy(batch.position_ids).to(device),
            )[0]
            for model, device in zip(models, devices, strict=True)
        ]
        for start in range(0, len(batch.targets), logits_chunk):
            places = torch.from_numpy(batch.states_at[start : start + logits_chunk])
            logits = [
                head.logits(state[places.to(device)]).to(devices[1])
                for head, state, device in zip(heads, states, devices, strict=True)
            ]
            values = agreement(*logits)
            flat[:, batch.targets[start : start + logits_chunk]] = torch.stack(values).cpu().numpy()
        on_tokens(batch.input_ids.size)
    return {name: token_weighted_mean(flat[index], responses.offsets) for index, name in enumerate(names)}
