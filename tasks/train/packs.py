"""Reading packs for training, a few bins at a time, straight from their Parquet files."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from schemas.table_files import reading
from schemas.tables import IGNORE_LABEL
from tasks.language_model.ragged import Ragged


class PackReader:
    """Packs by number, over the files of a pack table; holds a few row groups and open files at most.

    Raises:
        ArtifactError: a file is no Parquet, or damaged; from every method.
    """

    def __init__(self, files: list[Path]) -> None:
        self._paths = files
        self._open = lru_cache(maxsize=8)(_open)
        groups: list[tuple[int, int, int]] = []
        for number, path in enumerate(files):
            metadata = _open(path).metadata
            groups += [(number, group, metadata.row_group(group).num_rows) for group in range(metadata.num_row_groups)]
        self._groups = [(file, group) for file, group, _ in groups]
        self._starts = np.cumsum([0, *(rows for _, _, rows in groups)])
        self._read_group = lru_cache(maxsize=4)(self._read_group_from_disk)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def seq_lengths(self) -> Ragged:
        """Lengths of the sequences of every pack, int32 tokens."""
        columns = []
        for path in self._paths:
            with reading(str(path)):
                columns.append(_open(path).read(columns=["seq_lengths"]).column("seq_lengths"))
        return Ragged.from_arrow(pa.chunked_array([chunk for column in columns for chunk in column.chunks]))

    def _read_group_from_disk(self, index: int) -> pa.Table:
        file, group = self._groups[index]
        with reading(str(self._paths[file])):
            rows = self._open(self._paths[file]).read_row_group(group)
            rows.validate(full=True)
        return rows

    def __getitem__(self, pack: int) -> dict[str, Any]:
        """Return a pack's columns, each an Arrow array of one row."""
        group = int(np.searchsorted(self._starts, pack, side="right")) - 1
        row = self._read_group(group).slice(pack - int(self._starts[group]), 1)
        return {name: row.column(name).combine_chunks() for name in row.column_names}


def _open(path: Path) -> pq.ParquetFile:
    with reading(str(path)):
        return pq.ParquetFile(path, memory_map=True)


def collate_pack(columns: dict[str, Any]) -> dict[str, Tensor]:
    """Return one pack as the trainer takes it.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` (restarting with each sequence): int64 [1, tokens]. With targets
        also, for the n labelled positions only, ``topk_ids`` int64 [n, k] and ``topk_logprobs`` float32 [n, k].
    """
    input_ids = Ragged.from_arrow(columns["input_ids"]).values.astype(np.int64)
    labels = Ragged.from_arrow(columns["labels"]).values.astype(np.int64)
    lengths = Ragged.from_arrow(columns["seq_lengths"]).values.astype(np.int64)
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(input_ids)) - np.repeat(starts, lengths)
    # Nothing before a sequence may predict its first token.
    labels[starts] = IGNORE_LABEL
    batch = {
        "input_ids": torch.from_numpy(input_ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(positions)[None],
    }
    if "teacher_topk_ids" in columns:
        labelled = labels != IGNORE_LABEL
        batch["topk_ids"] = torch.from_numpy(_targets(columns["teacher_topk_ids"], labelled).astype(np.int64))
        batch["topk_logprobs"] = torch.from_numpy(
            _targets(columns["teacher_topk_logprobs"], labelled).astype(np.float32)
        )
    return batch


def _targets(column: pa.ListArray, labelled: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, Any]:
    fixed = column.flatten()
    values: np.ndarray[Any, Any] = fixed.flatten().to_numpy(zero_copy_only=False)
    picked: np.ndarray[Any, Any] = values.reshape(-1, fixed.type.list_size)[labelled]
    return picked


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return two tokens of a collated pack that nothing is learned from.

    A rank without a pack takes part in its micro-step with them: their loss and gradients are 0.
    """
    row = {name: values[:, :2] for name, values in batch.items() if name in ("input_ids", "position_ids")}
    targets = {name: values[:0] for name, values in batch.items() if name not in (*row, "labels")}
    return {**row, "labels": torch.full_like(row["input_ids"], IGNORE_LABEL), **targets}


class PackCollator:
    """Turns pack numbers into batches; one pack is one micro-batch, and the number behind the last has no labels.

    A thread reads the packs that follow while the trainer computes: a GPU would wait tens of milliseconds for each.

    Args:
        reader: The packs; read from that thread alone.
        following: Returns the packs to read ahead after one, in the order in which they are taken.
    """

    def __init__(self, reader: PackReader, following: Callable[[int], Sequence[int]] = lambda pack: ()) -> None:
        self.reader = reader
        self._following = following
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packs")
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Tensor]:
        """Return the one pack that ``rows`` names, as ``collate_pack`` does."""
        if len(rows) != 1:
            raise ValueError(f"one pack is one micro-batch, got {len(rows)}")
        pack = rows[0]["pack"]
        for wanted in (pack, *self._following(pack)):
            if wanted not in self._ahead:
                self._ahead[wanted] = self._thread.submit(self._batch, wanted)
        return self._ahead.pop(pack).result()

    def _batch(self, pack: int) -> dict[str, Tensor]:
        if pack == len(self.reader):
            return without_labels(collate_pack(self.reader[0]))
        return collate_pack(self.reader[pack])
