"""What stands before a response whose prompt is left out, from the config to the score table."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from schemas.stage_key import StageKey
from schemas.tables import GENERATE, score_schema
from tasks.stage import execute
from tests.tasks.rollout_runs import make_run
from tests.tiny_models import make_tokenizer


@pytest.mark.parametrize(("context", "before"), [("header", "<|im_start|>assistant\n"), ("bos", "<|endoftext|>")])
@pytest.mark.parametrize("logprobs", ["sampled", "prefill"])
def test_scores_without_the_prompt_follow_the_config(
    tmp_path: Path, teacher_dir: Path, student_dir: Path, context: str, before: str, logprobs: str
) -> None:
    score = {"context": context, "student_logprobs": logprobs, "top_k": 5}
    store, config = make_run(tmp_path, teacher_dir, student_dir, score=score)
    for stage in ("generate", "score"):
        execute(store, config, StageKey(stage, 0))
    bare = make_tokenizer()(before, add_special_tokens=False)["input_ids"]
    samples = store.read_table(StageKey("generate", 0), GENERATE, ["prompt_ids", "response_ids"]).to_pylist()
    scores = store.read_table(StageKey("score", 0), score_schema(5, "float16")).to_pylist()
    for name, folder in (("student", student_dir), ("teacher", teacher_dir)):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        for sample, row in zip(samples, scores, strict=True):
            for column, ids in ((f"{name}_nll", sample["prompt_ids"]), (f"{name}_nll_uncond", bare)):
                response = torch.tensor(sample["response_ids"])
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids + sample["response_ids"]]), use_cache=False).logits[0]
                nll = torch.nn.functional.cross_entropy(logits[len(ids) - 1 : -1], response).item()
                assert row[column] == pytest.approx(nll, abs=1e-4), column
