"""Does a server serve this model? Its tokens and log-probabilities of a few texts against the local ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.config import ServersConfig
from schemas.errors import ModelError
from schemas.untrusted_text import readable
from tasks.collector import free_memory
from tasks.language_model.loading import load_tokenizer
from tasks.language_model.prefill import gap_tolerance, prefill
from tasks.language_model.ragged import Ragged
from tasks.language_model.sources import ModelRef
from tasks.language_model.tensor_parallel import load_whole
from tasks.model_servers.api import ServerApi, reading_answer
from tasks.model_servers.completions import (
    HIGHEST_LOGPROB,
    PLAIN_SAMPLING,
    RETURN_SAMPLED,
    scoring_body,
    token_logprobs,
)

TEXTS = (
    "Near-Policy Distillation: 1 + 1 = 2,\n\tnaïve café 你好 🙂 <|im_end|> [INST] </s>",
    "The teacher reads what the student wrote, and says of every word how likely it was.",
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n",
    "If 3x + 7 = 22, then x = 5, because 22 - 7 = 15 and 15 / 3 = 5.",
)
"""What servers are probed with. Tokenizers differ in the first; the others are ordinary, so that rounding is small."""

_PROBE_TOKENS = 64
"""Tokens of each ordinary text that log-probabilities are compared on, at most."""

_SAMPLED = 12
"""Tokens that a server samples to show what it gives as their log-probabilities."""

_TEMPERATURE = 2.0
"""So far from 1 that log-probabilities after it are others than before, also where the model is sure."""

_DECODING_GAP = 0.3
"""Nats by which decoding and prefilling of one server may differ on average: unlikely tokens, in 16 bits."""

_LOGPROBS_MODE = "start it with `--logprobs-mode raw_logprobs`"


@dataclass(frozen=True)
class Probe:
    """What a server must answer to be trusted with a model.

    Args:
        folder: The model.
        section: Of the config, for errors.
        tokens: The model's tokens of each of TEXTS, int32.
        scored: What of the ordinary texts is scored, int32.
        local: What the model here says of it; None: weights are not compared.
        earlier: What other weights say of it that are likely to be served by mistake; None: none are known.
        sequence_tokens: Longest prompt and response together that a server must take.
        top_k: Most likely tokens that it must give at each position of a prompt.
    """

    folder: str
    section: str
    tokens: Sequence[NDArray[np.int32]]
    scored: Sequence[NDArray[np.int32]]
    local: "LocalScores | None"
    earlier: "LocalScores | None"
    sequence_tokens: int
    top_k: int

    async def __call__(self, api: ServerApi) -> None:
        """Test a server.

        Raises:
            ServerAwayError: it does not answer.
            ModelError: it serves something else, or gives out something else than log-probabilities; says what.
        """
        with reading_answer(api.url):
            card = await api.find_model()
            self._check_length(api, card.get("max_model_len"))
            for text, expected in zip(TEXTS, self.tokens, strict=True):
                if not np.array_equal(await api.tokenize(text), expected):
                    raise ModelError(
                        f"{api.url}: its tokenizer splits {text!r} into other tokens than that of {self.folder}. Serve "
                        "this folder, with its own tokenizer"
                    )
            found = [await self._prompt_logprobs(api, tokens) for tokens in self.scored]
            if self.local is not None:
                self._check_weights(
                    api, self.local, np.concatenate(found), str(card.get("root") or "what it does not say")
                )
            await self._check_sampled(api)

    def _check_length(self, api: ServerApi, served: int | None) -> None:
        if served is not None and served < self.sequence_tokens:
            raise ModelError(
                f"{api.url}: takes sequences of {served} tokens at most, and {self.sequence_tokens} are needed: start "
                f"it with `--max-model-len {self.sequence_tokens}`"
            )

    def _check_weights(self, api: ServerApi, local: "LocalScores", found: NDArray[np.float32], root: str) -> None:
        gap, tolerance = float(np.abs(found.astype(np.float64) - local.logprobs).mean()), gap_tolerance(local.dtype)
        # Written so that NaN fails.
        if not gap <= tolerance:
            proof = f"where {local.dtype} explains {tolerance}"
        elif self.earlier is not None and is_nearer(found, self.earlier.logprobs, local.logprobs):
            proof = f"and are nearer to those of {self.earlier.folder}"
        else:
            return
        raise ModelError(
            f"{api.url}: serves other weights than {self.folder}: over {len(found)} tokens its log-probabilities "
            f"differ by {gap:.3g} nats on average, {proof} (it says that it serves {readable(root)}). Serve this "
            f"folder: `vllm serve {self.folder}`, in the same dtype; `{self.section}.wait_seconds` gives a script of "
            "yours time to do so"
        )

    async def _prompt_logprobs(self, api: ServerApi, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return the server's log-probabilities of all tokens but the first; check that they are some."""
        choice = await api.complete(scoring_body(tokens, self.top_k))
        entries = choice.fields.get("prompt_logprobs")
        if entries is None or len(entries) != len(tokens):
            raise ModelError(f"{api.url}: answers without `prompt_logprobs`: is it vLLM's own server?")
        for entry in entries[1:]:
            likely = np.array([value["logprob"] for value in entry.values()])
            if likely.max() > HIGHEST_LOGPROB or np.exp(likely).sum() > 1.01:
                raise ModelError(f"{api.url}: gives logits, not log-probabilities: {_LOGPROBS_MODE}")
        return token_logprobs(entries, tokens, 1)

    async def _check_sampled(self, api: ServerApi) -> None:
        """Check that a sampled token's log-probability is the one that it has in a prompt, before temperature."""
        prompt = self.scored[0]
        body = {"prompt": prompt.tolist(), "max_tokens": _SAMPLED, "temperature": _TEMPERATURE, "seed": 0}
        choice = await api.complete(body | PLAIN_SAMPLING | RETURN_SAMPLED)
        ids = choice.fields.get("token_ids")
        if ids is None:
            raise ModelError(f"{api.url}: answers without `token_ids`: it needs vLLM 0.10.2 or newer")
        both = np.concatenate([prompt, np.asarray(ids, np.int32)])
        expected = (await self._prompt_logprobs(api, both))[len(prompt) - 1 :]
        gap = float(np.abs(expected - np.asarray(choice.fields["logprobs"]["token_logprobs"])).mean())
        if not gap <= _DECODING_GAP:
            raise ModelError(
                f"{api.url}: log-probabilities of sampled tokens are not those of the model at temperature 1 (they "
                f"differ by {gap:.3g} nats on average): {_LOGPROBS_MODE}"
            )


