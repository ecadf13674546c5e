"""A whole comparison of tiny models: made, resumed, and changed in one method."""

import json
import os
from pathlib import Path
from typing import Any

import httpx
import pyarrow.compute as pc
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.compare import npd_compare
from flows.comparison_progress import RunsDisplay, listening_to_runs
from flows.terminal import Terminal
from schemas.comparison_tables import COMPARISON, COMPARISON_RUNS
from schemas.config import continuation_config, load_comparison, method_config
from schemas.errors import ConfigError, StageError
from schemas.rl_tables import RL_ROLLOUTS
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.table_files import read_parquet
from schemas.tables import PROMPTS
from tasks.audit.verify import verify
from tasks.rl.graph import RL
from tests.tiny_models import make_model, save_model

METHODS: dict[str, Any] = {
    "npd": {"role": "npd", "title": "NPD"},
    "sft": {
        "role": "baseline",
        "rate_of": "npd",
        "seeds": 1,
        "set": {"generate.policy": "answers", "train.kd_weight": 0.0},
    },
    "on-policy": {"role": "baseline", "trainer": "on_policy", "rate_of": "npd", "seeds": 1},
}

CONTINUED: dict[str, Any] = {
    "methods": ["npd", "sft"],
    "seeds": 1,
    "grpo": {
        "steps": 2,
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_new_tokens": 6,
        "precision": "fp32",
        "gradient_checkpointing": False,
    },
}


