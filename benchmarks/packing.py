"""Packing: fill, speed and memory of best-fit decreasing here, beside TRL's `pack_dataset`.

Both sides begin with one int32 column of token rows and end with the rows of the bins; binning alone is measured too.
TRL packs as its SFTTrainer calls it, 1,000 sequences at a time, and the whole set at once.

Lengths: (a) those of the quickstart's rollouts (prompt and response), from `quickstart_lengths.json` or another run
with `--run`; (b) the same drawn again until there are many, since no packer can fill the last of a few bins; (c)
log-normal ones with a heavy tail. `python -m benchmarks.packing --run runs/quickstart --save-lengths
benchmarks/quickstart_lengths.json` makes that file.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.measure import Bar, Measurement, Work, alternate_in_children, at_least, at_most, ratios, seconds
from benchmarks.report import BenchmarkParser, main
from schemas.run_store import RunStore
from schemas.stage_key import StageKey
from schemas.tables import GENERATE
from tasks.pack.binning import best_fit_decreasing
from tasks.sequences import Source, sequence_lengths

Int64 = NDArray[np.int64]

LENGTHS_FILE = Path(__file__).with_name("quickstart_lengths.json")
PAPER_TOKENS = 32_768
ROWS_AT_ONCE = 8_192
TRL_BATCH = 1_000
TRL_SIDES = {f"TRL by {TRL_BATCH:,}": TRL_BATCH, "TRL all at once": None}
FILL = at_least(99.5)
A_FEW_BYTES = at_most(8)
"""Bytes a token: the int32 column that comes out is four of them."""


class LengthSet(NamedTuple):
    """Sequences to pack: where they come from, their lengths in tokens, and the bins' capacity."""

    name: str
    lengths: Int64
    capacity: int


class Packed(NamedTuple):
    """What a packer made: bins, and the tokens in them."""

    bins: int
    tokens: int


def run_lengths(store: RunStore) -> Int64:
    """Return the tokens of every rollout of the first round, prompt and response."""
    rollouts = Source(StageKey("generate", 0), GENERATE, ["prompt_ids", "response_ids"])
    shards = [np.add(*sequence_lengths(shard)) for shard in rollouts.shards(store)]
    return np.concatenate([np.empty(0, np.int64), *shards])


def save_lengths(path: Path, lengths: Int64, capacity: int) -> None:
    """Write a histogram of lengths as JSON, with the capacity they are packed into."""
    values, counts = np.unique(lengths, return_counts=True)
    histogram = {str(value): int(count) for value, count in zip(values, counts, strict=True)}
    path.write_text(json.dumps({"capacity": capacity, "sequences_by_length": histogram}) + "\n", encoding="utf-8")


def load_lengths(path: Path) -> tuple[Int64, int]:
    """Return what `save_lengths` wrote: the lengths, shortest first, and the capacity."""
    values = json.loads(path.read_text(encoding="utf-8"))
    histogram = values["sequences_by_length"]
    lengths = np.array([int(length) for length in histogram], np.int64)
    return np.repeat(lengths, list(histogram.values())), values["capacity"]


def heavy_tailed(count: int, longest: int) -> Int64:
    """Return log-normal lengths (median 300, mean about 490), none above ``longest``."""
    drawn = np.random.default_rng(7).lognormal(5.7, 1.0, count).astype(np.int64) + 1
    return np.minimum(drawn, longest)


def token_rows(lengths: Int64) -> pa.ListArray:
    """Return int32 token rows of these lengths."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    values = np.resize(np.arange(50_000, dtype=np.int32), int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def only_bins(data: LengthSet) -> Work[Packed]:
    """Decide which sequences share a bin."""

    def work() -> Packed:
        bins = best_fit_decreasing(data.lengths, data.capacity)
        return Packed(bins.offsets.size - 1, int(data.lengths[bins.order].sum()))

    return work


def bins_and_rows(data: LengthSet) -> Work[Packed]:
    """Decide, and make the bins' rows."""
    rows = token_rows(data.lengths)

    def work() -> Packed:
        bins = best_fit_decreasing(data.lengths, data.capacity)
        ends = np.concatenate([[0], np.cumsum(data.lengths[bins.order])])
        tokens = np.empty(ends[-1], np.int32)
        # Some bins at a time, as the stage does it, so that little is held beside what is made.
        for start in range(0, bins.order.size, ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, bins.order.size)
            tokens[ends[start] : ends[stop]] = rows.take(pa.array(bins.order[start:stop])).flatten()
        packed = pa.ListArray.from_arrays(pa.array(ends[bins.offsets], pa.int32()), pa.array(tokens))
        return Packed(len(packed), len(packed.values))

    return work


def trl(data: LengthSet, batch: int | None) -> Work[Packed]:
    """Pack as TRL does, ``batch`` sequences at a time; None: all at once."""
    import datasets
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    dataset = datasets.Dataset(pa.table({"input_ids": token_rows(data.lengths)}))

    def work() -> Packed:
        packed = pack_dataset(dataset, data.capacity, "bfd", {"batch_size": batch})
        ends = [chunk.offsets.to_numpy()[[0, -1]] for chunk in packed.data.column("input_ids").chunks]
        return Packed(len(packed), int(sum(last - first for first, last in ends)))

    return work


