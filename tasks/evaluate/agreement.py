"""Token-level agreement of two models on the same text."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.tables import AGREEMENT_METRICS
from tasks.evaluate.means import Mean, grouped_mean
from tasks.language_model.head import OutputHead, hidden_states, input_device
from tasks.language_model.prefill import prefill_batches
from tasks.language_model.ragged import Ragged


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
    flat = np.zeros((len(AGREEMENT_METRICS), len(responses.values)))
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
    return {name: grouped_mean(flat[index], responses.offsets) for index, name in enumerate(AGREEMENT_METRICS)}
