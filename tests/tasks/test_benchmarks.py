"""Benchmarks by name: what happens without `lm-eval`, and a real task of one's own with it."""

import errno
import io
import json
import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from schemas.config import RunConfig, load_config
from schemas.errors import ConfigError
from schemas.run_store import RunStore
from schemas.tables import EVALUATE_METRICS, METRICS_FILE
from tasks.evaluate import source_fingerprints
from tasks.evaluate.benchmarks import metrics_of_results
from tasks.evaluate.means import Mean
from tasks.graph import BASELINE, loop
from tasks.stage import execute
from tests.run_fixtures import make_config
from tests.test_loop import ROOT, smoke_config

INSTALLED = find_spec("lm_eval") is not None


def test_metrics_are_taken_from_what_lm_eval_returns() -> None:
    results = {
        "sums": {"alias": "sums", "sample_len": 9, "acc,none": 0.5, "acc_stderr,none": 0.25, "bleu,none": math.nan},
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": 0.75, "exact_match_stderr,strict-match": "N/A"},
        "group": {"alias": "group", "acc,none": 0.125, "acc_stderr,none": math.nan},
    }
    counts = {"sums": {"original": 90, "effective": 5}, "gsm8k": {"original": 8, "effective": 8}}
    found = metrics_of_results({"results": results, "n-samples": counts})
    assert math.isnan(found.pop("lm_eval/sums/bleu").value)
    assert found == {
        "lm_eval/sums/acc": Mean(0.5, 0.25, 5),
        "lm_eval/gsm8k/exact_match,strict-match": Mean(0.75, 0.0, 8),
        "lm_eval/group/acc": Mean(0.125, 0.0, 0),
    }


def test_a_folder_of_tasks_is_found_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    text = (ROOT / "configs" / "smoke.yaml").read_text(encoding="utf-8").replace("prompts/everyday", "everyday")
    path = tmp_path / "a.yaml"
    path.write_text(text + "evaluate: {lm_eval: {tasks: [own], include_path: own}}\n", encoding="utf-8")
    config = load_config(path)
    settings = config.evaluate.lm_eval
    assert settings is not None
    assert settings.include_path == str(tmp_path / "own")
    before = source_fingerprints(config)
    (tmp_path / "own" / "task.yaml").write_text("task: own", encoding="utf-8")
    assert source_fingerprints(config) != before


def own_tasks(folder: Path) -> RunConfig:
    return make_config(folder.parent, evaluate={"lm_eval": {"tasks": ["own"], "include_path": str(folder)}})


def test_a_folder_of_tasks_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"evaluate\.lm_eval\.include_path: {tmp_path}/own: .*No such file"):
        source_fingerprints(own_tasks(tmp_path / "own"))


@pytest.mark.parametrize(("call", "victim"), [("open", "own/task.yaml"), ("scandir", "own/deeper")])
def test_a_folder_of_tasks_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, victim: str
) -> None:
    folder = tmp_path / "own"
    (folder / "deeper").mkdir(parents=True)
    (folder / "task.yaml").write_text("task: own", encoding="utf-8")
    module = io if call == "open" else os
    read = getattr(module, call)

    # Whoever runs the tests may read everything.
    def refusing(path: Any, *arguments: Any, **others: Any) -> Any:
        if str(path) == str(tmp_path / victim):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *arguments, **others)

    monkeypatch.setattr(module, call, refusing)
    with pytest.raises(ConfigError, match=rf"include_path: {folder}: cannot be read: .*{victim}"):
        source_fingerprints(own_tasks(folder))


@pytest.mark.skipif(not INSTALLED, reason="lm-eval is an option with two dozen packages of its own")
def test_a_task_of_ones_own_is_run_on_every_model(tmp_path: Path, teacher_dir: Path, student_dir: Path) -> None:
    rows = [{"question": f"{n} + 1 =", "choices": [f"{n + 1}", f"{n + 2}"], "label": n % 2} for n in range(6)]
    data = tmp_path / "sums.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "sums.yaml").write_text(
        f"""
task: own_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
        encoding="utf-8",
    )
    settings = f"evaluate.lm_eval={{tasks: [own_sums], include_path: {tmp_path}, limit: 5}}"
    config = smoke_config(tmp_path / "runs", teacher_dir, student_dir, "evaluate.generate=false", settings)
    store = RunStore.create(config)
    for key in loop(config)[:4]:
        execute(store, config, key)
    table = store.read_part(store.path(BASELINE, METRICS_FILE), EVALUATE_METRICS).to_pylist()
    found = {row["model"]: row for row in table if row["metric"] == "lm_eval/own_sums/acc"}
    assert set(found) == {"teacher", "start"}
    for row in found.values():
        assert row["n"] == 5
        assert row["value"] * 5 == pytest.approx(round(row["value"] * 5))
        assert row["stderr"] > 0 or row["value"] in (0, 1)
