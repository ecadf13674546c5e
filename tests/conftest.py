import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-layer teacher with a padded vocabulary (264 rows for 259 tokens)."""
    from tests.tiny_models import make_model, save_model

    return save_model(tmp_path_factory.mktemp("teacher"), make_model(seed=1, layers=4, vocab_size=264))


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer student sharing the teacher's tokenizer."""
    from tests.tiny_models import make_model, save_model

    return save_model(tmp_path_factory.mktemp("student"), make_model(seed=2, layers=2))


SLOW_LAST = ("engine", "server", "e2e")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run quick tests first, so that a mistake shows early; what needs a whole run of the command line comes later."""

    def rank(item: pytest.Item) -> int:
        marked = [index for index, name in enumerate(SLOW_LAST, start=2) if item.get_closest_marker(name)]
        return max(marked) if marked else int("finished_run" in getattr(item, "fixturenames", ()))

    items.sort(key=rank)
