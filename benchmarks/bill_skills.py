"""What a model of the bill task can do, token by token: why one method's student is better than another's.

    python -m benchmarks.bill_skills configs/bill/teacher runs/compare-bill/sft/lr=0.001/seed-0 ...

Each model is given right replies, and replies that have strayed once, and asked what comes next: a probability each,
in percent. A folder is a Hugging Face model or a run, of which its newest student is taken.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from benchmarks.bill_models import LINES
from benchmarks.bill_task import ARTICLES, TOKENS, Strays, draw_bills
from benchmarks.word_models import PAD
from schemas.errors import ArtifactError
from schemas.run_store import RunStore
from tasks.language_model.loading import load_model
from tasks.language_model.sources import exported_folder, standing_exports

STRAYS = {
    "after a skip": Strays(skips=0.2),
    "after a repeat": Strays(repeats=0.2),
    "after an unlisted": Strays(unlisted=0.2),
}
BILLS = 512
_PAD, _ARTICLE = TOKENS.index(PAD), TOKENS.index(ARTICLES[0])


@torch.no_grad()
def _next_token(model: PreTrainedModel, prompts: NDArray[np.int64], replies: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the probability of every token of the replies, float64 [bills, tokens]."""
    ids = torch.from_numpy(np.concatenate([prompts, replies], axis=1))
    logits = model(input_ids=ids, attention_mask=(ids != _PAD).long()).logits[:, prompts.shape[1] - 1 : -1]
    told = logits.double().log_softmax(-1).gather(-1, ids[:, prompts.shape[1] :, None])[..., 0]
    found: NDArray[np.float64] = told.exp().numpy()
    return found


def skills(model: PreTrainedModel, bills: int = BILLS) -> dict[str, float]:
    """Return mean probabilities, by name, over bills of all lengths, each as many times.

    `article`, `price`, `sum`, `next or total`, `last sum` and `end`: of the right token of a faultless reply. `whole`:
    of such a reply, to the power of one over its tokens. `after ...`: of the first article that is missing, in the
    line after the first stray of that kind.
    """
    columns: dict[str, list[NDArray[np.float64]]] = {}
    for lines in range(LINES[0], LINES[1] + 1):
        drawn = draw_bills(np.random.default_rng(lines), bills, lines)
        right = _next_token(model, drawn.prompts, drawn.replies)
        body = right[:, : 4 * lines]
        for name, part in {
            "article": body[:, ::4],
            "price": body[:, 1::4],
            "sum": body[:, 2::4],
            "next or total": body[:, 3::4],
            "last sum": right[:, -2],
            "end": right[:, -1],
            "whole": np.exp(np.log(right).mean(1)),
        }.items():
            columns.setdefault(name, []).append(part.ravel())
        for name, strays in STRAYS.items():
            columns.setdefault(name, []).append(_after_stray(model, lines, bills, strays))
    return {name: float(np.concatenate(parts).mean()) for name, parts in columns.items()}


def _after_stray(model: PreTrainedModel, lines: int, bills: int, strays: Strays) -> NDArray[np.float64]:
    drawn = draw_bills(np.random.default_rng(100 + lines), bills, lines, strays=strays)
    heads = drawn.replies[:, :-2:4]
    # Only the article of a line is a slip here, or padding.
    strayed = drawn.slips[:, :-2:4] & (heads >= _ARTICLE)
    line = strayed.argmax(axis=1) + 1
    rows = np.flatnonzero(strayed.any(axis=1) & (line < heads.shape[1]))
    # What follows is the first article that is missing, if the reply goes on and does not stray again.
    rows = rows[(heads[rows, line[rows]] >= _ARTICLE) & ~strayed[rows, line[rows]]]
    found: NDArray[np.float64] = _next_token(model, drawn.prompts, drawn.replies)[rows, 4 * line[rows]]
    return found


def model_folder(place: Path) -> Path:
    """Return a model's folder: itself, or the newest student of a run.

    Raises:
        ArtifactError: the run has exported none.
    """
    if (place / "config.json").is_file():
        return place
    store = RunStore.open(place)
    key = next(reversed(standing_exports(store)), None)
    if key is None:
        raise ArtifactError(f"{place}: has not exported any student yet")
    return exported_folder(store, key)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table, a line a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--bills", type=int, default=BILLS, help="of each length")
    options = parser.parse_args(arguments)
    for number, place in enumerate(options.models):
        found = skills(load_model(model_folder(place), dtype="float32"), options.bills)
        if number == 0:
            print("| model | " + " | ".join(found) + " |\n|---|" + "---:|" * len(found))
        print(f"| {place} | " + " | ".join(f"{100 * value:.1f}" for value in found.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
