"""Trackers that training reports to."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas.config import TrainConfig
from schemas.errors import ConfigError
from schemas.stage_key import StageKey
from tasks.stage import execute
from tests.tasks.training_runs import metrics, random_packs, training_run

WRITER = """
import json
from pathlib import Path

class SummaryWriter:
    def __init__(self, log_dir):
        Path(log_dir).mkdir(parents=True)
        self.file = Path(log_dir, "events.jsonl").open("w")

    def add_text(self, name, value, step=None):
        self.file.write(json.dumps([name, value, step]) + "\\n")

    add_scalar = add_text

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()
"""
"""Of `tensorboardX`, as much as `transformers` uses."""


@pytest.fixture
def tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "tensorboardX.py").write_text(WRITER, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    # What is really installed is left alone.
    missing: Any = None
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", missing)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    yield
    sys.modules.pop("tensorboardX", None)


def events(path: Path) -> list[list[Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("tensorboard")
def test_what_tensorboard_writes_stays_with_the_run(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packs = random_packs()
    store, config = training_run(
        tmp_path, teacher_dir, student_dir, rounds=2, epochs=1, packs=packs, report_to=["tensorboard"]
    )
    losses = []
    for index in range(2):
        execute(store, config, StageKey("train", index))
        execute(store, config, StageKey("export", index))
        found = events(store.folder / "logs" / "tensorboard" / f"round-{index}-train" / "events.jsonl")
        (arguments,) = [json.loads(value) for name, value, _ in found if name == "args"]
        assert arguments["run_name"] == f"test-round-{index}-train"
        losses += [(step, value) for name, value, step in found if name == "train/loss"]
    rows = [row for index in range(2) for row in metrics(store, index).to_pylist()]
    assert [step for step, _ in losses] == [row["step"] for row in rows]
    assert [loss for _, loss in losses] == pytest.approx([row["loss"] for row in rows])

    own = tmp_path / "own"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(own))
    store.supersede(StageKey("train", 1))
    execute(store, config, StageKey("train", 1))
    assert [name for name, _, _ in events(own / "events.jsonl")].count("train/loss") == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbb", r"train\.report_to: `transformers` knows no tracker `wandbb`; it knows .*wandb"),
        ("wandb", r"train\.report_to: `wandb` cannot be used: .*wandb"),
    ],
)
def test_a_tracker_that_is_not_there_is_told_of_before_anything_runs(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        training_run(tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=random_packs(), report_to=[name])


def test_a_tracker_that_is_gone_when_training_begins(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = training_run(tmp_path, teacher_dir, student_dir, rounds=1, epochs=1, packs=random_packs())
    train = TrainConfig.model_validate(config.train.model_dump() | {"report_to": ["wandb"]})
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    with pytest.raises(ConfigError, match=r"train\.report_to: `wandb` cannot be used"):
        execute(store, config.model_copy(update={"train": train}), StageKey("train", 0))
