"""A million samples through filter and pack: time and disk grow with the round, memory does not.

The rollouts and scores are drawn, not sampled: what a stage holds does not depend on what they say. Filter and pack are
the real stages, each in a process of its own, as in a run; they run on a hundredth of the round too, and on a few
samples, whose peak memory is that of the imported libraries.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.measure import Measurement, alternate, memory_growth
from benchmarks.report import BenchmarkParser, main
from benchmarks.runs import Run, run_apart
from schemas.config import parse_config
from schemas.manifest import Manifest
from schemas.provenance import now_iso
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import GENERATE, SCORES, TableSchema, score_schema

STAGES = ("filter", "pack")
HUNDREDTH = 100
FEW = 64
TOP_K, VOCAB = 10, 151_936
_KINDS = 4_096
"""Different rows of targets: real ones repeat too, and compress by half."""


class Drawn(NamedTuple):
    """One shard of a round: a generate table and its score table."""

    rollouts: pa.Table
    scores: pa.Table


def draw_shards(samples: int, shard: int, *, prompt: int, response: int) -> Iterator[Drawn]:
    """Draw a round shard by shard: log-normal lengths with the given means, one policy, delta-IFD around 0.3."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, VOCAB, (_KINDS, 1))
    kinds = ((first + np.arange(TOP_K) * 97) % VOCAB).astype(np.int32)
    shares = -np.sort(-rng.exponential(size=(_KINDS, TOP_K)), axis=1)
    logprobs = np.log(0.9 * shares / shares.sum(1, keepdims=True)).astype(np.float16)
    for start in range(0, samples, shard):
        count = min(shard, samples - start)
        prompts, responses = (_lengths(rng, count, mean) for mean in (prompt, response))
        rows = rng.integers(0, _KINDS, int(responses.sum()))
        names = pa.array([f"r000-{number:016x}-000" for number in range(start, start + count)])
        yield Drawn(
            _rollouts(rng, start, names, prompts, responses, kinds[rows, 0]),
            _scores(rng, names, responses, kinds[rows], logprobs[rows]),
        )


def _lengths(rng: np.random.Generator, count: int, mean: int) -> NDArray[np.int64]:
    lengths: NDArray[np.int64] = rng.lognormal(np.log(mean) - 0.125, 0.5, count).astype(np.int64) + 1
    return lengths


def _lists(lengths: NDArray[np.int64], values: NDArray[np.generic] | pa.Array) -> pa.ListArray:
    flat = values if isinstance(values, pa.Array) else pa.array(values)
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), flat)


def _rollouts(
    rng: np.random.Generator,
    start: int,
    names: pa.Array,
    prompts: NDArray[np.int64],
    responses: NDArray[np.int64],
    sampled: NDArray[np.int32],
) -> pa.Table:
    count = len(names)
    return pa.table(
        {
            "sample_id": names,
            "prompt_id": pa.array([f"{number:016x}" for number in range(start, start + count)]),
            "sample_index": np.zeros(count, np.int32),
            "round": np.zeros(count, np.int32),
            "policy_version": ["policy"] * count,
            "policy_step": np.zeros(count, np.int64),
            "prompt_ids": _lists(prompts, rng.integers(0, VOCAB, int(prompts.sum()), dtype=np.int32)),
            "response_ids": _lists(responses, sampled),
            "response": ["text of a response"] * count,
            "finish_reason": ["stop"] * count,
            "sampled_logprobs": _lists(responses, -rng.exponential(size=sampled.size).astype(np.float32)),
            "seed": np.arange(start, start + count),
        },
        schema=GENERATE.columns,
    )


def _scores(
    rng: np.random.Generator,
    names: pa.Array,
    responses: NDArray[np.int64],
    ids: NDArray[np.int32],
    logprobs: NDArray[np.float16],
) -> pa.Table:
    nll = rng.exponential(size=len(names)).astype(np.float32)
    fixed = [pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), TOP_K) for values in (ids, logprobs)]
    columns = score_schema(TOP_K, "float16").columns
    return pa.table(
        {
            "sample_id": names,
            "response_tokens": responses.astype(np.int32),
            **dict.fromkeys(SCORES, nll),
            "delta_ifd": rng.normal(0.3, 0.3, len(names)).astype(np.float32),
            "teacher_topk_ids": _lists(responses, fixed[0]),
            "teacher_topk_logprobs": _lists(responses, fixed[1]),
        }
    ).select(columns.names)


