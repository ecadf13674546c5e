"""Liger's layers against transformers' own, in one process (`triton_process`), and what refuses them."""

import sys
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from schemas.errors import ConfigError
from tasks.language_model.head import hidden_states
from tasks.language_model.loading import prefer_packed_attention
from tasks.train.liger import fuse_layers
from tests.tasks.test_packed_attention import row_of
from tests.tasks.triton_process import DEVICE, all_results
from tests.tiny_models import make_model

pytestmark = pytest.mark.xdist_group("triton")

LENGTHS = [5, 17, 1, 9]
# float32 on one side: some ten roundings of 6e-8 each in a row. A GPU's attention makes its products of shorter ones.
TOLERANCE = 1e-6 if DEVICE == "cpu" else 1e-5
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
Found = dict[str, tuple[dict[str, Tensor], list[str]]]
KINDS: dict[str, Any] = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}


def draw_model(kind: str) -> PreTrainedModel:
    torch.manual_seed(1)
    model, config = KINDS[kind]
    made: PreTrainedModel = nn.Module.to(model(config(vocab_size=64, num_hidden_layers=2, **SHAPE)), DEVICE)
    prefer_packed_attention(made)
    return made


def states_and_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    input_ids, position_ids = (rows.to(DEVICE) % 64 for rows in row_of(LENGTHS))
    states = hidden_states(model, input_ids, position_ids)[0]
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(4)).to(states)
    (states * weights).sum().backward()
    gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters() if weight.grad is not None}
    return gradients | {"states": states.detach().cpu()}


@pytest.fixture(scope="module")
def found() -> Found:
    """What the fused layers make of each model, and their names."""
    results: Found = all_results()[__name__]
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_fused_layers_give_the_states_and_gradients_of_transformers(kind: str, found: Found) -> None:
    values, fused = found[kind]
    assert {"model.norm", "model.layers.1.mlp", "model.layers.1.input_layernorm"} <= set(fused)
    exact = states_and_gradients(draw_model(kind).double())
    assert {"states", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"} <= exact.keys() == values.keys()
    for name, value in exact.items():
        assert (values[name].double() - value).norm() <= TOLERANCE * value.norm(), name


@pytest.fixture
def triton_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.train.liger.missing_for_triton", lambda device: None)


def test_they_are_refused_without_a_gpu() -> None:
    with pytest.raises(ConfigError, match="liger_kernels: Triton needs a CUDA device, not cpu, or say `false`"):
        fuse_layers(make_model(seed=0), torch.device("cpu"))


def test_they_are_refused_where_triton_can_compile_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match="liger_kernels: Triton finds no C compiler; install gcc"):
        fuse_layers(make_model(seed=0), torch.device("cuda"))


@pytest.mark.usefixtures("triton_runs")
def test_they_are_refused_where_liger_does_not_know_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(seed=0)
    monkeypatch.setattr(type(model.config), "model_type", "other")
    with pytest.raises(ConfigError, match="none for a model of type `other`"):
        fuse_layers(model, torch.device("cuda"))


@pytest.mark.usefixtures("triton_runs")
def test_they_are_refused_without_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, "liger_kernel", missing)
    with pytest.raises(ConfigError, match=r"needs the extra `liger`: pip install -e '\.\[liger\]'"):
        fuse_layers(make_model(seed=0), torch.device("cuda"))


def interpret() -> None:
    """Let Triton's interpreter take what its compiler takes: numbers with a type, and a function of libdevice."""
    from liger_kernel.ops import rms_norm
    from triton import language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
        return convert(value)

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = lambda value: tl.rsqrt(value)


def prefer_another() -> None:
    """Let Liger have kernels that it likes better than Triton's, as it has beside CUTLASS on newer GPUs."""
    from liger_kernel.backends import register_impl

    def rope(*args: Any, **options: Any) -> Any:
        raise AssertionError("not Triton's")

    register_impl("rope", impl_name="nvidia-another", preference_rank=1)(rope)


if __name__ == "__main__":
    prefer_another()
    if DEVICE == "cpu":
        interpret()
    results = {}
    for kind in KINDS:
        model = draw_model(kind)
        with patch("tasks.train.liger.missing_for_triton", return_value=None):
            fuse_layers(model, torch.device("cuda"))
        fused = [name for name, module in model.named_modules() if module.forward.__module__.startswith("liger")]
        results[kind] = states_and_gradients(model), fused
    torch.save(results, sys.argv[1])
