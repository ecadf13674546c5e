"""Packages that a config asks for and that are not installed."""

import sys
from pathlib import Path
from typing import Any

import pytest

from schemas.errors import ModelError, NPDError
from schemas.tables import PROMPTS as PROMPTS_TABLE
from tasks.graph import MODELS, PROMPTS
from tasks.packages import check_packages
from tasks.stage import execute
from tests.run_fixtures import finish_stage, make_config, make_store, prompts_table


@pytest.mark.parametrize(
    ("module", "sections", "message"),
    [
        (
            "vllm",
            {"generate": {"engine": "vllm"}},
            r"`generate\.engine: vllm` needs vLLM, .*`pip install -e '\.\[vllm\]'",
        ),
        ("ray", {"ray": {"actors": 2}}, r"`ray` needs Ray.*-e '\.\[ray\]'"),
        ("peft", {"train": {"lora": {}}}, r"train\.lora: needs the extra `lora`"),
        ("liger_kernel", {"warmup": {"liger_kernels": True}}, "liger_kernels: needs the extra `liger`"),
        ("lm_eval", {"evaluate": {"lm_eval": {"tasks": ["x"]}}}, r"evaluate\.lm_eval: .*\[lm-eval\]"),
    ],
)
def test_what_is_missing_is_told_of_before_models_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, sections: dict[str, Any], message: str
) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, module, missing)
    # Neither the folder of its teacher is there, nor a Hub that could be asked.
    config = make_config(tmp_path, **sections)
    store = make_store(tmp_path, config)
    finish_stage(store, PROMPTS, PROMPTS_TABLE, [prompts_table({"one": "train", "two": "held_out"})])
    with pytest.raises(NPDError, match=message):
        execute(store, config, MODELS)


def test_an_engine_that_runs_on_other_machines_only_is_not_needed_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing: Any = None
    monkeypatch.setitem(sys.modules, "vllm", missing)
    sections: dict[str, Any] = {"generate": {"engine": "vllm"}, "ray": {"actors": 2}}
    check_packages(make_config(tmp_path, **sections, evaluate={"generate": False}))
    with pytest.raises(ModelError, match="vLLM"):
        check_packages(make_config(tmp_path, **sections))
