"""The embedded engine: `transformers.generate` over left-padded batches."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from tasks.language_model.loading import load_ref
from tasks.language_model.sources import ModelRef
from tasks.rollout.context import response_limits
from tasks.rollout.engine import Finished, Rollouts, SamplingSettings, TokenIds
from tasks.rollout.sampling import ResponseLimits, SeededSampling


class TransformersEngine:
    """Decodes ``batch_size`` sequences at a time, prompts of like length together.

    Args:
        model: What to sample from; it is loaded here.
        batch_size: Sequences decoded at a time.
    """

    def __init__(self, model: ModelRef, batch_size: int) -> None:
        self._model = load_ref(model)
        # `generate` fills what a request leaves open from the model's own settings: a repetition penalty there would
        # change the distribution.
        self._model.generation_config = GenerationConfig()
        self._batch_size = batch_size

    def generate(
        self,
        prompt_ids: Sequence[TokenIds],
        seeds: NDArray[np.int64],
        settings: SamplingSettings,
        finished: Finished,
    ) -> Rollouts:
        """See Engine."""
        lengths = np.array([len(ids) for ids in prompt_ids], dtype=np.int64)
        # Longest first: what does not fit into memory fails at once.
        order = np.argsort(-lengths, kind="stable")
        rows: dict[int, TokenIds] = {}
        logprobs: dict[int, NDArray[np.float32]] = {}
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            results = self._batch([prompt_ids[index] for index in batch], seeds[batch], settings, finished)
            for index, (row, row_logprobs) in zip(batch, results, strict=True):
                rows[int(index)], logprobs[int(index)] = row, row_logprobs
        in_order = range(len(prompt_ids))
        return Rollouts.from_rows([rows[i] for i in in_order], [logprobs[i] for i in in_order], settings.end_ids)

    def close(self) -> None:
        """See Engine."""
        del self._model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _batch(
        self,
        prompt_ids: Sequence[TokenIds],
        seeds: NDArray[np.int64],
        settings: SamplingSettings,
        finished: Finished,
    ) -> list[tuple[TokenIds, NDArray[np.float32]]]:
        device = self._model.device
        lengths = np.array([len(ids) for ids in prompt_ids], dtype=np.int64)
        limits = response_limits(lengths, settings.context, settings.max_new_tokens)
        width = int(lengths.max())
        padded = np.full((len(prompt_ids), width), settings.end_ids[0], dtype=np.int64)
        mask = np.arange(width) >= (width - lengths)[:, None]
        padded[mask] = np.concatenate(prompt_ids)
        sampling = SeededSampling(
            seeds,
            limits,
            temperature=settings.temperature,
            top_p=settings.top_p,
            vocab_size=settings.vocab_size,
            device=device,
        )
        ending = ResponseLimits(limits, width, settings.end_ids, device, finished)
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
        # Copies, so that a padded batch does not stay in memory for the sake of its rows.
        return [(responses[i, :n].copy(), logprobs[i, :n].copy()) for i, n in enumerate(counts)]
