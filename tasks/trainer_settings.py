"""What every trainer is told alike, whatever it trains by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from schemas.config import GRPOConfig, OptimizerConfig

A = TypeVar("A", bound=TrainingArguments)

StepsDone = Callable[[int, int], None]
"""Told optimizer steps done and steps in all."""


class StepProgress(TrainerCallback):
    """Tells how far a trainer is, of its steps after ``start``."""

    def __init__(self, on_steps: StepsDone, start: int = 0) -> None:
        self._on_steps, self._start = on_steps, start

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell it."""
        self._on_steps(state.global_step - self._start, state.max_steps - self._start)


def trainer_settings(
    settings: OptimizerConfig | GRPOConfig, folder: Path, name: str, seed: int, device: torch.device
) -> dict[str, Any]:
    """Return arguments of ``transformers.TrainingArguments`` and of what TRL makes of it.

    Args:
        settings: Learning rate, clipping, precision and trackers.
        folder: For what a trainer writes of its own accord; nothing is kept of it.
        name: What trackers call it.
        seed: The run's.
        device: Where it trains.
    """
    return {
        "output_dir": str(folder),
        "run_name": name,
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


def on_device(arguments: A, device: torch.device) -> A:
    """Let a trainer compute on ``device``, and return its ``arguments``.

    By itself transformers takes the first GPU, and where it sees several gives each a part of every batch.
    """
    if device.type == "cuda" and not torch.distributed.is_initialized():
        own = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(own)
        assert arguments.n_gpu > 0, "it has settled on its devices"
        arguments.__dict__["_setup_devices"] = own
        arguments._n_gpu = 1
    return arguments
