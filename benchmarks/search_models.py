"""Makes what configs/compare-search.yaml starts from: a teacher that finds at once, a student that guesses, prompts.

    python -m benchmarks.search_models configs/search

About 15 minutes on one core; the results are in the repository, so that nobody has to.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.bill_models import PROMPTLESS, Shape, make_model
from benchmarks.search_task import IGNORE, Habits, draw_prompts, draw_searches, make_tokenizer

ARTICLES_LISTED = (2, 5)
"""Articles in a prompt, at least and at most."""

SHAPE = Shape(hidden=96, layers=4, heads=4, seed=3)
"""Of teacher and student: what the student lacks is not room."""


@dataclass(frozen=True)
class Phase:
    """How a model learns: optimizer steps, the peak of the cosine, the seed of the searches, and who is imitated."""

    steps: int
    learning_rate: float
    seed: int
    habits: Habits


BATCH = 64
GROWING = 0.3
"""Share of the steps over which prompts grow to their full length."""

MODELS = {
    "teacher": Phase(6000, 2e-3, 1, Habits(misses=0.3, goes_on=0.98, misses_learned=0.02)),
    "student": Phase(4000, 2e-3, 2, Habits(misses=1.0, goes_on=0.7, going_on_learned=0.05)),
}
"""What is made, by folder. The teacher learns to be right, and what to do after somebody's wrong try. The student
guesses; it knows all prices, and how to go on after a wrong try, but it has the habit of giving up."""


def train(model: LlamaForCausalLM, phase: Phase) -> None:
    """Train on fresh searches at every step, short ones first; replies only."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    rng, started = np.random.default_rng(phase.seed), time.perf_counter()
    fewest, most = ARTICLES_LISTED
    model.train()
    for step in range(phase.steps):
        share = step / phase.steps
        rate = phase.learning_rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        longest = fewest + round((most - fewest) * min(1.0, share / GROWING))
        searches = draw_searches(rng, BATCH, int(rng.integers(fewest, longest + 1)), phase.habits)
        prompts = searches.prompts[:, -1:] if rng.random() < PROMPTLESS else searches.prompts
        ids = torch.from_numpy(np.concatenate([prompts, searches.replies], axis=1))
        labels = torch.from_numpy(np.concatenate([np.full(prompts.shape, IGNORE), searches.labels], axis=1))
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)


def main() -> None:
    """Write teacher, student and prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = draw_prompts(0, arguments.prompts, ARTICLES_LISTED)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, phase in MODELS.items():
        model = make_model(SHAPE)
        print(f"{name}: {model.num_parameters():,} parameters", flush=True)
        train(model, phase)
        model.bfloat16().save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)


if __name__ == "__main__":
    main()
