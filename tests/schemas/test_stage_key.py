import pytest

from schemas.stage_key import WARMUP, StageKey


@pytest.mark.parametrize(
    "key", [StageKey("prompts"), StageKey("train", WARMUP), StageKey("score", 0), StageKey("a", 1234)]
)
def test_a_stage_is_found_again_by_its_folder(key: StageKey) -> None:
    assert StageKey.of_folder(key.folder) == key


@pytest.mark.parametrize(
    "folder", ["round=x/stage=score", "round=1/stage=score", "round=000/score", "logs/stage=a/b=c"]
)
def test_other_folders_are_no_stages(folder: str) -> None:
    assert StageKey.of_folder(folder) is None
