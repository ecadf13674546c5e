from pathlib import Path

import pytest
import torch

from benchmarks.bill_models import MODELS, make_model
from benchmarks.bill_skills import main, skills
from benchmarks.bill_task import VOCABULARY
from tasks.language_model.loading import load_model

BILL = Path(__file__).parents[2] / "configs" / "bill"


def test_a_model_that_knows_nothing_gives_every_token_its_share() -> None:
    model = make_model(MODELS["student"][0])
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    assert list(skills(model, bills=4).values()) == pytest.approx([1 / VOCABULARY] * 10)


def test_the_teacher_goes_on_after_every_stray_and_a_student_that_never_saw_one_does_not() -> None:
    teacher, student = (
        skills(load_model(BILL / name, dtype="float32"), bills=16) for name in ("teacher-any-stray", "student-wide")
    )
    assert min(teacher.values()) > 0.9
    assert student["article"] > 0.95
    assert student["price"] < 0.95
    assert max(value for name, value in student.items() if name.startswith("after ")) < 0.5


def test_it_prints_a_line_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(BILL / "student"), str(BILL / "teacher"), "--bills", "2"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("| model | article | price |")
    assert [line.split(" | ")[0] for line in printed[2:]] == [f"| {BILL / name}" for name in ("student", "teacher")]
    assert len({line.count("|") for line in printed}) == 1
