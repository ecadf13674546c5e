"""What the tasks made for small models share: a tokenizer of one token a word, prompts, and how a model is trained."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, END, USER, REPLY = "<pad>", "<eos>", "<user>", "<reply>"
SPECIAL = (PAD, END, USER, REPLY)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ ('<reply> ' if message['role'] == 'assistant' else '<user> ') + message['content'] + ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<reply>' }}{% endif %}"
)

Row = dict[str, str]


def word_tokenizer(ids: dict[str, int]) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the words in ``ids``, which hold `SPECIAL`."""
    tokenizer = Tokenizer(models.WordLevel(vocab=ids, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, additional_special_tokens=[USER, REPLY]
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def distinct_prompts(count: int, draw: Callable[[], tuple[str, str]]) -> list[Row]:
    """Return ``count`` rows of a JSON Lines prompt source with different prompts.

    Args:
        count: Rows.
        draw: Returns a prompt and its answer.
    """
    answers: Row = {}
    while len(answers) < count:
        prompt, answer = draw()
        answers[prompt] = answer
    return [{"prompt": prompt, "answer": answer} for prompt, answer in answers.items()]


def write_prompts(path: Path, rows: list[Row]) -> None:
    """Write a JSON Lines prompt source."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(
    model: LlamaForCausalLM,
    steps: int,
    learning_rate: float,
    draw: Callable[[float], tuple[Tensor, Tensor]],
    report: Callable[[int, float], None],
) -> None:
    """Train on a fresh batch at every step.

    Args:
        model: What learns, in place.
        steps: Optimizer steps.
        learning_rate: Peak of the cosine, after 100 steps of warm-up.
        draw: Returns ids and labels, int64 [batch, tokens], at the given share of the steps.
        report: Called after each step with the steps done and the loss.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        model.train()
        share = step / steps
        rate = learning_rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, labels = draw(share)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        report(step + 1, loss.item())
