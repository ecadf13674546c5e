"""Small random models with a real byte-level tokenizer, made on the spot: every test that needs weights uses these."""

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.random_models import CHAT_TEMPLATE, SPECIAL, tokenizer_of


def make_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE, swap: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level ChatML tokenizer of 259 tokens; ``swap`` exchanges two tokens, which makes it another one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if swap:
        alphabet[40], alphabet[41] = alphabet[41], alphabet[40]
    return tokenizer_of([*SPECIAL, *alphabet], chat_template)


def make_model(
    *, seed: int, layers: int = 2, vocab_size: int = 259, context: int = 512, hidden: int = 32, tie: bool = True
) -> LlamaForCausalLM:
    """Return a random Llama whose logits are spread enough that log-probabilities differ between tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


def save_model(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write a Hugging Face model directory and return it."""
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder
