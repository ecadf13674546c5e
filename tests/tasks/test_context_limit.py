"""How long a sequence may be before its neighbours in a packed row change with it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, PreTrainedConfig, PreTrainedModel

from schemas.errors import ModelError, PromptError
from tasks.graph import MODELS
from tasks.language_model.context_limit import context_limit
from tasks.language_model.head import agree, hidden_states
from tasks.language_model.loading import prefer_packed_attention
from tasks.language_model.sources import policy_model
from tests.tasks.test_models import resolve
from tests.tiny_models import make_tokenizer

ORIGINAL, LONGEST = 64, 512
SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def long_rope(original: int = ORIGINAL) -> Phi3Config:
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    return Phi3Config(
        **SIZES,
        max_position_embeddings=LONGEST,
        original_max_position_embeddings=original,
        rope_parameters={"rope_type": "longrope", **factors},
    )


def dynamic_rope() -> LlamaConfig:
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    return LlamaConfig(**SIZES, max_position_embeddings=ORIGINAL, rope_parameters=scaling)


def make(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    prefer_packed_attention(model)
    return model


@torch.no_grad()
def states_beside(model: PreTrainedModel, neighbour: int) -> tuple[Tensor, Tensor]:
    """The states of 30 tokens before a sequence of ``neighbour`` tokens in one row, and alone."""
    lengths = [30, neighbour]
    ids = torch.randint(3, 259, (1, sum(lengths)), generator=torch.Generator().manual_seed(5))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return hidden_states(model, ids, positions)[0, :30], hidden_states(model, ids[:, :30], positions[:, :30])[0]


@pytest.mark.parametrize("config", [long_rope(), dynamic_rope()], ids=["longrope", "dynamic"])
def test_up_to_the_limit_no_sequence_changes_its_neighbours(config: PreTrainedConfig) -> None:
    model, limit = make(config), context_limit(config, "it")
    assert limit == ORIGINAL
    assert agree(*states_beside(model, limit), 1e-5)
    # What the limit is for: beyond it transformers turns all tokens of the row by other angles.
    assert not agree(*states_beside(model, limit + 36), 1e-3)


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(**SIZES, max_position_embeddings=LONGEST), LONGEST),
        (
            LlamaConfig(
                **SIZES,
                max_position_embeddings=LONGEST,
                rope_parameters={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL},
            ),
            LONGEST,
        ),
        (long_rope(LONGEST), LONGEST),
    ],
    ids=["plain", "yarn", "longrope_that_is_not_extended"],
)
def test_other_models_take_all_that_their_config_says(config: PreTrainedConfig, limit: int) -> None:
    assert context_limit(config, "it") == limit


def test_layers_with_rotary_parameters_of_their_own_are_looked_through() -> None:
    config = LlamaConfig(**SIZES, max_position_embeddings=LONGEST)
    extended = {"rope_type": "longrope", "original_max_position_embeddings": ORIGINAL}
    config.rope_parameters = {"sliding_attention": {"rope_type": "default"}, "full_attention": extended}
    assert context_limit(config, "it") == ORIGINAL


def test_a_config_without_a_longest_sequence_is_refused() -> None:
    with pytest.raises(ModelError, match=r"some/model: its config does not say.*add `max_position_embeddings`"):
        context_limit(PreTrainedConfig(), "some/model")


def save_long_rope(folder: Path, original: int) -> Path:
    make(long_rope(original)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_run_stays_within_what_a_longrope_model_was_trained_on_at_first(tmp_path: Path, teacher_dir: Path) -> None:
    student = save_long_rope(tmp_path / "student", ORIGINAL)
    store, config = resolve(tmp_path, teacher_dir, {"model": str(student)})
    assert policy_model(store, config, 0).context == ORIGINAL
    (warning,) = store.finished(MODELS).counters["warnings"]
    assert f"{ORIGINAL} tokens" in warning
    assert f"{LONGEST}" in warning


def test_a_prompt_beyond_it_is_found_before_anything_is_sampled(tmp_path: Path, teacher_dir: Path) -> None:
    student = save_long_rope(tmp_path / "student", 24)
    with pytest.raises(PromptError, match=r"the prompt has 30 tokens.* context of 24 tokens"):
        resolve(tmp_path, teacher_dir, {"model": str(student)})
