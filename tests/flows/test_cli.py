import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from schemas.config import fields_markdown
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from tasks.graph import loop
from tests.flows.conftest import CONFIGS, FinishedRun, write_smoke_config
from tests.report_rl_runs import synthetic_rl_run
from tests.tasks.rl_runs import checked_prompts, rl_config, run_rl, source_store
from tests.tiny_models import make_model, make_tokenizer, save_model

RUNNER = CliRunner()
COMMAND = [sys.executable, "-m", "flows.cli"]


def invoke(*arguments: str) -> tuple[int, str]:
    """Call the command line in this process; return its exit code and what it printed to stdout and stderr."""
    result = RUNNER.invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code, result.output


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Call the command line in a process of its own, as users do."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=CONFIGS.parent)


@pytest.fixture
def copied(finished_run: FinishedRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run.folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["run", "join", "rl", "status", "rerun", "inspect", "config"])
def test_every_command_explains_itself_and_its_exit_codes(name: str) -> None:
    code, output = invoke(name, "--help")
    assert code == 0
    assert "Exit codes: 0 done; 1 a stage failed" in output


def test_a_config_that_is_not_there_is_bad_input() -> None:
    code, output = invoke("run", "nowhere.yaml")
    assert code == 2
    assert output.strip() == "error: nowhere.yaml: no such config file"


def test_an_unknown_key_names_the_nearest_before_anything_is_written(tmp_path: Path) -> None:
    config = write_smoke_config(tmp_path, tmp_path / "t", tmp_path / "s")
    code, output = invoke("run", str(config), "--set", "train.kd_wieght=0.5")
    assert code == 2
    assert "train.kd_wieght: unknown key; did you mean `kd_weight`?" in output
    assert not (tmp_path / "runs").exists()


def test_a_missing_prompt_file_is_told_before_anything_is_written(tmp_path: Path) -> None:
    config = write_smoke_config(tmp_path, tmp_path / "t", tmp_path / "s")
    (tmp_path / "prompts.jsonl").unlink()
    code, output = invoke("run", str(config))
    assert code == 2
    assert "prompts.jsonl" in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


def test_a_missing_model_is_told_before_anything_is_written(tmp_path: Path, student_dir: Path) -> None:
    config = write_smoke_config(tmp_path, tmp_path / "no" / "such" / "teacher", student_dir)
    code, output = invoke("run", str(config))
    assert code == 2
    assert "teacher.model" in output
    assert "no such folder" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", [["status"], ["rerun", "--stage", "score"], ["inspect"]])
def test_a_folder_without_a_run_is_named(tmp_path: Path, arguments: list[str]) -> None:
    name, *options = arguments
    code, output = invoke(name, str(tmp_path), *options)
    assert code == 2
    assert f"error: {tmp_path}: no run here" in output


def test_wrong_arguments_are_bad_input() -> None:
    assert invoke("run")[0] == 2
    assert invoke("nonsense")[0] == 2


def test_config_prints_the_reference_as_it_is() -> None:
    assert invoke("config") == (0, fields_markdown())


def test_a_run_ends_with_a_table_of_its_rounds_and_where_its_files_are(finished_run: FinishedRun) -> None:
    output = finished_run.output
    assert "round 1 · score: done in" in output
    assert "KL(teacher‖student)" in output
    assert "round 1 (2 of 2)" in output
    assert "above_max_delta_ifd" in output
    student = finished_run.folder / "round=001" / "stage=export" / "model"
    assert f"student  {student}" in output
    assert (student / "config.json").is_file()


def test_status_shows_stages_and_rounds(finished_run: FinishedRun) -> None:
    code, output = invoke("status", str(finished_run.folder))
    assert code == 0
    assert output.count(" complete ") == 19
    assert "start" in output
    assert "round 1 (2 of 2)" in output


def test_inspect_lists_stages_and_shows_one(finished_run: FinishedRun) -> None:
    code, output = invoke("inspect", str(finished_run.folder))
    assert code == 0
    assert "round=001/stage=score" in output
    code, output = invoke("inspect", str(finished_run.folder), "--stage", "filter", "--round", "1", "--rows", "2")
    assert code == 0
    assert "fingerprint" in output
    assert "max_delta_ifd  float" in output
    assert output.count("sample_id") == 1 + 2
    code, output = invoke("inspect", str(finished_run.folder), "--round", "1")
    assert code == 2
    assert "--round needs --stage" in output


