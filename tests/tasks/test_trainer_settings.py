from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_config import SFTConfig

from tasks.rl.grpo import trainer_arguments
from tasks.trainer_settings import on_device
from tests.tasks.rl_runs import rl_config


def test_a_trainer_takes_the_gpu_it_is_told_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with four GPUs, which transformers would split every batch over."""
    arguments = SFTConfig(output_dir=str(tmp_path), bf16=False, per_device_train_batch_size=1)
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 4
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert on_device(arguments, torch.device("cuda:2")) is arguments
    assert (arguments.device, arguments.n_gpu, arguments.train_batch_size) == (torch.device("cuda:2"), 1, 1)
    assert chosen == [torch.device("cuda:2")]


def test_on_a_cpu_nothing_changes(tmp_path: Path) -> None:
    arguments = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert on_device(arguments, torch.device("cpu")).device == torch.device("cpu")


def test_grpo_learns_as_the_config_says(tmp_path: Path) -> None:
    """Every setting away from what TRL would take by itself."""
    alike: dict[str, Any] = {
        "temperature": 0.7,
        "top_p": 0.9,
        "mask_truncated_completions": True,
        "beta": 0.02,
        "epsilon": 0.1,
        "epsilon_high": 0.28,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "num_iterations": 2,
        "num_generations": 4,
        "learning_rate": 3e-6,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.2,
        "max_grad_norm": 0.3,
    }
    config = rl_config(tmp_path, tmp_path, **alike, prompts_per_step=6, sequences_per_batch=8)
    found = trainer_arguments(config, tmp_path, torch.device("cpu"), longest_prompt=5, unused=[259])
    assert {name: getattr(found, name) for name in alike} == alike
    assert (found.max_steps, found.max_completion_length, found.seed) == (4, 6, config.seed)
    # 24 responses a step, eight at a time.
    assert (found.per_device_train_batch_size, found.gradient_accumulation_steps) == (8, 3)
    assert found.generation_kwargs == {"suppress_tokens": [259]}
    assert (found.shuffle_dataset, found.bf16, found.use_vllm) == (False, False, False)
    constant = rl_config(tmp_path, tmp_path, lr_scheduler_type="constant", warmup_steps=3)
    found = trainer_arguments(constant, tmp_path, torch.device("cpu"), longest_prompt=5, unused=[])
    assert (found.lr_scheduler_type, found.warmup_steps) == ("constant_with_warmup", 3)
