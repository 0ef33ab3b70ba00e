"""Align Your Steps: a sampling grid by coordinate search on a sum of interval costs."""

from typing import NamedTuple

import numpy as np

from mdm_jax.samplers.klub import IntervalCost, check_levels, klub
from mdm_jax.typing import ArrayLike


class AlignedSteps(NamedTuple):
    """What :func:`align_steps` found.

    Attributes:
        grid: [N + 1] float64 levels, strictly increasing, with the ends of the start.
        cost: the grid's total cost, nats.
        trace: total cost before the first and after each sweep. It falls, except where steps were
            doubled: ``doubled`` holds those places.
        doubled: indices into the trace, first entries of a longer grid.
    """

    grid: np.ndarray
    cost: float
    trace: list[float]
    doubled: list[int]


def align_steps(
    cost: IntervalCost,
    start: ArrayLike,
    *,
    doublings: int = 0,
    candidates: int = 11,
    refinements: int = 20,
    max_sweeps: int = 200,
    tolerance: float = 1e-9,
) -> AlignedSteps:
    """Moves the inner levels of a grid until no candidate lowers the cost, then doubles the steps.

    A sweep looks for each inner level at equally spaced candidates around it, at first between its
    two neighbours, and keeps the best; every second level moves at once, since a level's cost
    depends on its neighbours only. When a sweep no longer helps, the window around each level is
    halved, ``refinements`` times. Doubling inserts the midpoints in logSNR. With an estimated cost,
    stop early (few refinements): the search fits the noise otherwise.

    Sabour et al. 2024 (arXiv 2404.14507), section 3 and appendix.

    Args:
        cost: such as :func:`~mdm_jax.samplers.klub.pair_cost`.
        start: [N + 1] finite levels, strictly increasing; the ends stay.
        doublings: how often to double N.
        candidates: levels tried per move, odd, so that the present one is among them.
        refinements: how often to halve the window.
        max_sweeps: at most so many sweeps per window.
        tolerance: relative fall of the cost below which a sweep does not count as helping.

    Raises:
        ValueError: for a bad start or settings out of range.
    """
    levels = check_levels(start)
    if candidates < 3 or candidates % 2 == 0:
        raise ValueError(f"align_steps needs an odd number of candidates >= 3, got {candidates}")
    if min(doublings, refinements) < 0 or max_sweeps < 1 or tolerance < 0:
        raise ValueError(
            "align_steps needs doublings, refinements, tolerance >= 0 and max_sweeps >= 1, got "
            f"{doublings}, {refinements}, {tolerance}, {max_sweeps}"
        )
    trace, doubled = [klub(cost, levels)], []
    for doubling in range(doublings + 1):
        if doubling:
            levels = _insert_midpoints(levels)
            doubled.append(len(trace))
            trace.append(klub(cost, levels))
        for refinement in range(refinements + 1):
            for _ in range(max_sweeps):
                levels = _sweep(cost, levels, candidates, 0.5**refinement)
                trace.append(klub(cost, levels))
                if trace[-2] - trace[-1] <= tolerance * abs(trace[-2]):
                    break
    return AlignedSteps(levels, trace[-1], trace, doubled)


def _sweep(cost: IntervalCost, levels: np.ndarray, candidates: int, window: float) -> np.ndarray:
    levels = levels.copy()
    # Fractions of the way to the neighbour, 0 included, the neighbours themselves not.
    reach = window * np.linspace(-1, 1, candidates + 2)[1:-1]
    for first in (1, 2):
        middle = np.arange(first, levels.size - 1, 2)
        if not middle.size:
            continue
        left, here, right = (levels[middle + i][:, None] for i in (-1, 0, 1))
        tried = here + np.where(reach < 0, reach * (here - left), reach * (right - here))
        left, right = np.broadcast_to(left, tried.shape), np.broadcast_to(right, tried.shape)
        total = cost(
            np.concatenate([left.ravel(), tried.ravel()]),
            np.concatenate([tried.ravel(), right.ravel()]),
        )
        total = total.reshape(2, *tried.shape).sum(0)
        best = np.argmin(total, axis=1)
        moved, stay = np.arange(middle.size), candidates // 2
        better = total[moved, best] < total[:, stay]
        levels[middle] = tried[moved, np.where(better, best, stay)]
    return levels


def _insert_midpoints(levels: np.ndarray) -> np.ndarray:
    longer = np.empty(2 * levels.size - 1)
    longer[::2], longer[1::2] = levels, 0.5 * (levels[1:] + levels[:-1])
    return longer