def test_an_rl_run_is_shown_and_checked_as_a_distillation_run_is(tmp_path: Path, student_dir: Path) -> None:
    prompts = checked_prompts(named=True)
    source = source_store(tmp_path, student_dir, prompts)
    config = rl_config(tmp_path, source.folder, steps=1)
    store = RunStore.create(config)
    code, output = invoke("status", str(store.folder))
    assert (code, output.count(" not run ")) == (0, 4)
    run_rl(store, config)
    code, output = invoke("status", str(store.folder))
    assert (code, output.count(" complete ")) == (0, 4)
    assert "accuracy" in output
    code, output = invoke("inspect", str(store.folder), "--stage", "rl", "--rows", "1")
    assert code == 0
    assert "rollouts/part-00000.parquet" in output
    code, output = invoke("inspect", str(store.folder), "--stage", "score")
    assert (code, "there are prompts, baseline, rl, evaluate" in output) == (2, True)
    assert invoke("verify", str(store.folder))[0] == 0
    assert invoke("report", str(store.folder)) == (0, f"{store.folder}/report.html\n")
    code, output = invoke("trace", str(store.folder), "--sample", "x")
    assert (code, "an RL run, which `npd rl` runs and continues" in output) == (2, True)


@pytest.mark.e2e
@pytest.mark.usefixtures("prefect_api")
def test_rerun_takes_a_stage_of_an_rl_run(tmp_path: Path, student_dir: Path) -> None:
    source = source_store(tmp_path, student_dir, checked_prompts(named=True))
    config = rl_config(tmp_path, source.folder, steps=1)
    store = RunStore.at(config)
    run_rl(store, config)
    before = store.finished(StageKey("prompts"))
    code, output = invoke("rerun", str(store.folder), "--stage", "rl", "--dry-run")
    assert (code, "rl would run again; finished stages that read it: evaluate" in output) == (0, True)
    code, output = invoke("rerun", str(store.folder), "--stage", "prompts")
    assert code == 0, output
    assert "finished stages that read it: baseline, rl, evaluate" in output
    assert "every later stage still matches" in output
    after = store.finished(StageKey("prompts"))
    assert after.started > before.started
    assert after.outputs == before.outputs
    assert store.superseded()
    code, output = invoke("rerun", str(store.folder), "--stage", "evaluate", "--set", "grpo.learning_rate=0.5")
    assert (code, f"or the whole run: npd rl {store.folder}" in output) == (1, True)


def test_diff_takes_two_rl_runs(copied: Path, tmp_path: Path) -> None:
    stores = [synthetic_rl_run(tmp_path / str(steps), steps=steps) for steps in (4, 4, 5)]
    assert invoke("diff", *(str(store.folder) for store in stores[:2]))[0] == 0
    code, output = invoke("diff", str(stores[0].folder), str(stores[2].folder))
    assert code == 1
    assert "grpo.steps" in output
    code, output = invoke("diff", str(stores[0].folder), str(copied))
    assert (code, "an RL run and a distillation run" in output) == (2, True)


def test_rerun_says_what_would_follow(copied: Path) -> None:
    code, output = invoke("rerun", str(copied), "--stage", "train", "--round", "1", "--dry-run")
    assert code == 0
    assert "round 1 · export, round 1 · evaluate" in output
    assert RunStore(copied).manifest(StageKey("train", 1)) is not None


def test_rerun_refuses_what_lacks_its_inputs_and_keeps_what_is_there(copied: Path) -> None:
    store = RunStore(copied)
    store.supersede(StageKey("pack", 1))
    code, output = invoke("rerun", str(copied), "--stage", "train", "--round", "1")
    assert code == 1
    assert "`round 1 · pack`, which is not run" in output
    assert store.manifest(StageKey("train", 1)) is not None


