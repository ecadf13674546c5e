"""Models that no method trained, beside which methods are seen."""

from dataclasses import dataclass

from schemas.config import RunConfig
from schemas.run_store import RunStore
from schemas.stage_key import WARMUP, StageKey
from tasks.comparison.outcome import Scores, read_kl, read_scores
from tasks.graph import BASELINE


@dataclass(frozen=True)
class Landmark:
    """A model that no method trained.

    Args:
        method: Its name in the table.
        title: For people.
        role: `teacher` or `start`.
        scores: Of its responses.
        kl: Held-out KL(teacher || it) and its standard error, nats per token; None for the teacher.
    """

    method: str
    title: str
    role: str
    scores: Scores
    kl: tuple[float, float] | None = None


def read_landmarks(store: RunStore, config: RunConfig) -> list[Landmark]:
    """Return teacher, starting student, and the warmed-up student that the methods start from.

    Args:
        store: The run that all methods start from, as far as its warmed-up student.
        config: Its config.

    Raises:
        ArtifactError: a stage has not finished, or a table is damaged.
    """
    evaluate = StageKey("evaluate", WARMUP)
    found = [Landmark("teacher", "teacher", "teacher", read_scores(store, BASELINE, "teacher"))]
    if config.warmup is not None:
        scores, kl = read_scores(store, BASELINE, "start"), read_kl(store, BASELINE, "start")
        found.append(Landmark("start", "untrained student", "start", scores, kl))
    scores, kl = read_scores(store, evaluate, "student"), read_kl(store, evaluate, "student")
    return [*found, Landmark("warm-up", "warmed-up student", "start", scores, kl)]
