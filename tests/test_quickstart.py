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
from tasks.language_model.sources import teacher_model

ROOT = Path(__file__).parents[1]
SHORTER = [
    "prompts.limit=26",
    "prompts.held_out=6",
    "warmup.epochs=1",
    "warmup.max_new_tokens=16",
    "rounds=1",
    "generate.max_new_tokens=16",
    "generate.batch_size=20",
]


def replied(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    """Return what a model says to a prompt, greedily."""
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(chat, return_tensors="pt", add_special_tokens=False)["input_ids"]
    reply: str = tokenizer.decode(model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :])
    return reply


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
    assert replied(student, tokenizer, "Name three fruits.", 8)

    # The teacher is a GGUF file inside an installed package: its weights came out of it as transformers reads them.
    place = teacher_model(store, config).path
    teacher: Any = AutoModelForCausalLM.from_pretrained(place)
    assert teacher.config.num_hidden_layers == 30
    reply = replied(teacher, AutoTokenizer.from_pretrained(place), "What is the capital of France?", 12)
    assert "Paris" in reply
