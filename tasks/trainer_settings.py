"""What every trainer is told alike, whatever it trains by."""

from pathlib import Path
from typing import Any

import torch

from schemas.config import GRPOConfig, OptimizerConfig


def trainer_settings(
    settings: OptimizerConfig | GRPOConfig, folder: Path, seed: int, device: torch.device
) -> dict[str, Any]:
    """Return arguments of ``transformers.TrainingArguments`` and of what TRL makes of it.

    Args:
        settings: Learning rate, clipping, precision and trackers.
        folder: For what a trainer writes of its own accord; nothing is kept of it.
        seed: The run's.
        device: Where it trains.
    """
    return {
        "output_dir": str(folder),
        "learning_rate": settings.learning_rate,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "bf16": settings.precision == "bf16",
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "seed": seed,
        "data_seed": seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": settings.report_to or "none",
        "disable_tqdm": True,
    }
