"""Names of stages and where each keeps its files."""

import re
from typing import NamedTuple

WARMUP = -1
"""``round`` of the SFT warm-up, which comes before round 0."""


_FOLDER = re.compile(r"(?:(?:warmup|round=([0-9]{3,9}))/stage=([a-z_]+)|([a-z_]+))/")


class StageKey(NamedTuple):
    """One stage of one round; ``round`` is None for stages the whole run shares and WARMUP for the warm-up.

    Rounds count from 0, as in the folder names.

    >>> StageKey("score", 1).folder, StageKey("score", 1).label
    ('round=001/stage=score', 'round 1 · score')
    >>> StageKey("prompts").folder, StageKey("train", WARMUP).folder
    ('prompts', 'warmup/stage=train')
    """

    stage: str
    round: int | None = None

    @property
    def folder(self) -> str:
        """Path below the run's folder."""
        if self.round is None:
            return self.stage
        if self.round == WARMUP:
            return f"warmup/stage={self.stage}"
        return f"round={self.round:03d}/stage={self.stage}"

    @classmethod
    def of_file(cls, name: str) -> "StageKey | None":
        """Return the stage in whose folder a run's file lies; None if it lies in none that a stage could have.

        >>> StageKey.of_file("round=001/stage=score/part-00000.parquet"), StageKey.of_file("prompts/manifest.json")
        (StageKey(stage='score', round=1), StageKey(stage='prompts', round=None))
        """
        found = _FOLDER.match(name)
        if found is None:
            return None
        number, stage, shared = found.groups()
        if shared is not None:
            return cls(shared)
        return cls(stage, WARMUP if number is None else int(number))

    @property
    def label(self) -> str:
        """Name for people, as in Prefect's UI."""
        if self.round is None:
            return self.stage
        return f"{'warm-up' if self.round == WARMUP else f'round {self.round}'} · {self.stage}"
