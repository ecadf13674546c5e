"""Load tokenizers and causal language models for inference."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from schemas.errors import ModelError
from tasks.language_model.head import agree, probe_states
from tasks.language_model.packed_attention import PACKED_SEQUENCES
from tasks.language_model.sources import ModelRef


def resolve_device(name: str | None) -> torch.device:
    """Return the device called ``name``; None: the first GPU, else the CPU.

    Raises:
        ModelError: the device does not exist here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device: `{name}` is no torch device: {error}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device: `{name}` is not here; GPUs found: {torch.cuda.device_count()}")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """Return what ``from_pretrained(dtype=...)`` takes: `auto` is float32 on a CPU and the stored type on a GPU."""
    if name == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model folder's tokenizer.

    Raises:
        ModelError: the folder has none that `transformers` can load.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    return tokenizer


def load_model(
    folder: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    packed: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in eval mode onto its device.

    Args:
        folder: A Hugging Face model.
        dtype: As in the config.
        device: As in the config.
        attn_implementation: As in the config.
        trust_remote_code: As in the config.
        packed: It will be given packed rows: with no ``attn_implementation``, let it attend by `packed_sequences` if
            its architecture can.

    Raises:
        ModelError: the folder has no weights that `transformers` can load.
    """
    target = resolve_device(device)
    options: dict[str, Any] = {"dtype": resolve_dtype(dtype, target), "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: its weights cannot be loaded: {error}") from error
    model.to(target)  # type: ignore[arg-type]
    loaded: PreTrainedModel = model.eval()
    if attn_implementation is None:
        text = loaded.config.get_text_config()
        if getattr(text, "attn_logit_softcapping", None) is not None and text._attn_implementation == "sdpa":
            # transformers' sdpa leaves the cap out without a word (Gemma 2), and vLLM does not.
            loaded.set_attn_implementation("eager")
        if packed:
            prefer_packed_attention(loaded)
    return loaded


@torch.no_grad()
def prefer_packed_attention(model: PreTrainedModel) -> bool:
    """Let a model attend by `packed_sequences` if its hidden states stay the same; else leave it as it is.

    Returns:
        Whether it now does.
    """
    if not model.is_backend_compatible():
        return False
    own = model.config.get_text_config()._attn_implementation
    expected, _ = probe_states(model)
    model.set_attn_implementation(PACKED_SEQUENCES)
    try:
        if agree(probe_states(model)[0], expected):
            return True
    except ModelError:  # it asks for something that this attention does not do
        pass
    model.set_attn_implementation(own)
    return False


def load_ref(ref: ModelRef, *, packed: bool = False) -> PreTrainedModel:
    """Load the model that ``ref`` names; ``packed`` as in ``load_model``."""
    return load_model(
        ref.path,
        dtype=ref.dtype,
        device=ref.device,
        attn_implementation=ref.attn_implementation,
        trust_remote_code=ref.trust_remote_code,
        packed=packed,
    )
