"""Liger's Triton kernels for what a model computes between its matrix products."""

import torch
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel

from schemas.errors import ConfigError
from tasks.language_model.triton_kernels import missing_for_triton
from tasks.packages import require_liger


def fuse_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Let a model's norms, rotary embeddings and gated MLPs run as Liger's kernels, from now on in this process.

    The same formulas in fewer passes over the activations (arXiv 2410.10989). The loss stays this project's.

    Raises:
        ConfigError: Triton does not run on the device, Liger is not installed, or does not know the architecture.
    """
    if (missing := missing_for_triton(device)) is not None:
        raise ConfigError(f"liger_kernels: Triton {missing}, or say `false`")
    require_liger()
    from liger_kernel.backends import set_impl
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

    kind = model.config.model_type
    if kind not in known:
        raise ConfigError(f"liger_kernels: Liger has none for a model of type `{kind}`; say `false`")
    # Beside vLLM, which brings CUTLASS, Liger would turn queries and keys by that from Hopper on: it compiles anew for
    # every length of a row, and hardly two packs have the same.
    set_impl("nvidia-triton")
    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
