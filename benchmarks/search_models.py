"""Makes what configs/compare-search.yaml starts from: a teacher that finds at once, a student that guesses, prompts.

    python -m benchmarks.search_models configs/search

About 15 minutes on one core; the results are in the repository, so that nobody has to.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.bill_models import PROMPTLESS, Shape, make_model
from benchmarks.search_task import Habits, draw_prompts, draw_searches, make_tokenizer
from benchmarks.word_models import train, write_prompts
from schemas.tables import IGNORE_LABEL

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


def learn(model: LlamaForCausalLM, phase: Phase) -> None:
    """Train on fresh searches at every step, short ones first; replies only."""
    rng, started = np.random.default_rng(phase.seed), time.perf_counter()
    fewest, most = ARTICLES_LISTED

    def draw(share: float) -> tuple[Tensor, Tensor]:
        longest = fewest + round((most - fewest) * min(1.0, share / GROWING))
        searches = draw_searches(rng, BATCH, int(rng.integers(fewest, longest + 1)), phase.habits)
        prompts = searches.prompts[:, -1:] if rng.random() < PROMPTLESS else searches.prompts
        ids = np.concatenate([prompts, searches.replies], axis=1)
        labels = np.concatenate([np.full(prompts.shape, IGNORE_LABEL), searches.labels], axis=1)
        return torch.from_numpy(ids), torch.from_numpy(labels)

    def report(step: int, loss: float) -> None:
        if step % 250 == 0:
            print(f"step {step}: loss {loss:.3f}, {time.perf_counter() - started:.0f} s", flush=True)

    train(model, phase.steps, phase.learning_rate, draw, report)


def main() -> None:
    """Write teacher, student and prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder: Path = arguments.folder
    write_prompts(folder / "prompts.jsonl", draw_prompts(0, arguments.prompts, ARTICLES_LISTED))
    for name, phase in MODELS.items():
        model = make_model(SHAPE)
        print(f"{name}: {model.num_parameters():,} parameters", flush=True)
        learn(model, phase)
        model.bfloat16().save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)


if __name__ == "__main__":
    main()
