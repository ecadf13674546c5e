from collections.abc import Callable
from functools import partial

import pytest

from benchmarks.measure import (
    Measurement,
    alternate,
    alternate_in_children,
    at_least,
    at_most,
    in_child,
    processes,
    ratios,
)
from benchmarks.report import BenchmarkParser, markdown, number, this_machine
from tests.benchmarks.test_commands import in_children

MEBIBYTE = 2**20


def holding(mebibytes: int) -> Callable[[], int]:
    return lambda: len(bytearray(b"\x01") * (mebibytes * MEBIBYTE))


def failing() -> Callable[[], int]:
    raise ValueError("no such thing")


def test_sides_take_turns_and_warm_up_does_not_count() -> None:
    order: list[str] = []
    samples = alternate({name: partial(order.append, name) for name in "AB"}, 3, warmup=2)
    assert order == ["A", "B"] * 5
    assert {name: len(taken) for name, taken in samples.items()} == {"A": 3, "B": 3}


@in_children
def test_a_childs_peak_memory_is_its_own() -> None:
    of_this_process = bytearray(b"\x01") * (600 * MEBIBYTE)
    samples = alternate_in_children({"small": partial(holding, 8), "large": partial(holding, 64)}, 1)
    small, large = samples["small"][0], samples["large"][0]
    assert (small.value, large.value) == (8 * MEBIBYTE, 64 * MEBIBYTE)
    # The kernel counts pages in batches.
    assert small.extra_bytes == pytest.approx(8 * MEBIBYTE, abs=4 * MEBIBYTE)
    assert large.extra_bytes == pytest.approx(64 * MEBIBYTE, abs=4 * MEBIBYTE)
    assert large.peak_bytes < len(of_this_process)


def test_memory_given_back_before_the_work_is_not_its_peak() -> None:
    len(bytearray(b"\x01") * (64 * MEBIBYTE))
    (nothing,) = alternate({"nothing": lambda: None}, 1, warmup=0)["nothing"]
    assert nothing.extra_bytes < 16 * MEBIBYTE


@in_children
def test_a_child_that_fails_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="code 1"):
        in_child(failing)


def test_what_has_begun_cuda_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"bitsandbytes"}
    monkeypatch.setattr("benchmarks.measure.find_spec", lambda name: name if name in installed else None)
    assert [processes(device).get_start_method() for device in ("cuda:0", "cpu")] == ["spawn", "forkserver"]
    installed.clear()
    assert processes("cuda:0").get_start_method() == "forkserver"


def test_ratios_are_of_pairs() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="longer"):
        ratios([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("bar", "verdict"),
    [
        (at_least(2.0), "met"),
        (at_least(2.1), "missed"),
        (at_most(2.0), "met"),
        (at_most(1.9), "missed"),
        (None, "no bar"),
    ],
)
def test_the_median_is_held_against_the_bar(bar: object, verdict: str) -> None:
    assert Measurement("x", [1.0, 2.0, 30.0], "s", bar).verdict == verdict  # type: ignore[arg-type]


def test_the_table_says_median_spread_bar_verdict_machine_and_versions() -> None:
    rows = [Measurement("speed", [3.0, 1.0, 2.0], "x", at_least(8.1)), Measurement("size", [40_000.0], "bytes")]
    lines = markdown(rows, this_machine(), ["A note."]).splitlines()
    assert lines[2:4] == ["| speed | 2 (1 to 3) x | ≥ 8.1 x | **missed** |", "| size | 40,000 bytes |  | no bar |"]
    assert "- A note." in lines
    assert lines[-2].startswith("- Machine: ")
    assert "torch" in lines[-1]


@pytest.mark.parametrize(
    ("value", "text"), [(0.0123456, "0.01235"), (8.1, "8.1"), (99.96, "99.96"), (1234567.8, "1,234,568")]
)
def test_numbers_keep_four_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_quick_makes_sizes_tiny_unless_they_are_given() -> None:
    parser = BenchmarkParser("name", "What it does.")
    parser.add_size("--new-tokens", 64, 8, "longest response")
    assert (parser.read([]).new_tokens, parser.read([]).repeats) == (64, 5)
    quick = parser.read(["--quick", "--repeats", "3"])
    assert (quick.new_tokens, quick.repeats) == (8, 3)
