import numpy as np
import pyarrow as pa
import pytest

from tasks.audit.digests import LOGPROBS, TOKENS, first_difference, row_digests, text_digests


def digests(rows: list[list[int]], first_place: list[int] | None = None) -> list[int]:
    offsets = np.cumsum([0, *(len(row) for row in rows)])
    values = np.array([value for row in rows for value in row], np.int32)
    places = None if first_place is None else np.array(first_place, np.int64)
    return [int(digest) for digest in row_digests(values, offsets, TOKENS, places)]


def test_equal_rows_have_equal_digests_wherever_they_lie() -> None:
    assert digests([[1, 2], [], [3, 1, 2], [1, 2]])[0] == digests([[9], [1, 2]])[1]


def test_value_place_and_length_all_count() -> None:
    rows = [[1, 2], [2, 1], [1, 2, 0], [0, 1, 2], [1, 3], [], [0], [-1, 2], [1, 2 + 2**16]]
    assert len(set(digests(rows))) == len(rows)


def test_digests_of_pieces_add_up_to_that_of_the_whole() -> None:
    first, second = digests([[4, 5]])[0], digests([[6, 7, 8]], [2])[0]
    assert (first + second) % 2**64 == digests([[4, 5, 6, 7, 8]])[0]


def test_nan_equals_itself_and_columns_do_not_mix() -> None:
    values, offsets = np.array([np.nan, 1.0], np.float32), np.array([0, 2])
    assert row_digests(values, offsets, LOGPROBS) == row_digests(values.copy(), offsets, LOGPROBS)
    assert row_digests(values, offsets, LOGPROBS) != row_digests(values, offsets, TOKENS)


NESTED = pa.list_(pa.list_(pa.float32(), 2))


@pytest.mark.parametrize(
    ("left", "right", "kind", "row"),
    [
        ([1, 2, None], [1, 2, None], pa.int64(), None),
        ([1, None, 3], [1, 2, 3], pa.int64(), 1),
        ([1, 2], [1, 2, 3], pa.int64(), 2),
        (["a", "b"], ["a", "c"], pa.string(), 1),
        ([float("nan"), 1.0], [float("nan"), 1.5], pa.float32(), 1),
        ([[1], [], [2, 3]], [[1], [], [2, 4]], pa.list_(pa.int32()), 2),
        ([[1, 2], [3]], [[1], [2, 3]], pa.list_(pa.int32()), 0),
        ([[[1, 2]], [[3, 4], [5, 6]]], [[[1, 2]], [[3, 4], [5, 7]]], NESTED, 1),
        ([[{"a": "x"}], [{"a": "y"}]], [[{"a": "x"}], [{"a": "z"}]], pa.list_(pa.struct([("a", pa.string())])), 1),
    ],
)
def test_the_first_row_that_differs(
    left: list[object], right: list[object], kind: pa.DataType, row: int | None
) -> None:
    assert first_difference(pa.array(left, kind), pa.array(right, kind)) == row
    # Sliced columns count from their own start.
    cut = pa.array([*left[:1], *left], kind).slice(1), pa.array([*right[:1], *right], kind).slice(1)
    assert first_difference(*cut) == row


def test_texts_have_the_same_digest_wherever_they_lie_and_others_another() -> None:
    texts = ["", "a", "ab", "ba", "b", "é", "a\0", "\0", "ab" * 9]
    digests = text_digests(pa.chunked_array([texts]))
    assert len(set(digests.tolist())) == len(texts)
    cut = pa.chunked_array([pa.array(["x", *texts[:4]]).slice(1), pa.array([], pa.string()), texts[4:]])
    assert text_digests(cut).tolist() == digests.tolist()
    assert text_digests(pa.chunked_array([], pa.string())).size == 0
