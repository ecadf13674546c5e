from pathlib import Path
from typing import Any

import pytest
import torch
from trl.trainer.sft_config import SFTConfig

from schemas.config import GenerateConfig, GRPOConfig, RLConfig, TrainConfig, parse_as
from tasks.rl.grpo import trainer_arguments as grpo_arguments
from tasks.train.on_policy import on_policy_arguments
from tasks.train.optimize import trainer_arguments
from tasks.train.schedule import RoundSchedule
from tasks.trainer_settings import on_device

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "learning_rate": 0.25,
    "weight_decay": 0.125,
    "max_grad_norm": 0.5,
    "gradient_checkpointing": False,
    "report_to": ["tensorboard"],
}
NAMED = {"run_name": "mine"}


def assert_told(arguments: Any, **expected: Any) -> None:
    """What a user sets reaches the trainer; each value is another than the trainer's own default."""
    found = {name: getattr(arguments, name) for name in expected}
    assert found == expected
    untold = type(arguments)(output_dir=arguments.output_dir, use_cpu=True)
    assert [name for name, value in expected.items() if getattr(untold, name) == value] == []


def test_settings_of_a_round_reach_its_trainer(tmp_path: Path) -> None:
    settings = TrainConfig(packs_per_step=6, save_every_steps=7, precision="fp32", **COMMON)
    schedule = RoundSchedule(11, 12, 6, 0.0, 2, 4)
    assert_told(
        trainer_arguments(settings, schedule, tmp_path, "mine", 3, CPU, 2),
        **COMMON,
        **NAMED,
        bf16=False,
        seed=3,
        data_seed=3,
        max_steps=15,
        gradient_accumulation_steps=3,
        per_device_train_batch_size=1,
        save_steps=7,
        logging_steps=1,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        max_length=None,
    )


def test_settings_of_on_policy_training_reach_its_trainer(tmp_path: Path) -> None:
    on_policy = {"prompts_per_step": 6, "batch_prompts": 2, "beta": 0.75}
    settings = TrainConfig.model_validate({"steps_per_round": 9, "on_policy": on_policy, "precision": "fp32", **COMMON})
    sampling = GenerateConfig(max_new_tokens=17, temperature=0.5, top_p=0.75)
    arguments = on_policy_arguments(settings, sampling, tmp_path, "mine", 3, CPU)
    assert_told(
        arguments,
        **COMMON,
        **NAMED,
        seed=3,
        max_steps=9,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_completion_length=17,
        beta=0.75,
        generation_kwargs={"temperature": 0.5, "top_p": 0.75},
    )
    # The divergence is of the distributions themselves, however they are sampled from.
    assert arguments.temperature == 1.0
    greedy = on_policy_arguments(settings, GenerateConfig(temperature=0), tmp_path, "mine", 3, CPU)
    assert greedy.generation_kwargs == {"do_sample": False}


def test_settings_of_grpo_reach_its_trainer(tmp_path: Path) -> None:
    own: dict[str, Any] = {
        "num_generations": 4,
        "num_iterations": 2,
        "temperature": 0.5,
        "top_p": 0.75,
        "mask_truncated_completions": True,
        "beta": 0.375,
        "epsilon": 0.0625,
        "epsilon_high": 0.3125,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "warmup_steps": 5,
    }
    values = {"steps": 9, "prompts_per_step": 6, "sequences_per_batch": 12, "max_new_tokens": 17, "save_every_steps": 4}
    grpo = {**COMMON, **own, **values, "lr_scheduler_type": "constant", "precision": "fp32"}
    config = parse_as(RLConfig, {"name": "rl", "run": "r", "seed": 3, "trust_remote_code": True, "grpo": grpo})
    assert config.grpo == GRPOConfig(**grpo)
    assert_told(
        grpo_arguments(config, tmp_path, "mine", CPU, 40, [259, 260]),
        **COMMON,
        **NAMED,
        **own,
        seed=3,
        max_steps=9,
        per_device_train_batch_size=12,
        gradient_accumulation_steps=2,
        max_completion_length=17,
        save_steps=4,
        lr_scheduler_type="constant_with_warmup",
        shuffle_dataset=False,
        generation_kwargs={"suppress_tokens": [259, 260]},
        trust_remote_code=True,
    )


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