def write_round(
    folder: Path,
    samples: int,
    *,
    shard: int,
    prompt: int,
    response: int,
    shard_bins: int,
    max_tokens: int = 32_768,
) -> Run:
    """Write a run whose stages generate and score of round 0 are finished."""
    config = parse_config(
        {
            "name": "benchmark",
            "root": str(folder),
            "teacher": {"model": "teacher"},
            "student": {"model": "student"},
            "prompts": {"sources": [{"type": "jsonl", "path": "prompts.jsonl"}]},
            # Bounds that depend on the whole round hold most.
            "filter": {"min_delta_ifd": {"quantile": 0.05}, "max_delta_ifd": {"quantile": 0.95}},
            "score": {"top_k": TOP_K},
            "pack": {"max_tokens": max_tokens, "shard_bins": shard_bins},
            "generate": {"max_new_tokens": max_tokens},
        }
    )
    store = RunStore.create(config)
    tables: dict[StageKey, TableSchema] = {
        StageKey("generate", 0): GENERATE,
        StageKey("score", 0): score_schema(TOP_K, "float16"),
    }
    for key in tables:
        store.begin(key, "drawn")
    for number, drawn in enumerate(draw_shards(samples, shard, prompt=prompt, response=response)):
        for table, (key, schema) in zip(drawn, tables.items(), strict=True):
            store.write_table(store.part(key, number), table, schema)
    for key in tables:
        store.finish(key, _manifest(store, key))
    return Run(store, config)


def _manifest(store: RunStore, key: StageKey) -> Manifest:
    return Manifest(
        stage=key.stage,
        round=key.round,
        fingerprint="drawn",
        stage_version=1,
        config={},
        inputs=[],
        outputs=store.outputs(key),
        started=now_iso(),
        finished=now_iso(),
        host="",
        packages={},
        counters={},
    )


def pass_through(run: Run) -> dict[str, Manifest]:
    """Run filter and pack, each again from its start; return their manifests."""
    return {stage: run_apart(run, StageKey(stage, 0)) for stage in STAGES}


def measure(arguments: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Run all sizes in turn."""
    sizes = {"few": FEW, "1x": arguments.samples // HUNDREDTH, "100x": arguments.samples}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        runs = {
            size: write_round(
                Path(name) / size,
                samples,
                shard=arguments.shard,
                prompt=arguments.prompt_tokens,
                response=arguments.response_tokens,
                shard_bins=arguments.shard_bins,
            )
            for size, samples in sizes.items()
        }
        sides = {size: partial(pass_through, run) for size, run in runs.items()}
        taken = alternate(sides, arguments.repeats, warmup=arguments.warmup)
        written = {
            stage: sum(record.bytes for record in runs["100x"].store.finished(StageKey(stage, 0)).outputs)
            for stage in ("generate", "score", *STAGES)
        }
    passes = {size: [sample.value for sample in samples] for size, samples in taken.items()}
    rows = [row for stage in STAGES for row in stage_rows(stage, passes, sizes)]
    rows += [
        Measurement(f"{stage}: size at 100x", [size / arguments.samples], "bytes/sample")
        for stage, size in written.items()
    ]
    packed = passes["100x"][0]["pack"].counters
    notes = [
        f"100x is {arguments.samples:,} samples in files of {arguments.shard:,}, with {TOP_K} targets a response "
        f"token; {packed['sequences']:,} kept, {packed['tokens'] / packed['sequences']:.1f} tokens each on average, in "
        f"{packed['bins']:,} bins of 32,768 and {packed['shards']:,} files of {arguments.shard_bins}.",
        f"Peak memory is of the stage's process; that of {FEW} samples is taken for the imported libraries. "
        "Bars are on the whole process. Both bounds of the filter are quantiles, which hold most.",
    ]
    return rows, notes


def stage_rows(stage: str, passes: dict[str, list[dict[str, Manifest]]], sizes: dict[str, int]) -> list[Measurement]:
    """Time and peak memory of a stage."""

    def counted(counter: str, size: str) -> list[float]:
        return [float(one[stage].counters[counter]) for one in passes[size]]

    times = {size: counted("seconds", size) for size in ("1x", "100x")}
    peaks = {size: counted("peak_memory_bytes", size) for size in sizes}
    more = sizes["100x"] - sizes["1x"]
    few, low, high = (peaks[size] for size in ("few", "1x", "100x"))
    return [
        *(Measurement(f"{stage}: time at {size}", seconds, "s") for size, seconds in times.items()),
        Measurement(f"{stage}: speed at 100x", [sizes["100x"] / seconds for seconds in times["100x"]], "samples/s"),
        *(
            Measurement(
                f"{stage}: peak memory above the imports at {size}",
                [(peak - base) / 2**20 for peak, base in zip(peaks[size], few, strict=True)],
                "MiB",
            )
            for size in ("1x", "100x")
        ),
        *memory_growth(stage, low, high, HUNDREDTH, more),
    ]


def parser() -> BenchmarkParser:
    """Return the command's arguments."""
    result = BenchmarkParser("million", "Time and memory of filter and pack over a million drawn samples.")
    result.add_size("--samples", 1_000_000, 6_400, "samples of the round; a hundredth of it is measured beside it")
    result.add_size("--prompt-tokens", 16, 4, "tokens of a prompt, on average")
    result.add_size("--response-tokens", 24, 4, "tokens of a response, on average")
    result.add_size("--shard", 4_096, 1_024, "samples in a file of generate and score")
    result.add_size("--shard-bins", 4, 1, "bins in a file of pack")
    result.add_argument("--folder", type=Path, help="where to write the rounds, about 4 GB; default: temporary files")
    return result


if __name__ == "__main__":
    main(parser(), measure)
