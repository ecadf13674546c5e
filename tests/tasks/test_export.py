"""What is exported: the trained weights, rounded once, with the tokens that end a reply and the chat template."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from schemas.stage_key import StageKey
from tasks.language_model.loading import load_model, load_tokenizer
from tests.tasks.training_runs import random_packs, train_rounds, trained_weights, training_run
from tests.tiny_models import make_model, make_tokenizer, save_model


@pytest.mark.parametrize("tie", [True, False])
def test_an_export_is_the_trained_weights_rounded_once(tmp_path: Path, teacher_dir: Path, tie: bool) -> None:
    student_dir = save_model(tmp_path / "student", make_model(seed=4, tie=tie))
    store, config = training_run(tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=random_packs())
    train_rounds(store, config)
    folder = store.path(StageKey("export", 0), "model")
    exported, trained = load_file(folder / "model.safetensors"), trained_weights(store, 0)
    assert exported.keys() == trained.keys()
    assert ("lm_head.weight" in exported) == (not tie)
    assert all(torch.equal(exported[name], trained[name].bfloat16()) for name in trained)
    model: Any = load_model(folder, dtype="bfloat16", device="cpu")
    assert model.config.dtype == torch.bfloat16
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    # The tokenizer's end of a reply; nothing else that would change how it samples.
    assert model.generation_config.eos_token_id == [2]
    assert not model.generation_config.do_sample
    assert load_tokenizer(folder).chat_template == make_tokenizer().chat_template


def test_exported_adapters_are_added_at_their_scale(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    """W + alpha / r B A."""
    lora = {"r": 3, "alpha": 5, "target_modules": ["q_proj", "down_proj"]}
    store, config = training_run(
        tmp_path, teacher_dir, student_dir, rounds=1, epochs=2, packs=random_packs(), lora=lora, learning_rate=1e-2
    )
    train_rounds(store, config)
    adapters = load_file(store.checkpoint(StageKey("train", 0)) / "adapter_model.safetensors")
    exported = load_file(store.path(StageKey("export", 0), "model", "model.safetensors"))
    changed = 0
    for name, weight in load_file(student_dir / "model.safetensors").items():
        left, right = (adapters.get(f"base_model.model.{name.replace('.weight', f'.lora_{x}.weight')}") for x in "BA")
        if left is not None and right is not None:
            weight = weight + 5 / 3 * (left @ right)
            changed += 1
        torch.testing.assert_close(exported[name], weight.bfloat16(), rtol=2**-7, atol=1e-6)
    assert changed == 4
