"""Load tokenizers and causal language models for inference."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from schemas.config import Quantization
from schemas.errors import ModelError
from tasks.language_model.head import agree, probe_states, rounding
from tasks.language_model.packed_attention import PACKED_SEQUENCES
from tasks.language_model.quantization import bitsandbytes_config, compute_as_asked
from tasks.language_model.sources import ModelRef, Spread
from tasks.language_model.weights import ADAPTERS_CONFIG_NAME

_logger = logging.getLogger(__name__)

UNREADABLE = (OSError, ValueError, SafetensorError, LookupError, TypeError, AttributeError, StrictDataclassError)
"""What `transformers` raises where a model's files are missing or damaged; of other shapes a RuntimeError."""


_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What safetensors calls the types that a model can compute in."""


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


def stored_dtype(folder: str | Path, *, trust_remote_code: bool = False) -> torch.dtype:
    """Return the type that ``from_pretrained(dtype="auto")`` takes: the config's, else that of the weights.

    Raises:
        ModelError: the folder's config or weights cannot be read.
    """
    try:
        named = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code).dtype
        if isinstance(named, torch.dtype):
            return named
        files = sorted(Path(folder).glob("*.safetensors"))
        with safe_open(files[0] if files else Path(folder) / "model.safetensors", framework="pt") as weights:
            types = (weights.get_slice(name).get_dtype() for name in weights.keys())  # noqa: SIM118 - no mapping
            return next((_STORED[kind] for kind in types if kind in _STORED), torch.float32)
    except UNREADABLE as error:
        raise ModelError(f"{folder}: the type of its weights cannot be read: {error}") from error


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model folder's tokenizer.

    Raises:
        ModelError: the folder has none that `transformers` can load.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded: {error}") from error
    return tokenizer


def model_class(config: PreTrainedConfig, name: str) -> Any:
    """Return the class of `transformers` that loads a model which continues text.

    Of models that see images, too, some are known to `transformers` under that name alone (Mistral 3, Qwen2.5-VL).

    Args:
        config: The model's.
        name: What errors call the model.

    Raises:
        ModelError: there is none.
    """
    own = getattr(config, "auto_map", None) or {}
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        known = type(config) in auto._model_mapping or auto.__name__ in own
        if known and not config.is_encoder_decoder:
            return auto
    raise ModelError(
        f"{name}: `transformers` {transformers.__version__} has no decoder-only language model of type "
        f"`{config.model_type}`; name a causal language model, or a newer `transformers` if it is one"
    )


def require_plain_weights(folder: str | Path) -> None:
    """Check that a model folder's weights are in safetensors files, which can hold no code, and are all there is to it.

    Raises:
        ModelError: they are not; says how to convert them.
    """
    require_no_adapters(folder)
    if any(Path(folder).glob("*.safetensors")):
        for index in Path(folder).glob("*.safetensors.index.json"):
            _check_index(index)
        return
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in Path(folder).glob(pattern))
    raise ModelError(
        f"{folder}: it has no safetensors weights"
        + (f" but {others[0]}, which runs whatever code is in it when it is read" if others else "")
        + ". Convert a model you trust once, with `transformers`: "
        "`AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)` writes safetensors"
        " (https://huggingface.co/docs/safetensors); then save its tokenizer there too and name that folder"
    )


def require_no_adapters(folder: str | Path) -> None:
    """Check that a model folder has no adapters beside its weights.

    `transformers` adds such to the model where `peft` is installed, reads them from a pickle if they are in one, and
    takes the weights from wherever their settings say if the folder has no config; vLLM leaves them out.

    Raises:
        ModelError: it has; says how to merge them.
    """
    if (Path(folder) / ADAPTERS_CONFIG_NAME).exists():
        raise ModelError(
            f"{folder}: has adapters ({ADAPTERS_CONFIG_NAME}), which some engines would add to its weights and others "
            "leave out. Merge adapters you trust once, with `peft` (`merge_and_unload`), save the model and its "
            f"tokenizer in another folder and name that; or take {ADAPTERS_CONFIG_NAME} away"
        )


def _check_index(path: Path) -> None:
    try:
        files = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{path}: not a readable index of weights: {error!r}") from None
    for name in files:
        if not (isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name):
            raise ModelError(f"{path}: names {name!r}, which is no safetensors file of the folder")


def load_model(
    folder: str | Path,
    *,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    packed: bool = False,
    quantization: Quantization | None = None,
    spread: Spread | None = None,
    tensor_parallel: int = 1,
) -> PreTrainedModel:
    """Load a causal language model in eval mode onto its device, or its devices.

    Args:
        folder: A Hugging Face model.
        dtype: As in the config.
        device: As in the config.
        attn_implementation: As in the config.
        trust_remote_code: As in the config.
        packed: It will be given packed rows: with no ``attn_implementation``, let it attend by `packed_sequences` if
            its architecture can.
        quantization: As in the config of the teacher.
        spread: Over which devices; None: whole on ``device``.
        tensor_parallel: Ranks of the process group this process is in, each of which loads its part of the layers on
            its own device; 1: there is no group.

    Raises:
        ModelError: the folder has no safetensors weights that `transformers` can load, or not so.
    """
    target = resolve_device(device)
    require_plain_weights(folder)
    options: dict[str, Any] = {
        "dtype": resolve_dtype(dtype, target),
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        compute = options["dtype"]
        if not isinstance(compute, torch.dtype):
            compute = stored_dtype(folder, trust_remote_code=trust_remote_code)
        options["quantization_config"] = bitsandbytes_config(quantization, compute)
        # Such weights are rounded where they will lie.
        options["device_map"] = {"": target}
    if tensor_parallel > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        options["distributed_config"] = DistributedConfig(tp_size=tensor_parallel)
    elif spread is not None:
        # A copy: accelerate writes numbers of bytes into it.
        limits = None if spread.max_memory is None else dict(spread.max_memory)
        options |= {"device_map": spread.device_map, "max_memory": limits, "offload_folder": spread.offload_folder}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model, found = model_class(config, str(folder)).from_pretrained(folder, output_loading_info=True, **options)
    except (*UNREADABLE, RuntimeError, ImportError) as error:
        raise ModelError(f"{folder}: its weights cannot be loaded: {error}") from error
    _require_found(model, found["missing_keys"], folder)
    if quantization is None and spread is None and tensor_parallel == 1:
        model.to(target)
    compute_as_asked(model)
    loaded: PreTrainedModel = model.eval()
    if attn_implementation is None:
        text = loaded.config.get_text_config()
        if getattr(text, "attn_logit_softcapping", None) is not None and text._attn_implementation == "sdpa":
            # transformers' sdpa leaves the cap out without a word (Gemma 2), and vLLM does not.
            loaded.set_attn_implementation("eager")
        if packed:
            prefer_packed_attention(loaded)
    return loaded


def _require_found(model: PreTrainedModel, missing: Iterable[str], folder: str | Path) -> None:
    """Check that no weight is missing: `transformers` draws those at random, others each time."""
    absent = sorted({name for name, _ in model.named_parameters()}.intersection(missing))
    if absent:
        raise ModelError(
            f"{folder}: {len(absent)} of the weights of a {type(model).__name__} are not in its files, `{absent[0]}` "
            "first: it is another kind of model (a reward or embedding model has no output head), or incomplete"
        )


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
        if agree(probe_states(model)[0], expected, rounding(model)):
            return True
    except ModelError:  # it asks for something that this attention does not do
        pass
    model.set_attn_implementation(own)
    _logger.warning(
        "%s: attention `%s` gives it other states than `%s`, which it keeps: a packed row may cost the square of its "
        "length; where there is a GPU, try `attn_implementation: flash_attention_2`",
        type(model).__name__,
        PACKED_SEQUENCES,
        own,
    )
    return False


def load_ref(ref: ModelRef, *, packed: bool = False, tensor_parallel: int = 1) -> PreTrainedModel:
    """Load the model that ``ref`` names; ``packed`` and ``tensor_parallel`` as in ``load_model``."""
    return load_model(
        ref.path,
        dtype=ref.dtype,
        device=ref.device,
        attn_implementation=ref.attn_implementation,
        trust_remote_code=ref.trust_remote_code,
        packed=packed,
        quantization=ref.quantization,
        spread=ref.spread,
        tensor_parallel=tensor_parallel,
    )
