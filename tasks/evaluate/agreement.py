"""Token-level agreement of two models on the same text, of which one is in memory at a time."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.tables import AGREEMENT_METRICS
from tasks.evaluate.means import Mean, grouped_mean
from tasks.language_model.head import OutputHead, hidden_states, input_device, module_device
from tasks.language_model.prefill import PrefillBatch, TokensDone, prefill_batches
from tasks.language_model.ragged import Ragged
from tasks.language_model.weights import read_tensors, write_tensors


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


@dataclass(frozen=True)
class KeptStates:
    """What a model made of some text, on disk, and what turns it into logits: all that a comparison needs of it.

    Args:
        folder: Holds a file a batch: the hidden states before each response token, [predicted, width], as computed.
        head: The model's output head, the only part of the model that stays loaded.
    """

    folder: Path
    head: OutputHead

    def batch(self, number: int) -> Tensor:
        """Return the hidden states of a batch, on the head's device."""
        return read_tensors(_batch_file(self.folder, number))["states"].to(module_device(self.head.projection))


@torch.no_grad()
def keep_states(
    model: PreTrainedModel, prompts: Ragged, responses: Ragged, folder: Path, batch_tokens: int, on_tokens: TokensDone
) -> KeptStates:
    """Pass responses through ``model`` and keep the hidden states before each of their tokens.

    Args:
        model: In eval mode.
        prompts: int32 token rows.
        responses: int32 token rows, as many.
        folder: Where the states go.
        batch_tokens: Tokens of one packed forward pass.
        on_tokens: Told the tokens of each pass.
    """
    for number, batch in enumerate(prefill_batches(prompts, responses, batch_tokens)):
        write_tensors(_batch_file(folder, number), {"states": _states(model, batch)})
        on_tokens(batch.input_ids.size)
    return KeptStates(folder, OutputHead.of(model))


@torch.no_grad()
def compare_with_teacher(
    teacher: PreTrainedModel,
    student: KeptStates,
    prompts: Ragged,
    responses: Ragged,
    *,
    batch_tokens: int,
    logits_chunk: int,
    on_tokens: TokensDone,
) -> dict[str, Mean]:
    """Return the metrics of ``student`` against ``teacher`` on the given responses.

    Args:
        teacher: In eval mode.
        student: What it made of the same responses in batches of the same size.
        prompts: int32 token rows.
        responses: int32 token rows, as many.
        batch_tokens: Tokens of one packed forward pass.
        logits_chunk: Positions projected at a time.
        on_tokens: Told the tokens of each pass.
    """
    flat = np.zeros((len(AGREEMENT_METRICS), len(responses.values)))
    head = OutputHead.of(teacher)
    for number, batch in enumerate(prefill_batches(prompts, responses, batch_tokens)):
        ours, theirs = student.batch(number), _states(teacher, batch)
        for start in range(0, len(batch.targets), logits_chunk):
            chunk = slice(start, start + logits_chunk)
            values = agreement(head.logits(theirs[chunk]).to(ours.device), student.head.logits(ours[chunk]))
            flat[:, batch.targets[chunk]] = torch.stack(values).cpu().numpy()
        on_tokens(batch.input_ids.size)
    return {name: grouped_mean(flat[index], responses.offsets) for index, name in enumerate(AGREEMENT_METRICS)}


def _states(model: PreTrainedModel, batch: PrefillBatch) -> Tensor:
    device = input_device(model)
    states = hidden_states(
        model, torch.from_numpy(batch.input_ids).to(device), torch.from_numpy(batch.position_ids).to(device)
    )[0]
    return states[torch.from_numpy(batch.states_at).to(states.device)]


def _batch_file(folder: Path, number: int) -> Path:
    return folder / f"states-{number:05d}.safetensors"
