"""Which differences in accuracy a set of held-out prompts can tell from noise."""

import math
from collections.abc import Iterable
from statistics import NormalDist

CONFIDENCE = 0.95
"""Two-sided confidence at which a difference counts as told from noise."""

TARGET = 0.02
"""The difference a held-out set should be able to tell: 2 points of accuracy."""


def detectable_difference(accuracy: float, prompts: int) -> float:
    """Return the smallest difference between two models' accuracies whose 95% interval leaves out 0.

    d = z · sqrt(2 p (1 − p) / n), the normal interval for the difference of two independent binomial proportions of
    about the same p. For p stands (n·accuracy + z²/2) / (n + z²) (Agresti and Coull 1998), since an accuracy of 0 or 1
    on few prompts does not mean that there is no noise. Models that tend to solve the same prompts are told apart by
    less when compared prompt by prompt, so this is the cautious figure for a paired comparison.

    >>> round(detectable_difference(0.5, 4802), 4), round(detectable_difference(0.5, 32), 2)
    (0.02, 0.24)
    """
    return _z() * math.sqrt(2 * _variance(accuracy, prompts) / prompts)


def prompts_needed(accuracy: float, prompts: int, difference: float = TARGET) -> int:
    """Return how many prompts would tell ``difference``, given the accuracy on ``prompts``: 2 p (1 − p) (z / d)².

    >>> prompts_needed(0.5, 100)
    4802
    """
    return math.ceil(2 * _variance(accuracy, prompts) * (_z() / difference) ** 2)


def noisiest_accuracy(accuracies: Iterable[float]) -> float:
    """Return the accuracy with most noise in the range of the given ones: the nearest to one half.

    A student begins at the start's accuracy and moves towards the teacher's, so what is promised from those two has
    to hold between them.

    >>> noisiest_accuracy([0.9, 0.1]), noisiest_accuracy([0.2, 0.3]), noisiest_accuracy([0.8])
    (0.5, 0.3, 0.8)
    """
    known = list(accuracies)
    return min(max(0.5, min(known)), max(known))


def _z() -> float:
    return NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


def _variance(accuracy: float, prompts: int) -> float:
    z2 = _z() ** 2
    p = (accuracy * prompts + z2 / 2) / (prompts + z2)
    return p * (1 - p)
