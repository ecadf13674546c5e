import subprocess
import sys

import pytest

from tests.flows.conftest import FinishedRun

HEAVY = ("torch", "transformers", "vllm", "trl", "datasets")


def loaded_by(module: str, *names: str) -> str:
    code = f"import sys, {module}; print(sorted(set({names!r}) & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["flows.npd_round", "flows.npd_stage", "flows.rl"])
def test_flows_load_no_model_libraries(module: str) -> None:
    assert loaded_by(module, *HEAVY) == "[]"


@pytest.mark.parametrize(
    "module", ["flows.cli", "flows.states", "flows.summary", "flows.display", "flows.inspection", "flows.rl_summary"]
)
def test_commands_that_only_look_start_without_prefect(module: str) -> None:
    assert loaded_by(module, *HEAVY, "prefect") == "[]"


def test_a_whole_run_loads_no_models_into_the_flows_process(finished_run: FinishedRun) -> None:
    assert finished_run.heavy == []
