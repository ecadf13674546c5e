"""Decoding in batches of like length by `transformers.generate`, for models whose state does not fit slots."""

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from tasks.language_model.head import input_device
from tasks.rollout.context import response_limits
from tasks.rollout.engine import Finished, Requests, Responses, SamplingSettings, TokenIds
from tasks.rollout.open_shard import OpenShard
from tasks.rollout.sampling import choose_tokens, logprobs_of
from tasks.rollout.seeds import uniforms


class BatchDecoder:
    """Decodes ``batch_size`` left-padded sequences at a time, prompts of like length together.

    Args:
        model: A causal language model.
        batch_size: Sequences decoded at a time.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int) -> None:
        # `generate` fills what a request leaves open from the model's own settings: a repetition penalty there would
        # change the distribution.
        model.generation_config = GenerationConfig()
        self._model = model
        self._batch_size = batch_size
        self.rows_stepped = 0
        """Rows of all decoding steps together."""
        self.rows_live = 0
        """Those of them that held a sequence still going."""

    def decode(self, requests: Requests, settings: SamplingSettings, finished: Finished) -> Responses:
        """Answer one shard."""
        lengths = requests.lengths
        # Longest first: what does not fit into memory fails at once.
        order = np.argsort(-lengths, kind="stable")
        answers = OpenShard(len(order))
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            part = Requests([requests.prompts[index] for index in batch], requests.seeds[batch])
            for index, response in zip(batch, self._batch(part, settings, finished), strict=True):
                answers.put(int(index), *response)
        return answers.rollouts(settings.end_ids)

    def _batch(
        self, requests: Requests, settings: SamplingSettings, finished: Finished
    ) -> list[tuple[TokenIds, NDArray[np.float32]]]:
        device, lengths = input_device(self._model), requests.lengths
        limits = response_limits(lengths, settings.context, settings.max_new_tokens)
        width = int(lengths.max())
        padded = np.full((len(lengths), width), settings.end_ids[0], dtype=np.int64)
        mask = np.arange(width) >= (width - lengths)[:, None]
        padded[mask] = np.concatenate(requests.prompts)
        sampling = _SeededSampling(requests.seeds, limits, settings, device)
        ending = _ResponseLimits(limits, width, settings.end_ids, device, finished)
        tokens = self._model.generate(  # type: ignore[operator]
            input_ids=torch.from_numpy(padded).to(device),
            attention_mask=torch.from_numpy(mask.astype(np.int64)).to(device),
            generation_config=GenerationConfig(
                do_sample=False,
                num_beams=1,
                max_new_tokens=int(limits.max()),
                pad_token_id=settings.end_ids[0],
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([sampling]),
            stopping_criteria=StoppingCriteriaList([ending]),
        )
        responses = tokens[:, width:].to(torch.int32).cpu().numpy()
        logprobs = sampling.logprobs()
        ended = np.isin(responses, settings.end_ids)
        first_end = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, responses.shape[1])
        counts = np.minimum(first_end, limits)
        self.rows_stepped += responses.size
        self.rows_live += int(counts.sum())
        # Copies, so that a padded batch does not stay in memory for the sake of its rows.
        return [(responses[i, :n].copy(), logprobs[i, :n].copy()) for i, n in enumerate(counts)]


class _SeededSampling(LogitsProcessor):
    """Leaves only the drawn token possible, so that greedy search takes it; records its log-probability."""

    def __init__(
        self, seeds: NDArray[np.int64], limits: NDArray[np.int64], settings: SamplingSettings, device: torch.device
    ) -> None:
        draws = np.zeros((int(limits.max()), len(seeds)))
        if settings.temperature > 0:
            for row, (seed, limit) in enumerate(zip(seeds, limits, strict=True)):
                draws[:limit, row] = uniforms(int(seed), int(limit))
        self._draws = torch.from_numpy(draws).to(device)
        self._settings = settings
        self._logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # A backend may run one step past the last before it notices the end; that step is cut off afterwards.
        draws = self._draws[min(len(self._logprobs), len(self._draws) - 1)]
        scores, settings = scores.float(), self._settings
        chosen = choose_tokens(
            scores,
            draws,
            temperature=settings.temperature,
            top_p=settings.top_p,
            vocab_size=settings.vocab_size,
        )
        self._logprobs.append(logprobs_of(scores, chosen))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen[:, None], 0.0)

    def logprobs(self) -> NDArray[np.float32]:
        """Return the log-probabilities of the drawn tokens [rows, steps]."""
        return cast(NDArray[np.float32], torch.stack(self._logprobs, dim=1).cpu().numpy())


class _ResponseLimits(StoppingCriteria):
    """Ends each row at its end token or its own limit, and tells how many rows ended."""

    def __init__(
        self,
        limits: NDArray[np.int64],
        prompt_width: int,
        end_ids: tuple[int, ...],
        device: torch.device,
        finished: Finished,
    ) -> None:
        self._limits = torch.from_numpy(limits).to(device)
        self._prompt_width = prompt_width
        # `generate` pads rows that have ended only if some criterion has this attribute.
        self.eos_token_id = torch.tensor(end_ids, device=device)
        self._done = torch.zeros(len(limits), dtype=torch.bool, device=device)
        self._finished = finished
        self._reported = 0

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        at_limit = input_ids.shape[1] - self._prompt_width >= self._limits
        self._done |= torch.isin(input_ids[:, -1], self.eos_token_id) | at_limit
        count = int(self._done.sum())
        if count > self._reported:
            self._finished(count - self._reported)
            self._reported = count
        return self._done