def write_comparison(folder: Path, **changes: Any) -> Path:
    """Write models, a run's config and a comparison of METHODS; ``changes`` go to its top level."""
    if not (folder / "teacher").is_dir():
        # On-policy training wants vocabularies of one size.
        save_model(folder / "teacher", make_model(seed=1, layers=3))
        save_model(folder / "student", make_model(seed=2, layers=1))
        rows = [{"prompt": f"Say {n} twice.", "answer": f"{n} {n}"} for n in range(18)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    training = {"precision": "fp32", "gradient_checkpointing": False}
    run = {
        "name": "run",
        "teacher": {"model": "teacher"},
        "student": {"model": "student"},
        "prompts": {"sources": [{"type": "jsonl", "path": "prompts.jsonl", "verifier": "exact"}], "held_out": 6},
        "warmup": {**training, "prompts": 4},
        "generate": {"max_new_tokens": 6},
        "pack": {"max_tokens": 128},
        "filter": {"min_delta_ifd": None, "max_delta_ifd": None},
        "train": {**training, "steps_per_round": 2, "guard": {"every_steps": 2}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    values = {
        "name": "tiny",
        "root": str(folder / "runs"),
        "run": "run.yaml",
        "set": {"rounds": 1},
        "seeds": [0, 1],
        "learning_rates": [1e-3, 1e-4],
        "validation": 0.5,
        "methods": METHODS,
    }
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump(values | changes), encoding="utf-8")
    return path


def made_runs(config: Path, api: str, capsys: pytest.CaptureFixture[str], **options: Any) -> list[str]:
    """Run a comparison; return which of its runs were made, not found done."""
    capsys.readouterr()
    with temporary_settings({PREFECT_API_URL: api}), RunsDisplay(Terminal()) as display, listening_to_runs(display):
        npd_compare(str(config), **options)
    lines = [line for line in capsys.readouterr().out.splitlines() if ": done in " in line]
    return [line.partition(":")[0] for line in lines]


@pytest.mark.e2e
def test_a_comparison_is_made_resumed_and_changed(
    tmp_path: Path, shared_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Where training diverges, another rate is taken.
    config = write_comparison(tmp_path, rl=CONTINUED, learning_rates=[1e-3, 1e-4, 1e35])
    made = made_runs(config, shared_server, capsys)
    folder = tmp_path / "runs" / "tiny"
    table = read_parquet(folder / "comparison.parquet", COMPARISON, "comparison")
    rows = {row["method"]: row for row in table.to_pylist()}
    rate = rows["npd"]["learning_rate"]
    assert sorted(made) == sorted(
        [
            "base",
            "npd · lr 0.001 · seed 0",
            "npd · lr 0.0001 · seed 0",
            f"npd · lr {rate:g} · seed 1",
            f"sft · lr {rate:g} · seed 0",
            f"on-policy · lr {rate:g} · seed 0",
            "npd · GRPO · seed 0",
            "sft · GRPO · seed 0",
        ]
    )
    assert list(rows) == ["teacher", "start", "warm-up", "npd", "on-policy", "sft"]
    for name in METHODS:
        assert rows[name]["steps"] == 2, name
        assert rows[name]["learning_rate"] == rate, name
        assert rows[name]["test_prompts"] == 3, name
        assert rows[name]["seconds"] > 0, name
    assert rows["npd"]["policy_kl"] is not None
    assert rows["sft"]["policy_kl"] is rows["on-policy"]["policy_kl"] is None
    assert rows["sft"]["generated_tokens"] == 0
    assert min(rows["npd"]["generated_tokens"], rows["on-policy"]["generated_tokens"]) > 0
    runs = read_parquet(folder / "comparison_runs.parquet", COMPARISON_RUNS, "runs")
    assert runs.num_rows == 5
    continued = [(r["method"], r["seed"], r["chosen"]) for r in runs.to_pylist() if r["rl_accuracy"] is not None]
    assert continued == [("npd", 0, True), ("sft", 0, True)]
    assert [name for name, row in rows.items() if row["rl_accuracy"] is not None] == ["npd", "sft"]
    assert "Accuracy after RL" in (folder / "report.html").read_text(encoding="utf-8")
    # What RL learns from is no held-out prompt, and it starts from the method's own student.
    learned = RunStore(folder / "sft" / "rl" / "seed-0")
    rollouts = read_parquet(next(learned.path(RL, "rollouts").glob("*.parquet")), RL_ROLLOUTS, "rollouts")
    prompts = learned.read_table(StageKey("prompts"), PROMPTS)
    train = prompts.filter(pc.equal(prompts["split"], "train")).column("prompt_id").to_pylist()
    assert set(rollouts.column("prompt_id").to_pylist()) <= set(train)
    assert learned.finished(RL).inputs == learned.finished(StageKey("prompts")).outputs
    assert (folder / "comparison.md").read_text(encoding="utf-8").startswith("# tiny")
    # Prefect's UI shows the report's figures, too.
    auth = httpx.BasicAuth(*os.environ["PREFECT_API_AUTH_STRING"].split(":"))
    wanted = {"artifacts": {"key": {"like_": "tiny-%"}}}
    found = httpx.post(f"{shared_server}/artifacts/filter", json=wanted, auth=auth).json()
    images = {artifact["key"] for artifact in found if artifact["type"] == "image"}
    assert images == {f"tiny-figure-{key}" for key in ("time", "bars-accuracy", "bars-rl", "bars-kl")}

    # One run's samples are taken over by others that would draw the same: their manifests are then the same.
    stores = [RunStore(folder / "npd" / f"lr={lr}" / "seed-0") for lr in ("0.001", "0.0001")]
    for key in (StageKey("reference"), StageKey("generate", 0), StageKey("score", 0)):
        assert stores[0].finished(key) == stores[1].finished(key)
    for path in sorted(folder.glob("*/lr=*/seed-*")):
        report = verify(RunStore(path))
        assert not report.breaks, (path, report.breaks)
    assert {RunStore(path).record().run_id for path in folder.glob("*/lr=*/seed-*")} == {  # type: ignore[union-attr]
        RunStore(folder / "base").record().run_id  # type: ignore[union-attr]
    }

    # A run that fails leaves the others alone, and is named with its log.
    sft = METHODS["sft"]
    broken = {**METHODS, "sft": {**sft, "set": {"filter.min_delta_ifd": 1e6, "filter.max_delta_ifd": None}}}
    config = write_comparison(tmp_path, methods=broken, rl=CONTINUED)
    with pytest.raises(StageError, match=r"(?s)1 run.* failed.*sft · lr .*none of 12 samples is kept.*run\.log"):
        made_runs(config, shared_server, capsys)
    assert ": done in " not in capsys.readouterr().out
    left = read_parquet(folder / "comparison.parquet", COMPARISON, "comparison").column("method").to_pylist()
    assert left == ["teacher", "start", "warm-up", "npd", "on-policy"]

    changed = {**METHODS, "sft": {**sft, "set": {**sft["set"], "train.weight_decay": 0.1}}}
    config = write_comparison(tmp_path, methods=changed, rl=CONTINUED)
    # What follows from the changed run follows again.
    assert made_runs(config, shared_server, capsys, only=["sft"]) == [
        f"sft · lr {rate:g} · seed 0",
        "sft · GRPO · seed 0",
    ]
    # A method that was left out this time is still in the table, with all that its runs came to.
    table = read_parquet(folder / "comparison.parquet", COMPARISON, "comparison")
    again = {row["method"]: row for row in table.to_pylist()}
    assert list(again) == ["teacher", "start", "warm-up", "npd", "on-policy", "sft"]
    assert again["on-policy"] == rows["on-policy"]
    assert again["npd"]["rl_accuracy"] == rows["npd"]["rl_accuracy"]

    # What takes its measure from NPD does not run without one.
    broken = {**changed, "npd": {**METHODS["npd"], "set": {"filter.min_delta_ifd": 1e6, "filter.max_delta_ifd": None}}}
    config = write_comparison(tmp_path, methods=broken)
    with pytest.raises(StageError, match=r"(?s)3 run.* failed.*  on-policy: waits for `npd`") as failed:
        made_runs(config, shared_server, capsys)
    assert "on-policy · lr" not in str(failed.value)

    # A method that diverges at every rate has none.
    config = write_comparison(tmp_path, methods={"npd": METHODS["npd"]}, learning_rates=[1e35])
    with pytest.raises(StageError, match=r"(?s)1 run.* failed.*  npd · lr 1e\+35 · seed 0: .* is not finite"):
        made_runs(config, shared_server, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metods": {}}, "metods: unknown key; did you mean `methods`"),
        ({"root": "s3://bucket/runs"}, "root: .*lies in a folder"),
        ({"set": {"train": {"weight_decay": 0.1}}}, "train: a mapping would replace the whole section"),
        ({"methods": {"npd": {"role": "npd", "titel": "x"}}}, "titel: unknown key; did you mean `title`"),
        ({"methods": {"sft": {"role": "baseline"}}}, "one of `methods` has `role: npd`"),
        ({"methods": {"base": {"role": "npd"}}}, "methods.base"),
        ({"methods": METHODS | {"sft\n": {"role": "baseline"}}}, "a method's name is a folder's"),
        ({"methods": METHODS | {"SFT": {"role": "baseline"}}}, r"methods\.sft`: .* would be that of `SFT`"),
        ({"methods": {"npd": {"role": "npd", "rate_of": "sft"}}}, "methods.npd.rate_of"),
        ({"methods": {"npd": {"role": "npd", "set": {"train.kd_wieght": 1}}}}, "did you mean `kd_weight`"),
        ({"methods": {"npd": {"role": "npd", "set": {"train.learning_rate": "fast"}}}}, "learning_rate: 'fast' is no"),
        ({"rl": {"methods": ["ndp"]}}, "`rl.methods`: ndp: the methods are npd, on-policy, sft"),
        ({"rl": {"methods": ["npd"], "grpo": {"step": 3}}}, "did you mean `steps`"),
        ({"set": {"evaluate.generate": False}}, "evaluate.generate: true"),
        ({"set": {"train.steps_per_round": None}}, "needs `train.steps_per_round`"),
        ({"seeds": [1, 1]}, "each value once"),
        ({"run": "nowhere.yaml"}, "no such config file"),
    ],
)
def test_a_wrong_comparison_names_its_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_comparison(write_comparison(tmp_path, **changes))


def test_paths_in_a_methods_settings_start_at_the_comparisons_file(tmp_path: Path) -> None:
    path = write_comparison(tmp_path, methods=METHODS | {"other": {"role": "ablation", "set": {"teacher.model": "it"}}})
    save_model(tmp_path / "it", make_model(seed=3, layers=3))
    comparison, base = load_comparison(path)
    config = method_config(comparison, base, "other", folder=tmp_path, rate=1e-3, seed=0, student="/student")
    assert (config.teacher.model, config.student.model) == (str(tmp_path / "it"), "/student")


def test_students_after_rl_answer_as_those_before_unless_it_is_said(tmp_path: Path) -> None:
    sampled = {"evaluate.temperature": 0.7, "evaluate.samples_per_prompt": 3, "generate.max_new_tokens": 5}
    for own, expected in ((None, (0.7, 3, 5)), ({"temperature": 0.2}, (0.2, 1, None))):
        path = write_comparison(tmp_path, set={"rounds": 1} | sampled, rl=CONTINUED | {"evaluate": own})
        comparison, base = load_comparison(path)
        found = continuation_config(comparison, base, "npd", seed=0, run="run").evaluate
        assert (found.temperature, found.samples_per_prompt, found.max_new_tokens) == expected


def test_only_brings_what_a_method_needs(tmp_path: Path) -> None:
    comparison, _ = load_comparison(write_comparison(tmp_path))
    assert comparison.methods_for(["sft"]) == ["npd", "sft"]
    assert comparison.methods_for(["npd"]) == ["npd"]
    assert comparison.methods_for(None) == list(comparison.methods)
    with pytest.raises(ConfigError, match="--only sgd: the methods are"):
        comparison.methods_for(["sgd"])
