"""`npd verify`, `trace` and `diff` as users call them, on a run that the command line made."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from flows.audit import print_difference
from flows.cli import app
from flows.terminal import Terminal
from schemas.manifest import record_bytes
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import FILTER, GENERATE, IGNORE_LABEL, TableSchema, pack_schema, score_schema
from tasks.audit.diff import FileDifference, RunDifference, StageDifference
from tests.flows.conftest import FinishedRun

RUNNER = CliRunner()


def invoke(*arguments: object) -> tuple[int, str]:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    return result.exit_code, result.output


def as_json(*arguments: object) -> tuple[int, Any]:
    code, output = invoke(*arguments, "--json")
    return code, json.loads(output)


@pytest.fixture
def copied(finished_run: FinishedRun, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run.folder, tmp_path / "copy"))


def replace(store: RunStore, key: StageKey, schema: TableSchema, column: str, row: int, value: Any) -> None:
    """Write one value into a stage's first shard, and its hash into the stage's manifest."""
    path = store.table_files(key)[0]
    table = store.read_part(path, schema)
    values = table.column(column).to_pylist()
    values[row] = value
    field = schema.columns.field(column)
    place = table.schema.get_field_index(column)
    store.write_table(path, table.set_column(place, field, pa.array(values, field.type)), schema)
    manifest = store.finished(key).model_copy(update={"outputs": store.outputs(key)})
    store.write_bytes(store.path(key, "manifest.json"), record_bytes(manifest))


def test_verify_says_what_it_covered_and_exits_0(finished_run: FinishedRun) -> None:
    code, output = invoke("verify", finished_run.folder)
    assert code == 0, output
    assert output.splitlines()[-1] == "everything holds"
    assert "packed tokens traced back to their samples" in output


def test_verify_names_the_first_broken_link_and_counts_the_others(copied: Path) -> None:
    for index in (1, 0):
        path = copied / f"round=00{index}" / "stage=filter" / "part-00000.parquet"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    code, output = invoke("verify", copied)
    assert code == 1
    lines = output.splitlines()
    assert lines[-2].startswith("first broken link: round=000/stage=filter/part-00000.parquet: its bytes are not")
    assert lines[-1] == "and 1 further broken link; --all lists them"
    code, output = invoke("verify", copied, "--all")
    assert code == 1
    assert output.splitlines()[-1].startswith("broken: round=001/stage=filter/part-00000.parquet")
    code, report = as_json("verify", copied)
    assert (code, report["holds"], len(report["breaks"])) == (1, False, 2)


def test_verify_without_a_run_is_bad_input(tmp_path: Path) -> None:
    code, output = invoke("verify", tmp_path)
    assert code == 2
    assert "no run here" in output


def first_sample(store: RunStore, keep: bool) -> dict[str, Any]:
    key = StageKey("filter", 1)
    rows: list[dict[str, Any]] = store.read_table(key, FILTER).to_pylist()
    return next(row for row in rows if row["keep"] is keep)


def test_trace_tells_a_kept_samples_life(finished_run: FinishedRun) -> None:
    store = RunStore.open(finished_run.folder)
    config = store.config
    ledger = first_sample(store, True)
    sample = ledger["sample_id"]
    code, life = as_json("trace", finished_run.folder, "--sample", sample)
    assert code == 0
    rollout = next(
        r for r in store.read_table(StageKey("generate", 1), GENERATE).to_pylist() if r["sample_id"] == sample
    )
    assert life["prompt"]["prompt_id"] == rollout["prompt_id"]
    assert life["prompt"]["messages"][0]["content"].startswith("Say ")
    assert life["sampler"]["model"] == "round=000/stage=export/model"
    assert life["sampler"]["is_still_there"] is True
    assert life["sampler"]["policy_step"] == store.finished(StageKey("train", 0)).counters["policy_step"]
    assert life["tokens"]["response_ids"] == rollout["response_ids"]
    assert (life["ledger"]["keep"], life["ledger"]["policy_lag"]) == (True, ledger["policy_lag"])
    scores = score_schema(config.score.top_k, config.score.topk_dtype)
    scored = next(r for r in store.read_table(StageKey("score", 1), scores).to_pylist() if r["sample_id"] == sample)
    assert life["scores"]["delta_ifd"] == scored["delta_ifd"]
    packs = store.read_table(StageKey("pack", 1), pack_schema(config.score.top_k, config.score.topk_dtype)).to_pylist()
    pack = packs[life["pack"]["pack"]]
    assert pack["sample_ids"][life["pack"]["sequence"]] == sample
    tokens = pack["input_ids"][life["pack"]["first_token"] : life["pack"]["last_token"] + 1]
    assert tokens == rollout["prompt_ids"] + rollout["response_ids"]
    training = life["training, round 1 · train"]
    assert len(training["optimizer_steps"]) == config.train.epochs_per_round
    assert training["export"] == "round=001/stage=export/model"
    code, output = invoke("trace", finished_run.folder, "--sample", sample)
    assert code == 0
    assert "training, round 1 · train" in output


def test_trace_says_why_a_dropped_sample_is_in_no_pack(finished_run: FinishedRun) -> None:
    dropped = first_sample(RunStore.open(finished_run.folder), False)
    code, life = as_json("trace", finished_run.folder, "--sample", dropped["sample_id"])
    assert code == 0
    assert life["pack"] == {"missing": f"not kept: {dropped['reason']}"}


def test_trace_tells_what_a_reference_is_for(finished_run: FinishedRun) -> None:
    sample = RunStore.open(finished_run.folder).read_table(StageKey("reference"), GENERATE)["sample_id"][0].as_py()
    code, life = as_json("trace", finished_run.folder, "--sample", sample)
    assert code == 0
    assert "never trained on" in life["use"]["evaluation"]


def test_trace_goes_back_from_every_token_of_a_pack(finished_run: FinishedRun) -> None:
    store = RunStore.open(finished_run.folder)
    config = store.config
    schema = pack_schema(config.score.top_k, config.score.topk_dtype)
    pack = store.read_table(StageKey("pack", 0), schema).to_pylist()[0]
    labelled = [place for place, label in enumerate(pack["labels"]) if label != IGNORE_LABEL]
    boundary = pack["seq_lengths"][0]
    for token in (0, labelled[0], labelled[-1], boundary - 1, boundary):
        code, life = as_json("trace", finished_run.folder, "--round", 0, "--pack", 0, "--token", token)
        assert code == 0
        told, sample = life["token"], life["sample"]["sample_id"]
        sequence = int(np.searchsorted(np.cumsum(pack["seq_lengths"]), token, side="right"))
        assert sample == pack["sample_ids"][sequence]
        assert told["id"] == pack["input_ids"][token]
        assert told["label"] == pack["labels"][token]
        assert told["has_loss"] is (token in labelled)
        assert told["place"].startswith("response" if token in labelled else "prompt")
        if token in labelled:
            assert told["sampled_logprob"] == pytest.approx(pack["sampled_logprobs"][token])
            assert [target["id"] for target in told["teacher_top_k"]] == pack["teacher_topk_ids"][token]
            assert 0 < sum(target["probability"] for target in told["teacher_top_k"]) < 1.01
            assert told["text"] is not None


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sample", "r000-nothing-000"], "this run has no such sample; close to it: r000-"),
        (["--round", "7", "--pack", "0", "--token", "0"], "this run trains in 0, 1"),
        (["--round", "0", "--pack", "99", "--token", "0"], "`round 0 · pack` has packs 0 to"),
        (["--round", "0", "--pack", "0", "--token", "99999"], "pack 0 of `round 0 · pack` has tokens 0 to"),
        (["--round", "0", "--pack", "0", "--token", "-1"], "has tokens 0 to"),
        (["--round", "0", "--pack", "0"], "give either --sample ID, or --round R --pack P --token T"),
        ([], "give either --sample ID"),
    ],
)
def test_trace_of_what_is_not_there_is_bad_input(
    finished_run: FinishedRun, arguments: list[str], expected: str
) -> None:
    code, output = invoke("trace", finished_run.folder, *arguments)
    assert code == 2
    assert expected in output


def test_text_of_a_model_cannot_steer_the_terminal(copied: Path) -> None:
    store, key = RunStore.open(copied), StageKey("generate", 1)
    sample = store.read_table(key, GENERATE)["sample_id"][0].as_py()
    replace(store, key, GENERATE, "response", 0, "[red]\x1b[2Jgone\x07\n[/nothing]")
    code, output = invoke("trace", copied, "--sample", sample)
    assert code == 0
    assert r"[red]\x1b[2Jgone\x07\n[/nothing]" in output
    assert "\x1b" not in output
    assert "\x1b" not in invoke("trace", copied, "--sample", sample, "--json")[1]


def test_a_run_is_equal_to_its_copy(finished_run: FinishedRun, copied: Path) -> None:
    code, output = invoke("diff", finished_run.folder, copied)
    assert code == 0
    assert output.splitlines()[-1] == "the runs are equal"
    assert "settings: equal" in output


def test_diff_names_settings_packages_stages_and_the_first_row(finished_run: FinishedRun, copied: Path) -> None:
    store = RunStore.open(copied)
    config = store.config
    ledger = store.read_table(StageKey("filter", 1), FILTER).to_pylist()
    replace(store, StageKey("filter", 1), FILTER, "policy_lag", 2, ledger[2]["policy_lag"] + 1)
    shutil.rmtree(store.path(StageKey("evaluate", 1)))
    score = store.finished(StageKey("score", 0))
    other = score.model_copy(update={"packages": score.packages | {"torch": "0.1"}})
    store.write_bytes(store.path(StageKey("score", 0), "manifest.json"), record_bytes(other))
    train = config.train.model_copy(update={"kd_weight": 0.5, "save_every_steps": 7})
    store.record_config(config.model_copy(update={"train": train}))

    code, found = as_json("diff", finished_run.folder, copied)
    assert (code, found["equal"]) == (1, False)
    settings = {setting["key"]: setting for setting in found["settings"]}
    assert settings["train.kd_weight"] == {"key": "train.kd_weight", "left": 0.9, "right": 0.5, "placement": False}
    assert settings["train.save_every_steps"]["placement"] is True
    assert list(found["packages"]) == ["torch"]
    assert "0.1" in found["packages"]["torch"][1]
    states = {stage["stage"]: stage for stage in found["stages"]}
    assert {name for name, stage in states.items() if stage["state"] != "equal"} == {
        "round 1 · filter",
        "round 1 · evaluate",
    }
    assert states["round 1 · evaluate"]["state"] == "left only"
    (file,) = states["round 1 · filter"]["files"]
    assert file["path"] == "round=001/stage=filter/part-00000.parquet"
    assert file["first"] == "row 2, column policy_lag"
    code, output = invoke("diff", finished_run.folder, copied)
    assert code == 1
    assert "train.kd_weight: 0.9 | 0.5" in output
    assert "first at row 2, column policy_lag" in output


def test_a_difference_that_is_of_no_row_is_not_told_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    side = {"rows": 1, "bytes": 9, "sha256": "0" * 64}
    files = [FileDifference("a", side, side, first) for first in ("row 2, column x", "their columns have other types")]
    stage = StageDifference("prompts", "different", (1, 1), (9, 9), files)
    print_difference(Terminal(), "left", "right", RunDifference([], {}, [stage]))
    output = capsys.readouterr().out
    assert "; first at row 2, column x" in output
    assert "; their columns have other types" in output


def test_settings_that_say_only_where_make_no_difference(finished_run: FinishedRun, copied: Path) -> None:
    store = RunStore.open(copied)
    train = store.config.train.model_copy(update={"save_every_steps": 7})
    store.record_config(store.config.model_copy(update={"train": train}))
    code, output = invoke("diff", finished_run.folder, copied)
    assert code == 0
    assert "train.save_every_steps: " in output
