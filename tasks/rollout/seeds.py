"""One seed per sample, and the random numbers that follow from it."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def sample_seed(run_seed: int, round_index: int, prompt_id: str, sample_index: int) -> int:
    """Return the seed of one sample: a stable hash in [0, 2**63), so that it fits int64."""
    text = f"{run_seed}/{round_index}/{prompt_id}/{sample_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def uniforms(seed: int, count: int) -> NDArray[np.float64]:
    """Return the first ``count`` random numbers of a sample, uniform in [0, 1): the t-th decides its t-th token.

    Philox (Salmon et al. 2011) is counter-based: keys give independent streams, and a longer draw begins with the
    shorter one.
    """
    return np.random.Generator(np.random.Philox(key=seed)).random(count)
