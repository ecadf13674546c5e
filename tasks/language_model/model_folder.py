"""Writes a trained model as a plain Hugging Face model folder."""

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from schemas.config import ExportConfig
from tasks.language_model.chat import end_ids


def write_model_folder(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: str | Path, config: ExportConfig
) -> None:
    """Write weights, config and tokenizer into an empty folder.

    Args:
        folder: Where to.
        model: Trained weights; they change their type here.
        tokenizer: The model's.
        start: Folder of the model that training started from, which names the tokens that end a reply.
        config: Type and size of the weights' files.
    """
    model.to(getattr(torch, config.dtype))
    model.config.use_cache = True
    # Greedy and nothing else: sampling settings are for whoever deploys to choose.
    model.generation_config = GenerationConfig(
        eos_token_id=end_ids(tokenizer, start),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder, max_shard_size=config.max_shard_size.replace(" ", ""))
    tokenizer.save_pretrained(folder)
