import subprocess
import sys

from tests.flows.conftest import FinishedRun

HEAVY = ("torch", "transformers", "vllm", "trl", "datasets")


def first_to_load(modules: list[str], *names: str) -> str:
    """Import ``modules`` one after another in a new process; return the first after which one of ``names`` is there."""
    code = f"""
import importlib, sys
for module in {modules!r}:
    importlib.import_module(module)
    if found := sorted(set({names!r}) & set(sys.modules)):
        print(module, *found)
        break
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_flows_load_no_model_libraries() -> None:
    assert first_to_load(["flows.npd_round", "flows.npd_stage", "flows.rl"], *HEAVY) == ""


def test_commands_that_only_look_start_without_prefect() -> None:
    modules = ["flows.cli", "flows.states", "flows.summary", "flows.display", "flows.inspection", "flows.rl_summary"]
    assert first_to_load(modules, *HEAVY, "prefect") == ""


def test_a_whole_run_loads_no_models_into_the_flows_process(finished_run: FinishedRun) -> None:
    assert finished_run.heavy == []
