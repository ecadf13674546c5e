"""What scoring asks of a chunk of logits, as one Triton kernel that reads each of them once.

PyTorch's operators go over a chunk about eight times, in float32. Imported only where it is used.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, WARPS = 4096, 8


def reduce(logits: Tensor, neighbours: int, shared_vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's largest logit, log sum exp(logit - largest), and the largest of every few neighbouring ids.

    Args:
        logits: Of any float dtype [n, vocabulary]; computed with in float32.
        neighbours: Ids in one block of the last result, a power of two.
        shared_vocab: Ids from here on count in the sum alone.

    Returns:
        float32 [n, 1], [n, 1], and [n, blocks that begin below ``shared_vocab``].
    """
    # The kernel finds a row by its number alone.
    logits = logits.contiguous()
    rows, vocabulary = logits.shape
    blocks = -(-shared_vocab // neighbours)
    shapes = ((rows, 1), (rows, 1), (rows, blocks))
    largest, log_sum, maxima = (torch.empty(shape, dtype=torch.float32, device=logits.device) for shape in shapes)
    fixed = constants(vocabulary, neighbours)
    if rows:
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device_of(logits):
            kernel[(rows,)](
                logits, largest, log_sum, maxima, vocabulary, shared_vocab, blocks, **fixed, num_warps=WARPS
            )
    return largest, log_sum, maxima


def constants(vocabulary: int, neighbours: int) -> dict[str, Any]:
    """Return what the kernel is compiled for."""
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    return {"NEIGHBOURS": neighbours, "BLOCK": max(block, neighbours)}


def _row(
    logits: tl.tensor,
    largest: tl.tensor,
    log_sums: tl.tensor,
    maxima: tl.tensor,
    vocabulary: tl.tensor,
    shared_vocab: tl.tensor,
    blocks: tl.tensor,
    NEIGHBOURS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # int64: a chunk of a large vocabulary has more entries than int32 counts.
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    maxima += row * blocks
    # Log-sum-exp in one pass (Milakov and Gimelshein, arXiv 1805.02867).
    peak = tl.full((), -1e30, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(values, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(values - higher), 0)
        peak = higher
        shared = tl.where(column < shared_vocab, values, float("-inf"))
        block = start // NEIGHBOURS + tl.arange(0, BLOCK // NEIGHBOURS)
        of_blocks = tl.max(tl.reshape(shared, (BLOCK // NEIGHBOURS, NEIGHBOURS)), 1)
        tl.store(maxima + block, of_blocks, mask=block < blocks)
    tl.store(largest + row, peak)
    tl.store(log_sums + row, tl.log(total))


# Not as a decorator: type checkers know nothing of it.
kernel = triton.jit(_row)
