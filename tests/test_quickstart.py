"""The quickstart as a newcomer runs it, on real weights, cut short."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from tasks.graph import loop

ROOT = Path(__file__).parents[1]
SHORTER = [
    "prompts.limit=28",
    "prompts.held_out=8",
    "warmup.epochs=1",
    "warmup.max_new_tokens=16",
    "rounds=1",
    "generate.max_new_tokens=16",
    "generate.batch_size=20",
]


@pytest.mark.e2e
@pytest.mark.usefixtures("prefect_api")
# Slow processors take many times as long as quick ones.
@pytest.mark.timeout(1800)
def test_a_real_student_learns_from_a_real_teacher(tmp_path: Path) -> None:
    settings = [f"root={tmp_path}", *SHORTER]
    command = [str(Path(sys.executable).with_name("npd")), "run", str(ROOT / "configs" / "quickstart.yaml")]
    command += [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr

    store = RunStore.open(tmp_path / "quickstart")
    config = store.config
    manifests = [store.finished(key) for key in loop(config)]
    kl = {}
    for index in (WARMUP, 0):
        rows = pq.read_table(store.path(StageKey("evaluate", index), "metrics.parquet")).to_pylist()
        kl[index] = {row["metric"]: row["value"] for row in rows}["kl_teacher_student"]
    assert kl[0] < kl[WARMUP] - 0.05
    # The table a newcomer sees says so, what was dropped, and where the files are.
    for text in ("warm-up", "round 0 (1 of 1)", f"{kl[WARMUP]:.4f}", f"{kl[0]:.4f}", "kept", "dropped", "student"):
        assert text in done.stdout
    assert max(manifest.counters["peak_memory_bytes"] for manifest in manifests) < 6 * 2**30

    folder = store.path(StageKey("export", 0), "model")
    assert (folder / "README.md").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert student.config.num_hidden_layers == 12
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name three fruits."}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(chat, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert student.generate(ids, max_new_tokens=8, do_sample=False).shape[1] > ids.shape[1]
