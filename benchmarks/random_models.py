"""Models of a given shape with random weights and a real byte-level tokenizer: speed does not depend on the weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama.

    Args:
        hidden: Width.
        intermediate: Width of the feed-forward layers.
        layers: Depth.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        vocab: Rows of the output head.
        tied: Whether the output head is the embedding.
        context: Longest sequence.
        initializer_range: Standard deviation of the weights. At the default 0.02 every token is about as likely, and
            with a large vocabulary hardly any response ends before its limit.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = True
    context: int = 32_768
    initializer_range: float = 0.02


SHAPES = {
    "micro": Shape(32, 64, 2, 4, 2, 259, initializer_range=0.2),
    "mini": Shape(256, 768, 4, 4, 2, 4_096),
    "smollm2-135m": Shape(576, 1_536, 30, 9, 3, 49_152),
    "qwen2.5-1.5b": Shape(1_536, 8_960, 28, 12, 2, 151_936),
    "qwen2.5-7b": Shape(3_584, 18_944, 28, 28, 4, 152_064, tied=False),
}
"""Shapes by name; those of released models have their widths, depths and vocabularies, in Llama's architecture."""


def make_model(
    shape: Shape, *, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """Return a random model in eval mode; the weights are drawn on ``device`` in ``dtype``."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        initializer_range=shape.initializer_range,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.device(device):
        model: LlamaForCausalLM = LlamaForCausalLM._from_config(config, dtype=dtype)
    model.eval()
    return model


def make_tokenizer(tokens: int) -> PreTrainedTokenizerFast:
    """Return a byte-level ChatML tokenizer of ``tokens`` tokens, at least 259; from the 260th on no text holds them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = [*SPECIAL, *alphabet]
    if tokens < len(known):
        raise ValueError(f"a byte-level tokenizer has at least {len(known)} tokens, not {tokens}")
    return tokenizer_of([*known, *(f"filler{index}" for index in range(tokens - len(known)))])


def tokenizer_of(known: list[str], chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of these tokens, SPECIAL and every byte's letter among them."""
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(known)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = chat_template
    return fast


def write_model(
    folder: Path,
    shape: Shape,
    *,
    tokens: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a random model and its tokenizer as a Hugging Face folder, and return it.

    Args:
        folder: Where to.
        shape: The model's.
        tokens: Size of the tokenizer; None: the model's vocabulary. Teacher and student need the same.
        seed: Of the weights.
        device: Where to draw them.
        dtype: Of the weights.
    """
    make_model(shape, seed=seed, device=device, dtype=dtype).save_pretrained(folder)
    make_tokenizer(shape.vocab if tokens is None else tokens).save_pretrained(folder)
    return folder
