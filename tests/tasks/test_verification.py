"""Scores of responses: what is right, what is wrong, and what a hostile response can do."""

import json
import os
import resource
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from schemas.errors import ArtifactError
from tasks.prompts.procedural import plain_entry
from tasks.verification import final_answer, processes, verify
from tasks.verification.answers import verification_of_task


def scores(kind: str | None, pairs: Sequence[tuple[str | None, str]]) -> list[float]:
    check = None if kind is None else json.dumps({"type": kind})
    return scored([(answer, check, response) for answer, response in pairs])


def scored(rows: list[tuple[str | None, str | None, str]]) -> list[float]:
    columns = {"answer": [row[0] for row in rows], "verification": [row[1] for row in rows]}
    prompts = pa.table(columns, schema=pa.schema([("answer", pa.string()), ("verification", pa.string())]))
    return list(verify(prompts, [row[2] for row in rows]))


def task_rows(task: str, answers: list[str], **options: Any) -> list[tuple[str | None, str | None, str]]:
    entry = reasoning_gym.create_dataset(task, size=1, seed=0, **options)[0]
    check = verification_of_task(task, options, plain_entry(entry) or {})
    return [(entry["answer"], check, answer.replace("ORACLE", str(entry["answer"]))) for answer in answers]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("one\n#### two ", "two"),
        ("#### a\n#### b", "b"),
        ("<answer>a</answer> then <answer> b\n</answer> c", "b"),
        ("<answer>a</answer>\n#### b", "b"),
        ("<answer>open\nlast line", "last line"),
        ("close</answer>", "close</answer>"),
        ("first\nlast \n \n", "last"),
        ("", ""),
    ],
)
def test_the_answer_of_a_response(response: str, answer: str) -> None:
    assert final_answer(response) == answer


def test_exact_compares_texts() -> None:
    assert scores("exact", [("42", "so\n42"), ("42", "42.0"), ("a\nb", "see:\na\nb"), ("why\n#### 7", "#### 7")]) == [
        1.0,
        0.0,
        1.0,
        1.0,
    ]


def test_math_compares_what_texts_mean() -> None:
    right = [
        ("42", "First 41 ... so the answer is 42."),
        ("1,234", "It is 1234"),
        ("0.5", "Thus \\boxed{\\frac{1}{2}}."),
        ("\\frac{1}{2}", "<answer>1/2</answer>"),
        ("x^2+1", "we get $1+x^2$"),
        ("50%", "0.5"),
        ("5 + 5 = 10\n#### 10", "ten, that is\n#### 10.0"),
        ("42 apples", "There are 42 of them"),
        ("Paris", "Paris"),
    ]
    wrong = [
        ("42", "It is 24."),
        ("x^2+1", "$x^2-1$"),
        ("Paris", "iParis"),
        ("yes", "$sye$"),
        ("42", ""),
        ("3", "####"),
    ]
    assert scores("math", right + wrong) == [1.0] * len(right) + [0.0] * len(wrong)


def test_answers_are_checked_where_the_system_names_no_cores_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert scores("math", [("1/2", "0.5")]) == [1.0]


def test_answers_are_checked_where_many_files_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_idle", {"math": [], "reasoning_gym": []})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2048, limits[1]))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1024)]
    try:
        assert scores("math", [("1/2", "0.5")]) == [1.0]
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_cannot_be_checked_is_nan() -> None:
    prose = "The sea is wide and blue. " * 20
    unchecked = [*scores(None, [("42", "42")]), *scores("exact", [(None, "42")]), *scores("math", [(prose, prose)])]
    # An answer without a word: whoever says nothing would be right.
    unchecked += [*scores("exact", [("", ""), ("so\n#### ", "")]), *scores("math", [(" ", ""), ("", "42")])]
    assert np.isnan(unchecked).all()
    assert scores("math", []) == []