@dataclass(frozen=True)
class LocalScores:
    """What a model here says of the scored texts.

    Args:
        folder: The model.
        logprobs: Of all their tokens but each one's first, float32, flat, nats.
        dtype: In which it was loaded.
    """

    folder: str
    logprobs: NDArray[np.float32]
    dtype: torch.dtype


def is_nearer(found: NDArray[np.float32], other: NDArray[np.float32], own: NDArray[np.float32]) -> bool:
    """Say whether log-probabilities are another model's rather than one's own, beyond what rounding could do.

    On the line from the own ones (0) to the other's (1) the found ones lie at `place`. Rounding moves that by about
    `error`: the part of the difference off the line, were it random, projected onto it.

    >>> own, other = np.zeros(4, np.float32), np.array([0.1, -0.1, 0.1, -0.1], np.float32)
    >>> is_nearer(other + 0.001, other, own), is_nearer(own + 0.001, other, own), is_nearer(own, own, own)
    (True, False, False)
    """
    line = other.astype(np.float64) - own
    length = float(line @ line)
    if length == 0:
        return False
    difference = found.astype(np.float64) - own
    place = float(difference @ line) / length
    error = float(np.sqrt(np.mean((difference - place * line) ** 2) / length))
    return place - 0.5 > 3 * error


def make_probe(
    model: ModelRef, config: ServersConfig, *, sequence_tokens: int, top_k: int, earlier: ModelRef | None = None
) -> Probe:
    """Return what a server of ``model`` must answer; loads the model for it where weights are compared, and frees it.

    Args:
        model: What is served.
        config: Its servers.
        sequence_tokens: Longest prompt and response together that a server must take.
        top_k: Most likely tokens that it must give at each position of a prompt.
        earlier: Other weights that are likely to be served by mistake, if some are.

    Raises:
        ModelError: the tokenizer or the model cannot be loaded.
    """
    tokenizer = load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    tokens = [np.asarray(tokenizer(text)["input_ids"], np.int32) for text in TEXTS]
    # What is sampled after a text is scored with it, and a server takes one token more than it scores.
    longest = min(_PROBE_TOKENS, model.context - _SAMPLED - 1)
    scored = [row[:longest] for row in tokens[1:]]
    own, other = (
        _local_scores(each, scored) if config.compares_weights and each is not None else None
        for each in (model, earlier)
    )
    needed = max(sequence_tokens, longest + _SAMPLED + 1)
    return Probe(model.path, config.section, tokens, scored, own, other, needed, top_k)


def _local_scores(model: ModelRef, rows: Sequence[NDArray[np.int32]]) -> LocalScores:
    loaded = load_whole(model)
    first, rest = (Ragged.from_rows([row[part] for row in rows]) for part in (slice(1), slice(1, None)))
    found = prefill(loaded, first, rest, batch_tokens=len(rows) * _PROBE_TOKENS, logits_chunk=_PROBE_TOKENS)
    scores = LocalScores(model.path, found.logprobs, loaded.dtype)
    del loaded
    free_memory()
    return scores
