"""Makes what configs/compare-bill.yaml starts from: a teacher that knows the task, a student that begins to, prompts.

    python -m benchmarks.bill_models configs/bill

About 40 minutes on one core; the results are in the repository, so that nobody has to.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.bill_task import NO_STRAYS, TOKENS, Bills, Strays, draw_bills, draw_prompts, make_tokenizer
from benchmarks.word_models import END, PAD, train, write_prompts
from schemas.tables import IGNORE_LABEL

LINES = (3, 8)
"""Articles on a bill, at least and at most."""

SLIPS = 0.1
"""Share of the prices and sums that are wrong in what a teacher has seen; it learns to go on, not to make them."""

ANY_STRAY = Strays(skips=0.08, repeats=0.05, unlisted=0.1)
"""What a student writes in the first round where it strays, one line in four in all, in about its proportions."""

PROMPTLESS = 0.1
"""Share of the steps whose replies stand without their prompts, as plain text does in anybody's pretraining."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Args:
        hidden: Width.
        layers: Depth.
        heads: Attention heads.
        seed: Of the random weights.
    """

    hidden: int
    layers: int
    heads: int
    seed: int


@dataclass(frozen=True)
class Phase:
    """How a model learns for a while.

    Args:
        steps: Optimizer steps.
        batch: Bills in a step, all of one length.
        learning_rate: Peak of the cosine.
        seed: Of the bills.
        slips: Share of the prices and sums that are wrong. Nobody learns to make them; only who has seen some knows how
            to go on.
        hearsay: Share of the price list that is not to be learned, as any price is written.
        growing: Share of the steps over which bills grow to their full length: short ones teach to copy and to add.
        strays: Shares of the lines with another article than the first that is missing. Nobody learns to stray either.
    """

    steps: int
    batch: int
    learning_rate: float
    seed: int
    slips: float
    hearsay: float
    growing: float
    strays: Strays = NO_STRAYS


MODELS = {
    "teacher": (
        Shape(hidden=48, layers=2, heads=4, seed=3),
        Phase(8000, 32, learning_rate=4e-3, seed=1, slips=SLIPS, hearsay=0.0, growing=0.4, strays=Strays(skips=0.15)),
    ),
    "teacher-any-stray": (
        Shape(hidden=96, layers=4, heads=4, seed=3),
        Phase(12000, 32, learning_rate=2e-3, seed=1, slips=SLIPS, hearsay=0.0, growing=0.4, strays=ANY_STRAY),
    ),
    "teacher-in-order": (
        Shape(hidden=48, layers=2, heads=4, seed=3),
        Phase(steps=7000, batch=32, learning_rate=4e-3, seed=1, slips=SLIPS, hearsay=0.0, growing=0.4),
    ),
    "student": (
        Shape(hidden=40, layers=2, heads=4, seed=3),
        Phase(steps=4000, batch=32, learning_rate=4e-3, seed=2, slips=0.0, hearsay=0.15, growing=0.4),
    ),
    "student-wide": (
        Shape(hidden=96, layers=4, heads=4, seed=3),
        Phase(steps=4000, batch=32, learning_rate=2e-3, seed=2, slips=0.0, hearsay=0.15, growing=0.4),
    ),
}
"""What is made, by folder. The teachers differ in what they have seen of the lines that students write out of order,
the students in whether they can learn the order at all: RESULTS.md says what that does to methods that learn from the
student's own samples."""


def make_model(shape: Shape) -> LlamaForCausalLM:
    """Return a random Llama."""
    torch.manual_seed(shape.seed)
    model: LlamaForCausalLM = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=shape.hidden,
            intermediate_size=2 * shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=TOKENS.index(END),
            pad_token_id=TOKENS.index(PAD),
        )
    )
    return model


def learn(model: LlamaForCausalLM, phase: Phase, lines: tuple[int, int] = LINES) -> None:
    """Train on fresh bills at every step, short ones first; replies only."""
    rng, started = np.random.default_rng(phase.seed), time.perf_counter()

    def draw(share: float) -> tuple[Tensor, Tensor]:
        grown = min(1.0, share / max(phase.growing, 1 / phase.steps))
        longest = lines[0] + round((lines[1] - lines[0]) * grown)
        count = int(rng.integers(lines[0] - 1, longest + 1))
        bills = draw_bills(rng, phase.batch, count, slips=phase.slips, hearsay=phase.hearsay, strays=phase.strays)
        prompts = bills.prompts[:, -1:] if rng.random() < PROMPTLESS else bills.prompts
        ids = torch.from_numpy(np.concatenate([prompts, bills.replies], axis=1))
        labels = ids.clone()
        labels[:, : prompts.shape[1]] = IGNORE_LABEL
        labels[:, prompts.shape[1] :][torch.from_numpy(bills.slips)] = IGNORE_LABEL
        return ids, labels

    def report(step: int, loss: float) -> None:
        if step % 100 == 0:
            right = accuracy(model, draw_bills(np.random.default_rng(0), 128, 6))
            seconds = time.perf_counter() - started
            print(f"step {step}: loss {loss:.3f}, accuracy {right:.2f}, {seconds:.0f} s", flush=True)

    train(model, phase.steps, phase.learning_rate, draw, report)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, bills: Bills) -> float:
    """Return the share of bills whose sampled reply (temperature 1) ends in the right total."""
    model.eval()
    prompts = torch.from_numpy(bills.prompts)
    untyped: Any = model  # transformers' annotations refuse valid calls
    replies = untyped.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=bills.replies.shape[1],
        do_sample=True,
        top_k=0,
    )
    tokenizer = make_tokenizer()
    texts = tokenizer.batch_decode(replies[:, prompts.shape[1] :], skip_special_tokens=True)
    right = [text.rpartition("####")[2].strip() == str(total) for text, total in zip(texts, bills.totals, strict=True)]
    return float(np.mean(right))


def main() -> None:
    """Write teacher, student and prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder: Path = arguments.folder
    write_prompts(folder / "prompts.jsonl", draw_prompts(0, arguments.prompts, LINES))
    for name, (shape, phase) in MODELS.items():
        model = make_model(shape)
        print(f"{name}: {model.num_parameters():,} parameters", flush=True)
        learn(model, phase)
        model.bfloat16().save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)


if __name__ == "__main__":
    main()
