from pathlib import Path

import pytest
import torch
from trl.trainer.sft_config import SFTConfig

from tasks.trainer_settings import on_device


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