def fewest_bins(data: LengthSet) -> int:
    """Return the number of bins that no packer can go below: all tokens over the capacity, rounded up."""
    return -(-int(data.lengths.sum()) // data.capacity)


def fill_rows(data: LengthSet, bar: Bar | None) -> list[Measurement]:
    """Fill of one set by each packer."""
    sides = {"here": bins_and_rows(data), **{name: trl(data, batch) for name, batch in TRL_SIDES.items()}}
    rows = []
    for side, work in sides.items():
        packed = work()
        fill = 100 * packed.tokens / (packed.bins * data.capacity)
        what = f"{data.name}: fill, {side}: {packed.bins:,} bins of {fewest_bins(data):,} at least"
        rows.append(Measurement(what, [fill], "%", bar if side == "here" else None))
    return rows


def speed_rows(data: LengthSet, repeats: int) -> list[Measurement]:
    """Speed and memory of one set, each side in processes of its own."""
    count, tokens = data.lengths.size, int(data.lengths.sum())
    samples = alternate_in_children(
        {
            "binning alone": partial(only_bins, data),
            "here": partial(bins_and_rows, data),
            **{name: partial(trl, data, batch) for name, batch in TRL_SIDES.items()},
        },
        repeats,
    )
    alone = samples["binning alone"]
    rows = [
        Measurement(f"{data.name}: time, binning alone", seconds(alone), "s", at_most(10)),
        Measurement(f"{data.name}: memory, binning alone", [s.extra_bytes / count for s in alone], "bytes/sequence"),
    ]
    for side, taken in samples.items():
        rate, memory = [count / s.seconds for s in taken], [s.extra_bytes / tokens for s in taken]
        bar = None if side in TRL_SIDES else A_FEW_BYTES
        rows.append(Measurement(f"{data.name}: speed, {side}", rate, "sequences/s"))
        rows.append(Measurement(f"{data.name}: memory, {side}", memory, "bytes/token", bar))
    for side in TRL_SIDES:
        ratio = ratios(seconds(samples[side]), seconds(samples["here"]))
        rows.append(Measurement(f"{data.name}: time, {side} over here", ratio, "x"))
    return rows


def loss_rows(lengths: Int64, capacity: int) -> list[Measurement]:
    """What becomes of sequences that no bin can hold."""
    too_long = lengths > capacity
    data = LengthSet("too long", lengths, capacity)
    fitting = data._replace(lengths=lengths[~too_long])
    truncated = int(fitting.lengths.sum()) - bins_and_rows(fitting)().tokens
    lost = int(lengths.sum()) - trl(data, None)().tokens
    where = f"heavy tail into {capacity:,}, where {int(too_long.sum()):,} sequences are too long"
    return [
        Measurement(f"{where}: cut off here", [truncated], "tokens", at_most(0)),
        Measurement(f"{where}: cut off by TRL", [lost], "tokens"),
        Measurement(f"{where}: left out whole here, named in the ledger", [int(lengths[too_long].sum())], "tokens"),
    ]


def measure(arguments: argparse.Namespace) -> tuple[list[Measurement], list[str]]:
    """Measure all sets."""
    lengths, capacity = load_lengths(LENGTHS_FILE)
    if arguments.run is not None:
        store = RunStore(arguments.run)
        lengths, capacity = run_lengths(store), store.finished(StageKey("pack", 0)).config["pack"]["max_tokens"]
    if arguments.save_lengths is not None:
        save_lengths(arguments.save_lengths, lengths, capacity)
    many = np.random.default_rng(0).choice(lengths, arguments.resampled)
    heavy = heavy_tailed(arguments.sequences, PAPER_TOKENS)
    rows = fill_rows(LengthSet(f"quickstart, {lengths.size} sequences into {capacity:,}", lengths, capacity), None)
    for room in (capacity, PAPER_TOKENS):
        rows += fill_rows(LengthSet(f"quickstart, {many.size:,} drawn from it into {room:,}", many, room), FILL)
    data = LengthSet(f"heavy tail, {heavy.size:,} into {PAPER_TOKENS:,}", heavy, PAPER_TOKENS)
    rows += fill_rows(data, FILL) + speed_rows(data, arguments.repeats) + loss_rows(heavy, arguments.short)
    notes = [
        "`here` and TRL turn one int32 column of token rows into the rows of the bins; memory is what that needs "
        "beside the column it begins with.",
        f"TRL by {TRL_BATCH:,} is how its SFTTrainer calls it. Bins at least: all tokens over the capacity, rounded "
        "up; no packer may be able to reach it.",
        "What is too long for a bin is dropped whole here, with a reason in the ledger, before packing; TRL trains on "
        "its beginning.",
    ]
    return rows, notes


def parser() -> BenchmarkParser:
    """Return the command's arguments."""
    result = BenchmarkParser("packing", "Fill, speed and memory of packing, beside TRL's pack_dataset.")
    result.add_size("--sequences", 1_000_000, 3_000, "sequences of the heavy-tailed set")
    result.add_size("--resampled", 100_000, 2_000, "sequences drawn from the quickstart's lengths")
    result.add_size("--short", 8_192, 2_048, "capacity that some of the heavy-tailed set are too long for")
    result.add_argument("--run", type=Path, metavar="RUN", help="take the lengths of this run's first round instead")
    result.add_argument("--save-lengths", type=Path, metavar="PATH", help="write those lengths there")
    return result


if __name__ == "__main__":
    main(parser(), measure)
