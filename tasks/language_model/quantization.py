"""Teachers in 8 or 4 bits: rounded by bitsandbytes as they are loaded, or stored so."""

import copy
import logging

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.quantizers.auto import get_hf_quantizer

from schemas.config import Quantization
from schemas.errors import ModelError


def stored_quantization(config: PreTrainedConfig) -> str | None:
    """Return how a model folder's weights are quantized already (`gptq`, `awq`, ...); None: they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def require_full_weights(config: PreTrainedConfig, key: str) -> None:
    """Check that a model to train, or to cut layers from, has its weights as they are.

    Raises:
        ModelError: they are quantized; names the config ``key``.
    """
    stored = stored_quantization(config)
    if stored is not None:
        raise ModelError(
            f"{key}: its weights are stored quantized ({stored}), which can be neither trained nor cut down; name the "
            "model in full precision that they were made from"
        )


def require_loadable(config: PreTrainedConfig, quantization: Quantization | None) -> None:
    """Check that the teacher's weights can be loaded as its config asks, before any are.

    Args:
        config: The teacher's own.
        quantization: `teacher.quantization`.

    Raises:
        ModelError: they are quantized already, or what reads them is not installed, or wants another device.
    """
    stored = stored_quantization(config)
    if stored is not None and quantization is not None:
        raise ModelError(
            f"teacher.quantization: `{quantization}`: the weights of teacher.model are stored quantized ({stored}) "
            "already; set `teacher.quantization: null`"
        )
    if stored is None and quantization is None:
        return
    settings = None if quantization is None else bitsandbytes_config(quantization, torch.float32)
    try:
        # It writes into the config.
        get_hf_quantizer(copy.deepcopy(config), settings, None, True, {})
    except (ImportError, RuntimeError, ValueError) as error:
        if stored is not None:
            raise ModelError(f"teacher.model: its weights are stored quantized ({stored}): {error}") from error
        raise ModelError(
            f"teacher.quantization: `{quantization}`: {error}; pip install -e '.[quantization]', "
            "or set `teacher.quantization: null`"
        ) from error


def bitsandbytes_config(quantization: Quantization, compute: torch.dtype) -> BitsAndBytesConfig:
    """Return what ``from_pretrained(quantization_config=...)`` takes; the output head is left out by default.

    Args:
        quantization: As in the config.
        compute: What unpacked 4-bit weights are multiplied in. LLM.int8 multiplies in int8, and in float16 the few
            columns of a batch that hold an outlier.
    """
    # It says once a layer and pass that inputs are cast to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def compute_as_asked(model: nn.Module) -> None:
    """Let 4-bit layers multiply in the type they were given on every CPU.

    On a CPU with AVX512-BF16, bitsandbytes repacks them at their first pass for a kernel that multiplies in bfloat16
    whatever the config asks, and that fails where a layer's inputs are no multiple of a block of 64 or its outputs none
    of 32.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