@pytest.mark.e2e
@pytest.mark.usefixtures("prefect_api")
def test_rerun_outdates_what_no_longer_matches_and_run_does_nothing_twice(copied: Path) -> None:
    store, key = RunStore(copied), StageKey("filter", 0)
    kept = store.finished(key).counters["kept"]
    stage = ["rerun", str(copied), "--stage", "filter", "--round", "0", "--set"]
    code, output = invoke(*stage, "filter.max_delta_ifd.quantile=0.5")
    assert code == 0, output
    assert "out of date now: round 0 · pack, round 0 · train" in output
    assert store.finished(key).counters["kept"] < kept

    code, output = invoke(*stage, "filter.max_delta_ifd.quantile=0.9")
    assert code == 0, output
    assert "every later stage still matches" in output
    assert store.finished(key).counters["kept"] == kept

    code, output = invoke("run", str(copied))
    assert code == 0, output
    assert output.count(": up to date") == len(loop(store.config))
    assert "starting" not in output


@pytest.mark.e2e
@pytest.mark.usefixtures("prefect_api")
def test_run_repairs_a_later_round_that_was_damaged(copied: Path) -> None:
    store, key = RunStore(copied), StageKey("filter", 1)
    table = store.table_files(key)[0]
    whole = table.read_bytes()
    table.write_bytes(whole[:100])
    code, output = invoke("run", str(copied))
    assert code == 0, output
    assert table.read_bytes() == whole
    assert output.count(": up to date") == len(loop(store.config)) - 1


def test_rerun_refuses_a_setting_that_earlier_stages_read(copied: Path) -> None:
    code, output = invoke("rerun", str(copied), "--stage", "pack", "--round", "0", "--set", "generate.top_p=0.5")
    assert code == 1
    assert "reads `round 0 · generate`, which is out of date" in output
    assert RunStore(copied).config.generate.top_p == 1.0


@pytest.mark.e2e
@pytest.mark.usefixtures("prefect_api")
def test_a_model_that_cannot_be_used_fails_its_stage_with_exit_code_2(tmp_path: Path) -> None:
    bare = save_model(tmp_path / "bare", make_model(seed=3), make_tokenizer(chat_template=None))
    done = command("run", str(write_smoke_config(tmp_path, bare, bare)))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "no chat template" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "models: did not finish" in done.stdout


def test_the_makers_of_libraries_are_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM, huggingface_hub (for TRL) and Prefect ask for this variable; the latter two as they are imported."""
    for name in ("DO_NOT_TRACK", "CI"):
        monkeypatch.delenv(name, raising=False)
    program = """
import sys
import flows.cli
print(*{"huggingface_hub", "prefect", "vllm"} & sys.modules.keys())
from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY
print(HF_HUB_DISABLE_TELEMETRY)
"""
    for said, told in ((None, "True"), ("0", "False")):
        if said is not None:
            monkeypatch.setenv("DO_NOT_TRACK", said)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=CONFIGS.parent)
        assert done.stdout.split("\n") == ["", told, ""]


@pytest.mark.e2e
def test_a_prefect_server_that_is_not_there_is_told_before_anything_is_written(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    done = command("run", str(write_smoke_config(tmp_path, teacher_dir, student_dir)))
    assert done.returncode == 1
    assert done.stderr.startswith("error: Prefect's server cannot be used: Failed to reach API at http://127.0.0.1:9")
    assert "without PREFECT_API_URL" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.e2e
@pytest.mark.usefixtures("prefect_api")
def test_a_round_with_nothing_kept_stops_with_exit_code_1_and_names_the_bound(
    tmp_path: Path, teacher_dir: Path, student_dir: Path
) -> None:
    bounds = {"min_delta_ifd": 50.0, "max_delta_ifd": 60.0}
    config = write_smoke_config(tmp_path, teacher_dir, student_dir, warmup=None, filter=bounds)
    code, output = invoke("run", str(config))
    assert code == 1
    assert "\nerror: " in output
    assert "filter.min_delta_ifd" in output
    assert "Traceback" not in output
    assert "round 0 · filter: did not finish" in output


@pytest.mark.e2e
def test_ctrl_c_ends_the_run_at_once_with_130(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    config = write_smoke_config(tmp_path, teacher_dir, student_dir)
    with subprocess.Popen(
        [*COMMAND, "run", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=CONFIGS.parent,
        start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("models: starting"):
                break
        # A terminal's Ctrl-C reaches every process of the command, Prefect's temporary server too.
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, output + errors
    assert "interrupted" in errors
    assert "Traceback" not in errors
