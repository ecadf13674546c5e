"""Packs on their way to the trainer."""

import threading
from typing import Any

import pyarrow as pa
import pytest

from schemas.errors import ArtifactError
from tasks.train.packs import PackCollator, PackReader

WAIT = 30


def columns(pack: int) -> dict[str, Any]:
    kind = pa.list_(pa.int32())
    return {
        name: pa.array([[pack, pack + 1] if name != "seq_lengths" else [2]], kind)
        for name in ("input_ids", "labels", "seq_lengths")
    }


class Packs(PackReader):
    """Ten packs, of which the last is damaged; tells which are read, and lets nobody read before ``open`` is set."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.changed = threading.Condition()
        self.open = threading.Event()
        self.open.set()

    def __len__(self) -> int:
        return 10

    def __getitem__(self, pack: int) -> dict[str, Any]:
        assert self.open.wait(WAIT)
        with self.changed:
            self.read.append(pack)
            self.changed.notify_all()
        if pack == 9:
            raise ArtifactError("pack 9 is damaged")
        return columns(pack)


def tokens(collator: PackCollator, pack: int) -> list[int]:
    found: list[int] = collator([{"pack": pack}])["input_ids"][0].tolist()
    return found


def test_the_packs_that_follow_are_read_while_the_trainer_computes() -> None:
    reader = Packs()
    collator = PackCollator(reader, lambda pack: [pack + 1, pack + 2] if pack < 6 else [])
    assert tokens(collator, 4) == [4, 5]
    with reader.changed:
        assert reader.changed.wait_for(lambda: reader.read == [4, 5, 6], WAIT)
    # What has been read is not read again, and needs no reader.
    reader.open.clear()
    assert tokens(collator, 5) == [5, 6]
    reader.open.set()
    assert [tokens(collator, pack) for pack in (6, 7)] == [[6, 7], [7, 8]]
    assert reader.read == [4, 5, 6, 7]


def test_a_damaged_pack_is_told_of_when_its_turn_comes() -> None:
    collator = PackCollator(Packs(), lambda pack: [pack + 1] if pack < 9 else [])
    assert tokens(collator, 8) == [8, 9]
    with pytest.raises(ArtifactError, match="pack 9 is damaged"):
        tokens(collator, 9)


def test_the_number_behind_the_last_pack_has_no_labels() -> None:
    batch = PackCollator(Packs())([{"pack": 10}])
    assert batch["input_ids"].tolist() == [[0, 1]]
    assert (batch["labels"] < 0).all()
