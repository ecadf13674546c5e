"""Every benchmark runs at a tiny size and prints its table."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import main

ROOT = Path(__file__).parents[2]
OF_STAGES = ("packing", "storage", "growth", "million")
OF_WHOLE_RUNS = ("overlap", "overhead", "simulate")
OF_MODELS = ("end_to_end", "train_step", "loss", "scoring", "utilisation")


def run_quickly(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    module = importlib.import_module(f"benchmarks.{name}")
    main(module.parser(), module.measure, ["--quick", "--json", str(folder / "rows.json"), *arguments])
    result: dict[str, Any] = json.loads((folder / "rows.json").read_text())
    return result


def in_children(test: Any) -> Any:
    """Mark a test whose work is measured in processes of its own."""
    return pytest.mark.usefixtures("forkserver")(pytest.mark.xdist_group("children")(test))


def check(result: dict[str, Any], printed: str, name: str) -> None:
    assert result["benchmark"] == name
    assert result["machine"]["packages"]["pyarrow"] in printed
    assert "the numbers mean nothing" in printed
    for row in result["rows"]:
        assert f"| {row['what']} | " in printed
        assert row["min"] <= row["median"] <= row["max"]
        assert row["verdict"] == "no bar" if row["bar"] is None else row["verdict"] in ("met", "missed")


@in_children
@pytest.mark.parametrize("name", OF_STAGES)
def test_a_benchmark_of_stages(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_quickly(name, tmp_path)
    check(result, capsys.readouterr().out, name)
    assert name == "storage" or any(row["bar"] is not None for row in result["rows"])


@pytest.mark.e2e
@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("name", OF_WHOLE_RUNS)
def test_a_benchmark_of_whole_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_quickly(name, tmp_path)
    check(result, capsys.readouterr().out, name)
    values = {row["what"]: row["median"] for row in result["rows"]}
    if name == "overhead":
        assert values["a round, from the manifests"] >= values["of it, in stages"] > 0
    elif name == "simulate":
        assert values["round 0, wall-clock: measured"] > values["generate, time of a round: measured"] > 0
        # What a row takes on disk is known from two sizes, however small.
        assert values["generate, size of a round: off by"] < 15
    else:
        assert values["saved"] == pytest.approx(values["rounds without overlap"] - values["rounds with overlap"])


@pytest.mark.parametrize("name", [*OF_STAGES, *OF_WHOLE_RUNS, *OF_MODELS])
def test_a_benchmark_says_how_to_use_it(name: str) -> None:
    text = importlib.import_module(f"benchmarks.{name}").parser().format_help()
    assert f"python -m benchmarks.{name}" in text
    assert "--repeats" in text
    assert f"python -m benchmarks.{name}" in (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")


def test_a_benchmark_is_a_command() -> None:
    command = [sys.executable, "-m", "benchmarks.packing", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python -m benchmarks.packing" in done.stdout
