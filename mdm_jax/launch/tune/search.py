"""Successive halving over a few numbers, with new points around the best of each rung."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

FACTOR = 3
"""How many times longer the runs of the next rung are, and how many times fewer."""
RUNGS = 2
"""Rungs before the last runs, which are of full length."""


class Range(NamedTuple):
    """A setting by name, and between which values it is searched."""

    name: str
    low: float
    high: float


class Rung(NamedTuple):
    """``runs`` runs of ``steps`` training steps each."""

    steps: int
    runs: int


Point = tuple[float, ...]
"""A value for each range; () for the settings as they were, which are a candidate too."""

Evaluate = Callable[[Point, int], np.ndarray]
"""``evaluate(point, steps) -> distances [R]`` after training: replicates, whose random numbers are
the same for all points, along the best grid that was found for each. Smaller is better."""


class Tried(NamedTuple):
    """One run of the search: distances are those of :data:`Evaluate`."""

    steps: int
    point: Point
    distances: np.ndarray

    @property
    def score(self) -> float:
        """The mean; NaN counts as +inf."""
        mean = float(np.mean(self.distances))
        return math.inf if math.isnan(mean) else mean


def rungs(budget: int, steps: int, seeds: int) -> list[Rung]:
    """Rungs of a search in ``budget`` training steps, all runs together.

    They leave 2 ``seeds`` runs of ``steps`` for what follows, a comparison of the best with the
    start. Each rung has the same share. ValueError with the least budget if one would be too small.
    """
    lengths = [max(1, steps // FACTOR**k) for k in range(RUNGS, 0, -1)]
    left = budget - 2 * seeds * steps
    found = [Rung(length, max(0, left) // RUNGS // length) for length in lengths]
    if found[-1].runs < 2:
        least = 2 * seeds * steps + RUNGS * 2 * lengths[-1]
        raise ValueError(
            f"a budget of {budget} training steps is too small for {seeds} paired runs of {steps} "
            f"steps and a search before them; give --budget={least} or more, fewer --paired_seeds, "
            "or fewer steps with --config.train.steps"
        )
    return found


def halving(evaluate: Evaluate, ranges: Sequence[Range], rungs: Sequence[Rung]) -> list[Tried]:
    """All runs in order; the best is the least score of the last rung (:func:`best`).

    The first rung has the settings as they were and points spread evenly over the ranges. Of each
    further one, half are the best of the rung before, with the same values; the others are new,
    spread over a box around the best, each time half as wide. ValueError without ranges or rungs.
    """
    if not ranges or not rungs:
        raise ValueError("halving needs at least one range and one rung")
    low, high = np.array([[r.low, r.high] for r in ranges]).T
    drawn, width = 0, high - low
    middle, kept = 0.5 * (low + high), [()]
    tried: list[Tried] = []
    for number, rung in enumerate(rungs):
        count = rung.runs - len(kept)
        new = middle + (_spread(drawn, count, len(ranges)) - 0.5) * width
        drawn += count
        points = kept + [_rounded(point) for point in np.clip(new, low, high)]
        tried += [Tried(rung.steps, point, evaluate(point, rung.steps)) for point in points]
        ranked = sorted(tried[-len(points) :], key=lambda each: each.score)
        following = rungs[min(number + 1, len(rungs) - 1)]
        kept = [each.point for each in ranked[: max(1, following.runs // 2)]]
        middle = np.array(next(each.point for each in ranked if each.point))
        width = width / 2
    return tried


def best(tried: Sequence[Tried]) -> Tried:
    """The least score among runs of as many steps as the last."""
    return min((t for t in tried if t.steps == tried[-1].steps), key=lambda each: each.score)


def _spread(start: int, count: int, dimensions: int) -> np.ndarray:
    """[count, dimensions] in [0, 1): an additive recurrence of low discrepancy.

    Its steps are powers of the root of ``x^(d + 1) = x + 1`` (Roberts 2018).
    """
    root = 1.5
    for _ in range(60):
        root = (1 + root) ** (1 / (dimensions + 1))
    steps = root ** -np.arange(1.0, dimensions + 1)
    return (0.5 + (1 + start + np.arange(count))[:, None] * steps) % 1


def _rounded(point: np.ndarray) -> Point:
    """Four significant digits, so that a command line shows what was run."""
    return tuple(float(f"{value:.4g}") for value in point)