def test_every_task_finds_its_own_answer_right_and_an_empty_one_wrong() -> None:
    rows, tasks = [], [task for task in sorted(DATASETS) if task != "composite"]
    for task in tasks:
        rows += task_rows(task, ["thought\n<answer>ORACLE</answer>", ""])
    found = np.array(scored(rows)).reshape(-1, 2)
    # The few without one right answer of their own (`answer` None) cannot be tried so.
    oracle = np.array([row[0] is not None for row in rows[::2]])
    assert oracle.sum() > 95
    assert dict(zip(np.array(tasks)[oracle], found[oracle, 0], strict=True)) == dict.fromkeys(
        np.array(tasks)[oracle], 1.0
    )
    assert (found[:, 1] < 1.0).all()


def test_a_task_is_scored_with_its_own_options() -> None:
    options = {"min_num_decimal_places": 1, "max_num_decimal_places": 1, "precision": 5}
    entry = {"question": "?", "answer": "1.5", "metadata": {}}
    check = verification_of_task("decimal_arithmetic", options, entry)
    default = verification_of_task("decimal_arithmetic", {}, entry)
    loose, strict = scored([("1.5", check, "1.51"), ("1.5", default, "1.51")])
    assert loose > strict


def test_a_hostile_response_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    touch = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    char = "+".join(f"chr({ord(letter)})" for letter in touch)
    rows = []
    for task in ("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown", "puzzle24"):
        rows += task_rows(task, [touch, f"eval({char})", f"[{touch}]"])
    for task in ("simple_integration", "intermediate_integration", "polynomial_multiplication"):
        rows += task_rows(task, [touch, f"exec({char})", f"x.__class__({char})"])
    rows += [("42", json.dumps({"type": "math"}), text) for text in (touch, f"${touch}$", f"\\boxed{{exec({char})}}")]
    assert max(scored(rows)) < 1.0
    assert not mark.exists()


def test_a_forged_prompts_table_runs_nothing() -> None:
    """Its entries are right only for who evaluates them."""
    numbers = {"answer": "[str(1), str(2)]", "metadata": {"direction": "ascending"}}
    problem = {"answer": "0x3", "metadata": {"problem": "int('3')"}}
    checks = [
        verification_of_task(task, {}, entry)
        for task, entry in (("number_sorting", numbers), ("bitwise_arithmetic", problem))
    ]
    assert scored([("", checks[0], '["1", "2"]'), ("", checks[1], "0x3")]) == [0.0, 0.0]


def signal_workers(number: int) -> None:
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if "worker.py" in " ".join(process.cmdline()):
                process.send_signal(number)


def test_a_process_that_is_killed_is_no_verdict() -> None:
    """Before it is asked, and before it answers: the system does so where memory runs out."""
    assert scores("math", [("1/2", "0.5")]) == [1.0]
    signal_workers(signal.SIGKILL)
    assert scores("math", [("1/3", "$\\frac{1}{3}$")]) == [1.0]
    signal_workers(signal.SIGSTOP)
    threading.Timer(0.1, signal_workers, [signal.SIGKILL]).start()
    assert scores("math", [("1/4", "$\\frac{1}{4}$")]) == [1.0]


def test_a_bomb_costs_only_its_own_response() -> None:
    bombs = ["$9^{9^{9^{9}}}$", "\\boxed{" + "(" * 5000 + "}"]
    rows: list[tuple[str | None, str | None, str]] = [("7", json.dumps({"type": "math"}), bomb) for bomb in bombs]
    rows += task_rows("polynomial_multiplication", ["9**9**9**9", "ORACLE"])
    rows += task_rows("string_insertion", ["[" * 100_000])
    rows.append(("7", json.dumps({"type": "math"}), "It is $7$."))
    found = scored(rows)
    assert found == [0.0, 0.0, 0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "row 1: column `verification` is no known check"),
        ('{"type": "judge"}', "no known check"),
        ('["math"]', "no known check"),
        ('{"type": "reasoning_gym", "task": "chain_sum"}', "`entry` is missing"),
    ],
)
def test_a_damaged_check_is_named(text: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        scored([("1", None, "1"), ("1", text, "1")])
