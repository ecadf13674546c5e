"""Which modules of a model are trained: low-rank adapters, and nothing that text does not pass through."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from schemas.config import LoraConfig
from schemas.errors import ConfigError
from tasks.language_model.head import OutputHead
from tasks.language_model.loading import model_class
from tasks.packages import require_lora


def freeze_beside_text(model: PreTrainedModel) -> None:
    """Leave what text does not pass through (a vision tower) as it is.

    It gets no gradients, and with several processes DDP waits for one of each weight that could have some.
    """
    for name in _beside_text(model):
        model.get_submodule(name).requires_grad_(False)


def _beside_text(model: PreTrainedModel) -> list[str]:
    """Return the names of a multi-modal model's modules that text does not pass through, outermost first."""
    if model.config.get_text_config() is model.config:
        return []
    used = {
        id(weight) for part in (model.get_decoder(), OutputHead.of(model).projection) for weight in part.parameters()
    }
    return [
        name
        for name, module in model.named_modules()
        if name and not any(id(weight) in used for weight in module.parameters())
    ]


def peft_config(lora: LoraConfig, model: PreTrainedModel) -> Any:
    """Return the adapter settings as `peft` takes them for ``model``.

    Raises:
        ConfigError: `peft` is not installed.
    """
    require_lora()
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        exclude_modules=_beside_text(model) or None,
        task_type="CAUSAL_LM",
    )


def check_adapters(lora: LoraConfig, config: PreTrainedConfig, name: str, *, trust_remote_code: bool) -> None:
    """Check that a model of this config can have the adapters, without its weights: training comes hours later.

    Raises:
        ConfigError: `peft` is not installed, or cannot put adapters there.
        ModelError: no class of `transformers` is for the model, which errors call ``name``.
    """
    require_lora()
    from peft import get_peft_model

    with torch.device("meta"):
        model = model_class(config, name).from_config(config, trust_remote_code=trust_remote_code)
    modules = [f".{module}" for module, _ in model.named_modules()]
    wanted = lora.target_modules if isinstance(lora.target_modules, list) else []
    # Where others are found, `peft` leaves these out without a word.
    absent = [target for target in wanted if not any(module.endswith(f".{target}") for module in modules)]
    if absent:
        last = sorted(
            {module.rpartition(".")[2] for module, part in model.named_modules() if isinstance(part, nn.Linear)}
        )
        raise ConfigError(
            f"train.lora.target_modules: a {type(model).__name__} has no "
            f"{', '.join(f'`{target}`' for target in absent)}; its linear layers are {', '.join(last)}"
        )
    try:
        get_peft_model(model, peft_config(lora, model))
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"train.lora.target_modules: {error}") from error
