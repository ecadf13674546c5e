"""What vLLM is asked for, without vLLM."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from schemas.config import VllmOptions
from tasks.language_model.sources import ModelRef
from tasks.rollout.vllm_engine import VllmEngine
from tests.tasks import fake_vllm
from tests.tiny_models import make_model, save_model


@pytest.mark.parametrize(
    ("device", "stored", "wanted", "given"),
    [
        ("cuda", torch.float32, "auto", "float32"),
        ("cuda", torch.bfloat16, "auto", "bfloat16"),
        ("cuda", torch.float16, "auto", "float16"),
        ("cuda", torch.float32, "bfloat16", "bfloat16"),
        ("cpu", torch.bfloat16, "auto", "float32"),
        ("cpu", torch.float32, "bfloat16", "bfloat16"),
    ],
)
def test_weights_are_sampled_from_in_the_type_they_are_scored_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, stored: torch.dtype, wanted: str, given: str
) -> None:
    """`auto` of vLLM makes 16 bits of float32 on a GPU."""
    model: Any = nn.Module.to(make_model(seed=1), stored)
    folder = save_model(tmp_path, model)
    made = fake_vllm.install(monkeypatch, device)
    VllmEngine(ModelRef(str(folder), "v", 0, 512, 259, dtype=wanted), VllmOptions(), longest_sequence=64)
    assert [arguments["dtype"] for arguments in made] == [given]


@pytest.mark.parametrize(("padding_rows", "runner"), [(1024, None), (1025, "0")])
def test_the_newer_runner_is_left_where_more_ids_are_barred_than_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, padding_rows: int, runner: str | None
) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "")
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    folder = save_model(tmp_path, make_model(seed=1, vocab_size=259 + padding_rows))
    fake_vllm.install(monkeypatch)
    VllmEngine(ModelRef(str(folder), "v", 0, 512, 259), VllmOptions(), longest_sequence=64)
    assert os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == runner
