"""What filter and pack hold does not grow with a round but for a few bytes a sample."""

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from benchmarks.million import write_round
from schemas.manifest import hash_file
from schemas.stage_key import StageKey
from tasks.stage import execute

SAMPLES = 768
BYTES_A_SAMPLE = {"filter": 16, "pack": 64}


class Peak:
    """Most bytes held at a time, by NumPy and Python, and by Arrow."""

    total = 0


@contextmanager
def measured() -> Iterator[Peak]:
    peak, usual = Peak(), pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        yield peak
        peak.total = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


def test_four_times_the_samples_are_held_in_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As little as fills several shards, and several rounds of what is collected, at both sizes.
    monkeypatch.setattr("tasks.pack.regroup._SPLIT_BYTES", 1 << 16)
    # Side by side, how many files are held at once would be a matter of luck, and of the machine's cores.
    monkeypatch.setattr("schemas.run_store.hash_files", lambda paths: map(hash_file, paths))
    peaks: dict[tuple[str, int], int] = {}
    for times in (0, 1, 4):
        samples = SAMPLES * times or 64
        run = write_round(
            tmp_path / str(times), samples, shard=192, prompt=16, response=24, shard_bins=2, max_tokens=2_048
        )
        for stage in BYTES_A_SAMPLE:
            with measured() as peak:
                execute(*run, StageKey(stage, 0))
            peaks[stage, times] = peak.total
    # The first pass, at 0, has paid for what is imported and cached.
    for stage, bytes_a_sample in BYTES_A_SAMPLE.items():
        assert peaks[stage, 4] <= 1.05 * peaks[stage, 1] + bytes_a_sample * 3 * SAMPLES, (stage, peaks)
