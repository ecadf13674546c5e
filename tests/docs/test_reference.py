import pytest

from docs.write_reference import PARTS, Generated


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.path.name)
def test_the_generated_part_of_a_document_is_current(part: Generated) -> None:
    text = part.path.read_text(encoding="utf-8")
    assert part.updated(text) == text, "run `make docs`"
