"""Names of stages and where each keeps its files."""

import re
from typing import NamedTuple

WARMUP = -1
"""``round`` of the SFT warm-up, which comes before round 0."""


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
    def of_folder(cls, folder: str) -> "StageKey | None":
        """Return the stage whose folder this is; None if it is none's.

        >>> StageKey.of_folder("round=001/stage=score"), StageKey.of_folder("prompts"), StageKey.of_folder("round=x/y")
        (StageKey(stage='score', round=1), StageKey(stage='prompts', round=None), None)
        """
        place, slash, stage = folder.partition("/")
        if not slash:
            return cls(place)
        if not stage.startswith("stage="):
            return None
        stage = stage.removeprefix("stage=")
        if place == "warmup":
            return cls(stage, WARMUP)
        number = re.fullmatch(r"round=([0-9]{3,9})", place)
        return None if number is None else cls(stage, int(number[1]))

    @property
    def label(self) -> str:
        """Name for people, as in Prefect's UI."""
        if self.round is None:
            return self.stage
        return f"{'warm-up' if self.round == WARMUP else f'round {self.round}'} · {self.stage}"
