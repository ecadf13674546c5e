import pytest

from schemas.stage_key import WARMUP, StageKey


@pytest.mark.parametrize(
    "key", [StageKey("prompts"), StageKey("train", WARMUP), StageKey("score", 0), StageKey("a", 1234)]
)
@pytest.mark.parametrize("inside", ["", "manifest.json", "model/config.json"])
def test_a_stage_is_found_again_by_its_files(key: StageKey, inside: str) -> None:
    assert StageKey.of_file(f"{key.folder}/{inside}") == key


@pytest.mark.parametrize("name", ["round=x/stage=score/a", "round=1/stage=score/a", "round=000/score/a", "run.json"])
def test_other_files_are_of_no_stage(name: str) -> None:
    assert StageKey.of_file(name) is None


def test_what_lies_beside_the_stages_is_of_none_of_them() -> None:
    assert StageKey.of_file("logs/stage=a/b=c") == StageKey("logs")
