"""Scoring's Triton kernel against float64, all cases in one process (`triton_process`)."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tasks.language_model.prefill import Prefill, prefill
from tests.tasks.test_prefill import random_rows
from tests.tasks.triton_process import DEVICE, all_results, compile_for_a_gpu
from tests.tiny_models import make_model

pytestmark = pytest.mark.xdist_group("triton")


@dataclass(frozen=True)
class Case:
    """Logits to reduce.

    Args:
        rows: Positions.
        vocabulary: Tokens; a row of more than 4,096 takes several turns.
        shared_vocab: Tokens that may be among the most likely.
        dtype: Of the logits.
        spread: How far logits are apart.
        shift: Added to all of them.
        apart: Whether a row's logits lie apart in memory, as those of a slice or a transpose do.
    """

    rows: int
    vocabulary: int
    shared_vocab: int
    dtype: torch.dtype = torch.float32
    spread: float = 4.0
    shift: float = 0.0
    apart: bool = False

    def draw(self) -> Tensor:
        """Return the logits; the largest of the last row has a neighbour of its size in another block."""
        generator = torch.Generator().manual_seed(self.vocabulary)
        logits = torch.randn(self.rows, self.vocabulary, generator=generator) * self.spread + self.shift
        if self.rows:
            logits[-1, 0] = logits[-1, -1] = logits.max() + 1
        logits = logits.to(self.dtype)
        return logits.T.contiguous().T if self.apart else logits


CASES = [
    *(Case(5, *sizes) for sizes in [(1, 1), (10, 10), (63, 63), (64, 64), (65, 65), (641, 600), (4096, 4096)]),
    *(Case(3, *sizes) for sizes in [(4097, 4097), (9001, 8999), (8192, 4096)]),
    Case(0, 300, 300),
    Case(3, 300, 300, apart=True),
    *(Case(4, 5003, 4900, torch.bfloat16, spread, shift) for spread in (1e-3, 40.0) for shift in (-300.0, 0.0, 300.0)),
]


def scored(device: str, dtype: torch.dtype) -> Prefill:
    """Score short responses, the top k of some of them, by whatever computes it on the device."""
    model = nn.Module.to(make_model(seed=3), device, dtype)
    context, response = random_rows(1, [3, 0, 5, 2]), random_rows(2, [4, 6, 1, 9])
    wanted = np.array([True, False, True, True])
    options: dict[str, Any] = {"top_k": 7, "topk_rows": wanted, "shared_vocab": 250}
    return prefill(model, context, response, batch_tokens=16, logits_chunk=3, **options)


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[Tensor, ...]]:
    """What the kernel makes of every case."""
    results: dict[str, tuple[Tensor, ...]] = all_results()[__name__]
    return results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_pass_gives_the_sum_and_the_maxima_of_blocks(case: Case, found: dict[str, tuple[Tensor, ...]]) -> None:
    exact = case.draw().double()
    largest, log_sum, maxima = (value.double() for value in found[str(case)])
    torch.testing.assert_close(largest, exact.amax(-1, keepdim=True), rtol=0, atol=0)
    torch.testing.assert_close(log_sum, (exact - largest).logsumexp(-1, keepdim=True), rtol=1e-5, atol=1e-6)
    blocks = exact[:, : case.shared_vocab].split(64, dim=1)
    expected = torch.cat([block.amax(-1, keepdim=True) for block in blocks], 1)
    torch.testing.assert_close(maxima, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prefill_is_the_same_by_the_kernel_and_by_torch(
    dtype: torch.dtype, found: dict[str, tuple[Tensor, ...]]
) -> None:
    logprobs, topk_ids, topk_logprobs = (value.numpy() for value in found[f"prefill {dtype}"])
    # On the same device, so that both read the same logits: each rounds its own way to bfloat16.
    with patch("tasks.language_model.prefill.missing_for_triton", return_value="is not looked for"):
        expected = scored(DEVICE, dtype)
    np.testing.assert_allclose(logprobs, expected.logprobs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(topk_logprobs, expected.topk_logprobs, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(topk_ids, expected.topk_ids)


@pytest.mark.parametrize("kind", ["*fp32", "*bf16"])
def test_it_compiles_for_a_gpu(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks.language_model.prefill_triton import WARPS, constants, kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = [kind, *["*fp32"] * 3, *["i32"] * 3]
    assert compile_for_a_gpu(kernel, types, constants(151_936, 64), WARPS).asm["cubin"]


if __name__ == "__main__":
    from tasks.language_model.prefill_triton import reduce

    results = {
        str(case): tuple(value.cpu() for value in reduce(case.draw().to(DEVICE), 64, case.shared_vocab))
        for case in CASES
    }
    with patch("tasks.language_model.prefill.missing_for_triton", return_value=None):
        for dtype in (torch.float32, torch.bfloat16):
            parts = vars(scored(DEVICE, dtype)).values()
            results[f"prefill {dtype}"] = tuple(torch.from_numpy(part) for part in parts)
    torch.save(results, sys.argv[1])
