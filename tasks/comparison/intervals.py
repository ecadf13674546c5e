"""Intervals of a mean over seeds and prompts: both are samples of what could have been, and cross each other."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

CONFIDENCE = 0.95

_SQUARE = 1.959963984540054**2
"""Of the normal distribution's quantile at 0.975."""


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


@cache
def _quadrature() -> tuple[Float64, Float64]:
    """Return nodes and weights of Gauss-Legendre quadrature on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(200)
    return nodes, weights


def t_quantile(probability: float, freedom: float) -> float:
    """Return the quantile of Student's t, for a probability above 1/2 and any positive degrees of freedom.

    With t = sqrt(v) tan(a), P(|T| < t) = 2 c int_0^a cos(x)^(v-1) dx, c = Gamma((v+1)/2) / (sqrt(pi) Gamma(v/2))
    (Abramowitz & Stegun 26.7.3); the angle is found by bisection.
    """
    nodes, weights = _quadrature()
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def inside(angle: float) -> float:
        places = angle * (nodes + 1) / 2
        return float(2 * scale * angle / 2 * (weights * np.cos(places) ** (freedom - 1)).sum())

    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 2 * probability - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def crossed_interval(values: Float64, *, share: bool = False) -> Interval:
    """Return the mean of ``values`` with an interval over both its axes, seeds and prompts.

    Two-way random effects without replication: x_sp = m + a_s + b_p + e_sp. From the mean squares of seeds, prompts and
    residuals, S = MS_s / (n m), P = MS_p / (n m), E = MS_e / (n m) with n seeds and m prompts,

        Var(mean) = E + max(S - E, 0) + max(P - E, 0)

    which is S + P - E, the unbiased estimate, unless a component would be negative (Searle, Casella & McCulloch 1992,
    ch. 4). The interval is a t interval with Satterthwaite's degrees of freedom. With one seed it is over prompts
    alone: what another seed would give is then not known. Where all values are equal their spread says nothing; the
    interval then reaches as far as Wilson's does for a share of 0 of as many prompts.

    Args:
        values: float64 [seeds, prompts], no NaN.
        share: They are from 0 to 1, and so are the ends; else they are differences, from -1 to 1.
    """
    seeds, prompts = values.shape
    mean = float(values.mean())
    if prompts < 2:
        return Interval(mean, math.nan, math.nan)
    # Not compared with their mean, which is rounded.
    if (values == values[0, 0]).all():
        reach, lowest = _SQUARE / (prompts + _SQUARE), 0.0 if share else -1.0
        return Interval(mean, max(mean - reach, lowest), min(mean + reach, 1.0))
    by_seed, by_prompt = values.mean(axis=1), values.mean(axis=0)
    of_prompts = seeds * ((by_prompt - mean) ** 2).sum() / (prompts - 1) / (seeds * prompts)
    if seeds == 1:
        return _t_interval(mean, of_prompts, prompts - 1, share)
    of_seeds = prompts * ((by_seed - mean) ** 2).sum() / (seeds - 1) / (seeds * prompts)
    residuals = values - by_seed[:, None] - by_prompt[None, :] + mean
    freedom = (seeds - 1) * (prompts - 1)
    of_rest = (residuals**2).sum() / freedom / (seeds * prompts)
    parts = [(of_seeds, seeds - 1), (of_prompts, prompts - 1)]
    above = [(part, degrees) for part, degrees in parts if part > of_rest]
    # E is in each of S and P: with both of them it counts -1, with one 0, with neither +1.
    parts = [*above, ((1 - len(above)) * of_rest, freedom)]
    variance = sum(part for part, _ in parts)
    spread = sum(part**2 / degrees for part, degrees in parts)
    return _t_interval(mean, variance, variance**2 / spread, share)


def _t_interval(mean: float, variance: float, freedom: float, share: bool) -> Interval:
    half = t_quantile((1 + CONFIDENCE) / 2, freedom) * math.sqrt(variance)
    return Interval(mean, max(mean - half, 0.0 if share else -1.0), min(mean + half, 1.0))
