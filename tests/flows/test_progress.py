"""How often Prefect's server is told how far a stage is."""

import logging
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import prefect.artifacts
import pytest

import flows.progress
from flows.progress import ProgressArtifact
from schemas.stage_key import StageKey
from tests.run_fixtures import make_config


def test_a_stage_that_takes_a_day_is_told_of_often_at_first_and_then_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, told = 1000.0, []

    def update(artifact: object, progress: float, description: str) -> None:
        told.append(now - 1000.0)

    monkeypatch.setattr(prefect.artifacts, "create_progress_artifact", lambda *_: uuid4())
    monkeypatch.setattr(prefect.artifacts, "update_progress_artifact", update)
    monkeypatch.setattr(flows.progress, "time", SimpleNamespace(monotonic=lambda: now))
    artifact = ProgressArtifact(make_config(tmp_path), StageKey("train", 0), logging.getLogger())
    day = 24 * 60 * 60
    for second in range(1, day + 1):
        now = 1000.0 + second
        artifact.progressed(second, day, "steps")
    assert told[:5] == [2, 4, 6, 8, 10]
    assert len(told) < 1000
    # Never later than a hundredth of the stage's time so far, and a progress event.
    assert all(later - earlier <= max(2, 0.01 * later) + 1 for earlier, later in pairwise(told))
