"""What a vLLM server answers, from a tiny model in this process: right, or wrong in one way."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tasks.loopback_server import MODEL, error


@dataclass(frozen=True)
class ModelAnswers:
    """Answers as vLLM does.

    Args:
        model: What is served.
        tokenizer: How text is split.
        max_logprobs: vLLM's `--max-logprobs`.
        logprobs_mode: vLLM's `--logprobs-mode`.
        without: Field that answers lack.
    """

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    without: str = ""

    def __call__(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [MODEL]}
        if path == "/tokenize":
            return 200, {"tokens": self.tokenizer(body["prompt"])["input_ids"]}
        if body.get("prompt_logprobs", 0) > self.max_logprobs:
            return error(400, f"Requested prompt logprobs of {body['prompt_logprobs']}, greater than max allowed: 20")
        choice = self._scored(body) if "prompt_logprobs" in body else self._sampled(body)
        return 200, {"choices": [{key: value for key, value in choice.items() if key != self.without}]}

    def _logits(self, tokens: list[int]) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor([tokens]), use_cache=False).logits[0]
        return logits

    def _values(self, logits: Tensor, temperature: float) -> Tensor:
        if self.logprobs_mode == "raw_logits":
            return logits
        return (logits / temperature if self.logprobs_mode == "processed_logprobs" else logits).log_softmax(-1)

    def _scored(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens: list[int] = body["prompt"]
        places: list[dict[str, Any] | None] = [None]
        for values, token in zip(self._values(self._logits(tokens), 1.0), tokens[1:]):
            likely = values.topk(body["prompt_logprobs"])
            own = {str(token): {"logprob": values[token].item(), "rank": int((values >= values[token]).sum())}}
            others = enumerate(zip(likely.indices.tolist(), likely.values.tolist()), start=1)
            places.append(own | {str(i): {"logprob": value, "rank": rank} for rank, (i, value) in others})
        return {"prompt_logprobs": places}

    def _sampled(self, body: dict[str, Any]) -> dict[str, Any]:
        tokens, logprobs = list(body["prompt"]), []
        for _ in range(body["max_tokens"]):
            logits = self._logits(tokens)[-1]
            tokens.append(int((logits / body["temperature"]).softmax(-1).multinomial(1)))
            logprobs.append(self._values(logits, body["temperature"])[tokens[-1]].item())
        return {"token_ids": tokens[len(body["prompt"]) :], "logprobs": {"token_logprobs": logprobs}}
