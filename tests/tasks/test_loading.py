"""What a model's weights are stored in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

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
