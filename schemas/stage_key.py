"""Names of stages and where each keeps its files."""

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

    @property
    def label(self) -> str:
        """Name for people, as in Prefect's UI."""
        if self.round is None:
            return self.stage
        return f"{'warm-up' if self.round == WARMUP else f'round {self.round}'} · {self.stage}"
