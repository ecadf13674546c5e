import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from flows.cli import app
from schemas.config import RunConfig, parse_config
from schemas.config.base import Section
from schemas.errors import ConfigError
from tests.flows.conftest import CONFIGS, write_smoke_config
from tests.run_fixtures import make_config

PASSWORD = "Pl4nted-Passw0rd"
TOKEN = "hf_" + "Pl4ntedTokenOfTheHub" + "0123456789abcd"
ENVIRONMENT = {
    "HF_TOKEN": TOKEN,
    "AWS_ACCESS_KEY_ID": "AKIA" + "PL4NTED0KEYID123",
    "AWS_SECRET_ACCESS_KEY": "pl4nted/Storage+Secret/0123456789abcdefgh",
    "WANDB_API_KEY": "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c",
}
PLANTED = [PASSWORD, *ENVIRONMENT.values(), os.environ["PREFECT_API_AUTH_STRING"]]

VALUES: list[tuple[str, Any]] = [
    ("root", f"s3://me:{PASSWORD}@bucket/runs"),
    ("teacher.model", f"https://me:{PASSWORD}@host/model"),
    ("teacher.revision", TOKEN),
    ("student.chat_template", f"https://{TOKEN}@host/x.jinja"),
    ("prompts.sources.0.path", f"https://me:{PASSWORD}@host/prompts.jsonl"),
    ("prompts.sources.0.path", f"https://host/prompts.jsonl?X-Amz-Signature={PASSWORD}"),
    ("prompts.sources.0.system", f"You are {TOKEN}."),
    ("prompts.sources.0", {"type": "dataset", "dataset": "d", "revision": TOKEN}),
    ("train.report_to", ["wandb", TOKEN]),
    ("generate.server.urls", [f"http://me:{PASSWORD}@host:8000"]),
    ("score.server.api_key_env", TOKEN),
    ("seed", TOKEN),
    ("api_key", TOKEN),
    (TOKEN, 1),
    ("devices", TOKEN),
]


def planted_in(data: bytes) -> list[str]:
    return [secret for secret in PLANTED if secret.encode() in data]


def below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("key", "value"), VALUES, ids=[f"{i}-{key[:20]}" for i, (key, _) in enumerate(VALUES)])
def test_a_config_with_a_secret_is_refused_without_repeating_it(tmp_path: Path, key: str, value: Any) -> None:
    config = write_smoke_config(tmp_path, tmp_path / "t", tmp_path / "s")
    result = CliRunner().invoke(app, ["run", str(config), "--set", f"{key}={json.dumps(value)}"])
    assert result.exit_code == 2, result.output
    assert planted_in(result.output.encode()) == []
    assert "HF_TOKEN" in result.output
    assert not (tmp_path / "runs").exists()


def test_a_config_file_with_a_secret_is_refused_by_its_key(tmp_path: Path) -> None:
    config = write_smoke_config(tmp_path, tmp_path / "t", tmp_path / "s")
    values = yaml.safe_load(config.read_text(encoding="utf-8")) | {"teacher": {"model": f"https://u:{PASSWORD}@h/m"}}
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    result = CliRunner().invoke(app, ["run", str(config)])
    assert result.exit_code == 2
    assert "`teacher.model` holds what looks like a password" in result.output
    assert planted_in(result.output.encode()) == []


@pytest.mark.parametrize("override", [f"x.{PASSWORD}: [", f"teacher.model={{{PASSWORD}", f"seed.deep={PASSWORD}"])
def test_an_override_that_is_wrong_is_named_by_its_key(tmp_path: Path, override: str) -> None:
    config = write_smoke_config(tmp_path, tmp_path / "t", tmp_path / "s")
    result = CliRunner().invoke(app, ["run", str(config), "--set", override])
    assert result.exit_code == 2
    key, separator, _ = override.partition("=")
    if separator:
        assert f"--set {key}=…" in result.output
        assert planted_in(result.output.encode()) == []


def test_pydantics_own_errors_hold_no_values(tmp_path: Path) -> None:
    values = make_config(tmp_path).model_dump(mode="json") | {"seed": PASSWORD}
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate(values)
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    ["Qwen/Qwen2.5-Math-7B", "org/hf_tiny_model", "0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c", "package://a/b@1.gguf"],
)
def test_names_and_commits_are_no_secrets(tmp_path: Path, value: str) -> None:
    assert make_config(tmp_path, teacher={"model": value, "revision": value}).teacher.revision == value


def test_no_setting_is_made_for_a_secret() -> None:
    def names(annotation: Any) -> set[str]:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            fields = annotation.model_fields
            return set(fields).union(*(names(field.annotation) for field in fields.values()))
        return set().union(*map(names, get_args(annotation)))

    found = names(RunConfig)
    assert {"kd_weight", "report_to", "path", "quantile"} <= found
    # A variable's name is no secret.
    found = {name for name in found if not name.endswith("_env")}
    assert [name for name in found if re.search(r"api|password|secret|credential|token(?!s)|(^|_)key($|_)", name)] == []


def test_a_recorded_config_is_held_to_the_same(tmp_path: Path) -> None:
    values = make_config(tmp_path).model_dump(mode="json")
    values["teacher"]["model"] = f"https://u:{PASSWORD}@h/m"
    with pytest.raises(ConfigError, match=r"teacher\.model") as caught:
        parse_config(values, origin="run.json")
    assert PASSWORD not in str(caught.value)


@pytest.mark.e2e
@pytest.mark.usefixtures("prefect_api")
def test_secrets_of_the_environment_are_in_no_file_log_or_output(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, prefect_home: Path
) -> None:
    changes: dict[str, Any] = {"warmup": None, "rounds": 1}
    guard = {"action": "stop", "max_policy_kl": 1e-12, "every_steps": 1}
    changes["train"] = {"epochs_per_round": 2, "learning_rate": 1e-3, "gradient_checkpointing": False, "guard": guard}
    config = write_smoke_config(tmp_path, teacher_dir, student_dir, **changes)
    environment = os.environ | ENVIRONMENT

    def npd(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "flows.cli", *arguments]
        return subprocess.run(command, capture_output=True, cwd=CONFIGS.parent, env=environment, check=False)

    failed = npd("run", str(config), "--verbose")
    assert failed.returncode == 1, failed.stderr
    assert b"train.guard.action" in failed.stderr
    done = npd("run", str(config), "--verbose", "--set", "train.guard.action=warn")
    assert done.returncode == 0, done.stderr

    for output in (failed, done):
        assert planted_in(output.stdout + output.stderr) == []
    files = below(tmp_path / "runs")
    assert {"run.json", "manifest.json", "README.md", "round-0-train.log"} <= {path.name for path in files}
    # Prefect's log, states, parameters and artifacts are in its database.
    assert any(b"train.guard.action" in path.read_bytes() for path in below(prefect_home))
    for path in [*files, *below(prefect_home)]:
        assert planted_in(path.read_bytes()) == [], path
