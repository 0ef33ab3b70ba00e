"""Sampling grids by black-box search on a metric of the samples, in the manner of WaveGrad.

The metric is any ``metric(grid [N + 1] float64) -> float``, smaller is better; it should use the
same random numbers at every call, so that grids are compared and not their luck. Chen et al. 2021
(WaveGrad, arXiv 2009.00713) searched the noise levels of a 6-step sampler exhaustively.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mdm_jax.samplers.klub import check_levels
from mdm_jax.typing import ArrayLike

Metric = Callable[[np.ndarray], float]


class Improvement(NamedTuple):
    """A grid that was the best so far.

    Attributes:
        evaluation: number of the call of the metric, from 0.
        value: of the metric.
        grid: [N + 1].
    """

    evaluation: int
    value: float
    grid: np.ndarray


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
        grid: [N + 1] float64, the best grid.
        value: the metric there.
        trace: every improvement, in order; the last is the result.
        evaluations: calls of the metric.
        converged: whether the search ran to its end, rather than out of its budget.
    """

    grid: np.ndarray
    value: float
    trace: list[Improvement]
    evaluations: int
    converged: bool


def exhaustive_search(
    metric: Metric, candidates: ArrayLike, num_inner: int, low: float, high: float, budget: int
) -> SearchResult:
    """Tries every choice of ``num_inner`` of the candidates as the inner levels of a grid.

    Args:
        metric: to be minimised; a NaN never is the best.
        candidates: [M] increasing levels strictly between low and high.
        num_inner: N - 1, inner levels of the grid.
        low: first level.
        high: last level.
        budget: calls of the metric allowed; M choose N - 1 are made.

    Raises:
        ValueError: for unusable candidates, a budget that does not suffice, or a metric that is
            NaN everywhere.
    """
    inner = check_levels([low, *np.asarray(candidates, np.float64), high])[1:-1]
    if not 1 <= num_inner <= inner.size:
        raise ValueError(f"num_inner must be in [1, {inner.size}], got {num_inner}")
    calls = math.comb(inner.size, num_inner)
    if calls > budget:
        raise ValueError(
            f"{inner.size} candidates for {num_inner} levels make {calls} grids, above the budget "
            f"of {budget}; use fewer candidates or pattern_search"
        )
    record = _Record(metric)
    for chosen in itertools.combinations(inner, num_inner):
        record.consider(np.array([low, *chosen, high], np.float64))
    return record.result(converged=True)


def pattern_search(
    metric: Metric,
    start: ArrayLike,
    budget: int,
    *,
    step: float = 1.0,
    smallest_step: float = 1e-6,
) -> SearchResult:
    """Moves one inner level at a time by a fixed step while that helps, then halves the step.

    Levels do not cross: a move past a neighbour is not tried.

    Args:
        metric: to be minimised; a NaN never is the best.
        start: [N + 1] finite levels, strictly increasing; the ends stay.
        budget: calls of the metric allowed, at least 1.
        step: first step, in logSNR.
        smallest_step: the search has converged when the step falls below this.

    Raises:
        ValueError: for a bad start, budget or steps, or a metric that is NaN at the start and
            everywhere the search went.
    """
    levels = check_levels(start)
    if budget < 1 or not 0 < smallest_step <= step:
        raise ValueError(
            "pattern_search needs budget >= 1 and 0 < smallest_step <= step, got "
            f"{budget}, {smallest_step}, {step}"
        )
    record = _Record(metric)
    record.consider(levels)
    while step >= smallest_step:
        improved = False
        for place, sign in itertools.product(range(1, levels.size - 1), (1.0, -1.0)):
            moved = levels.copy()
            moved[place] += sign * step
            if not levels[place - 1] < moved[place] < levels[place + 1]:
                continue
            if record.evaluations == budget:
                return record.result(converged=False)
            if record.consider(moved):
                levels, improved = moved, True
        if not improved:
            step /= 2
    return record.result(converged=True)


class _Record:
    """Counts calls of a metric and remembers improvements."""

    def __init__(self, metric: Metric):
        self.metric, self.evaluations, self.trace = metric, 0, []

    def consider(self, grid: np.ndarray) -> bool:
        """Whether the grid is the best so far."""
        value = float(self.metric(grid))
        better = value < (self.trace[-1].value if self.trace else math.inf)
        if better:
            self.trace.append(Improvement(self.evaluations, value, grid.copy()))
        self.evaluations += 1
        return better

    def result(self, converged: bool) -> SearchResult:
        if not self.trace:
            raise ValueError(f"the metric was not below infinity in {self.evaluations} calls")
        last = self.trace[-1]
        return SearchResult(last.grid, last.value, self.trace, self.evaluations, converged)
