"""Finding the prompts that samples answer."""

import time

import numpy as np
import pyarrow as pa

from tasks.audit.rollout_index import PromptIndex


def index_of(*chunks: list[str]) -> PromptIndex:
    ids = pa.chunked_array([pa.array(chunk, pa.string()) for chunk in chunks], pa.string())
    return PromptIndex(ids, np.arange(len(ids)) % 2 == 0)


def test_each_id_is_found_in_its_row_and_others_in_none() -> None:
    index = index_of(["d1", "a0", ""], [], ["c", "a0"])
    wanted = pa.chunked_array([["a0", "b"], ["", "c", "d1"], ["d"]])
    # The first of two that are the same.
    assert index.rows(wanted).tolist() == [1, -1, 2, 3, 0, -1]
    assert index.in_split(wanted, held_out=True).tolist() == [False, False, True, False, True, False]
    assert index_of().rows(wanted).tolist() == [-1] * 6


def test_asking_shard_by_shard_does_not_go_through_all_prompts_each_time() -> None:
    names = [f"{number:016x}" for number in range(100_000)]
    shard, index = pa.chunked_array([names[70_000:70_010]]), index_of(names)
    begun = time.perf_counter()
    assert index.rows(shard).tolist() == list(range(70_000, 70_010))
    once = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(200):
        index.rows(shard)
    assert time.perf_counter() - begun < 20 * once
