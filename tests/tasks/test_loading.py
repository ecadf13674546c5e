"""What a model's weights are stored in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from schemas.config import LoraConfig
from schemas.errors import ModelError
from tasks.language_model.adapters import freeze_beside_text, peft_config
from tasks.language_model.head import check_head
from tasks.language_model.loading import load_model, stored_dtype
from tests.tiny_models import make_model, save_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def folder_in(folder: Path, dtype: torch.dtype) -> Path:
    model: Any = nn.Module.to(make_model(seed=1), dtype)
    return save_model(folder, model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_stored_dtype_is_what_the_config_says(tmp_path: Path, dtype: torch.dtype) -> None:
    assert stored_dtype(folder_in(tmp_path, dtype)) == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_word_in_the_config_it_is_that_of_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = folder_in(tmp_path, dtype)
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if "dtype" not in k}))
    weights = folder / "model.safetensors"
    save_file({"a.counts": torch.zeros(3, dtype=torch.int64), **load_file(weights)}, weights, {"format": "pt"})
    assert stored_dtype(folder) == dtype
    assert load_model(folder, device="cpu").dtype == torch.float32


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_not_there_is_not_drawn_at_random(tmp_path: Path, missing: str) -> None:
    """As of an embedding or reward model, or where a file was cut."""
    path = save_model(tmp_path, make_model(seed=1, tie=False)) / "model.safetensors"
    weights = load_file(path)
    del weights[missing]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match=f"1 of the weights of a LlamaForCausalLM are not in its files, `{missing}`"):
        load_model(tmp_path, device="cpu")


def test_of_a_model_that_sees_images_too_the_text_is_what_is_computed_and_trained(tmp_path: Path) -> None:
    """Mistral 3 is known to transformers by its images alone."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    text = sizes | {"model_type": "mistral", "vocab_size": 97, "num_key_value_heads": 2}
    vision = sizes | {"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 16, "patch_size": 8}
    whole = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).eval()
    whole.save_pretrained(tmp_path)
    ids = torch.arange(3, 20)[None]
    model = load_model(tmp_path, device="cpu", packed=True)
    check_head(model)
    freeze_beside_text(model)
    logits = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, whole(input_ids=ids, use_cache=False).logits)
    logits.sum().backward()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert any("vision_tower" in name for name, _ in model.named_parameters())
    assert not any("vision_tower" in name or "projector" in name for name in trained)
    pytest.importorskip("peft")
    from peft import get_peft_model

    adapted = get_peft_model(model, peft_config(LoraConfig(), model))
    adapters = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert adapters
    assert all("language_model" in name for name in adapters)
