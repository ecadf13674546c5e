from pathlib import Path
from typing import Any

import pytest

from schemas.config import RLConfig, RunConfig, RunSettings, load_as, parse_as, parse_settings
from schemas.errors import ConfigError

MINIMAL: dict[str, Any] = {"name": "rl", "run": "runs/source"}
PROMPTS = {"sources": [{"type": "jsonl", "path": "p.jsonl"}]}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"run": None}, "either `run`, a distillation run, or `model` and `prompts`"),
        ({"model": "m", "prompts": PROMPTS}, "either `run`, a distillation run, or `model` and `prompts`"),
        ({"prompts": PROMPTS}, "`prompts` goes with `model`"),
        ({"run": None, "model": "m"}, "`model` needs `prompts`"),
        ({"run": None, "model": "m", "prompts": PROMPTS, "round": 1}, "`round` goes with `run`"),
        ({"round": -2}, "round"),
        ({"grpo": {"sequences_per_batch": 7}}, "does not divide the 128 responses of a step"),
        ({"grpo": {"num_iterations": 3}}, "no multiple of `num_iterations`"),
        ({"grpo": {"num_generations": 1}}, "grpo.num_generations"),
        ({"grpo": {"temperature": 0}}, "grpo.temperature"),
        ({"grpo": {"loss_type": "ppo"}}, "grpo.loss_type"),
        ({"grpo": {"max_new_token": 3}}, "grpo.max_new_token: unknown key; did you mean `max_new_tokens`?"),
        ({"teacher": {"model": "t"}}, "teacher: unknown key"),
        ({"run": "s3://key:secret@bucket/run"}, "a password, a token or a signed URL"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_as(RLConfig, MINIMAL | changes)
    assert part in str(error.value)


def test_a_recorded_config_says_its_kind() -> None:
    config = parse_as(RLConfig, MINIMAL)
    assert parse_settings(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (RunConfig, "kind: rl\nname: x\nrun: runs/source\n", "an RL run, which `npd rl` runs"),
        (RunConfig, "name: x\nrun: runs/source\ngrpo: {steps: 3}\n", "an RL run, which `npd rl` runs"),
        (RunConfig, "name: x\nrun: run.yaml\nmethods: {}\n", "a comparison, which `npd compare` runs"),
        (RLConfig, "name: x\nteacher: {model: t}\n", "a distillation run, which `npd run` runs"),
    ],
)
def test_a_command_tells_where_the_config_of_another_belongs(
    tmp_path: Path, kind: type[RunSettings], text: str, expected: str
) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"the config of {expected}"):
        load_as(kind, path)


def test_relative_prompts_and_model_start_at_the_config_and_the_run_does_not(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    values = {"name": "rl", "model": "student", "prompts": PROMPTS}
    config = parse_as(RLConfig, values, folder=tmp_path)
    assert config.model == str(tmp_path / "student")
    assert config.prompts is not None
    assert config.prompts.sources[0].model_dump()["path"] == str(tmp_path / "p.jsonl")
    assert parse_as(RLConfig, MINIMAL, folder=tmp_path).run == "runs/source"
