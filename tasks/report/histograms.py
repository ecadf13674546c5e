"""Counts over a fixed fine grid, so that memory does not grow with the samples; shown with fewer, wider bins."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """``bins`` equal bins from ``low`` to ``high``; values beyond the ends count in the first or last bin."""

    low: float
    high: float
    bins: int

    @property
    def width(self) -> float:
        """Width of a bin."""
        return (self.high - self.low) / self.bins

    def places(self, values: Values) -> Counts:
        """Return each value's bin, same shape; the values are finite."""
        return np.clip((values - self.low) / self.width, 0, self.bins - 1).astype(np.int64)

    def count(self, values: Values) -> Counts:
        """Return the values in each bin [bins]."""
        return np.bincount(self.places(values), minlength=self.bins)

    def quantile(self, counts: Counts, share: float) -> float:
        """Return the upper edge of the bin in which a share of all ``counts`` [bins] is reached."""
        reached = np.searchsorted(np.cumsum(counts), share * counts.sum())
        return self.low + (min(int(reached), self.bins - 1) + 1) * self.width

    def window(self, counts: Counts, shown: int, keep: tuple[float, ...] = ()) -> "Window":
        """Return about ``shown`` wider bins over where nearly all ``counts`` [bins] lie, and over the values ``keep``.

        A value of ``keep`` far away from every count does not stretch the window.
        """
        low, high = self.quantile(counts, 0.004) - self.width, self.quantile(counts, 0.996)
        room = max(high - low, 8 * self.width)
        near = [value for value in keep if low - room < value < high + room]
        first = int(self.places(np.array([min([low, *near]) - 0.04 * room]))[0])
        last = int(self.places(np.array([max([high, *near]) + 0.04 * room]))[0])
        group = max(1, -(-(last + 1 - first) // shown))
        if near:
            # An edge on the first of the kept values, so that no bar stands on both sides of it.
            first = max(first - (first - round((near[0] - self.low) / self.width)) % group, 0)
        return Window(self, first, group, -(-(last + 1 - first) // group))


@dataclass(frozen=True)
class Window:
    """Part of a grid with wider bins: ``bins`` of them, each of ``group`` bins of the grid, the first at ``first``."""

    grid: Grid
    first: int
    group: int
    bins: int

    @property
    def edges(self) -> Values:
        """Edges of the bins [bins + 1]."""
        places = self.first + self.group * np.arange(self.bins + 1, dtype=np.float64)
        return np.asarray(self.grid.low + places * self.grid.width, np.float64)

    @property
    def range(self) -> tuple[float, float]:
        """First and last edge."""
        edges = self.edges
        return float(edges[0]), float(edges[-1])

    def sum(self, counts: NDArray[Any], axis: int = 0) -> NDArray[Any]:
        """Return ``counts`` [..., grid.bins, ...] in the wider bins; what lies beyond the window goes in its end bins.

        >>> Window(Grid(0.0, 6.0, 6), first=1, group=2, bins=2).sum(np.array([1, 1, 1, 0, 2, 1])).tolist()
        [3, 3]
        """
        starts = self.first + self.group * np.arange(self.bins)
        starts[0] = 0
        summed: NDArray[Any] = np.add.reduceat(counts, np.minimum(starts, self.grid.bins - 1), axis=axis)
        return summed
