"""Data-driven choice of the range of masking rates for block diffusion (BD3-LM).
Small blocks train with less noise on part of (0, 1) (Arriola et al. 2025). Validation data choose
the range of smallest score (first of equals) for ``variance.clipped`` or, exact,
``variance.clipped_mixture``. Unlike the published search, ranges above 1/2 keep the weight 1/m, and
masks are not redrawn (without correction) until the masked fraction is in the range.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.distributed import to_host
from mdm_jax.draws import Draw, DrawSpec, iid
from mdm_jax.meter.levels import base_density
from mdm_jax.meter.subject import ApplyFn, Progress, gradient_deviations, make_estimator
from mdm_jax.objectives.objective import Objective
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree
from mdm_jax.variance.warps import ClippedDensity

SMALLEST_RATE = 1e-3
"""Lower end of the widest candidate."""

_WIDTHS = (50, 60, 70, 80, 90)  # percent
_STEP = 5

Interval = tuple[float, float]
Score = Callable[[PyTree, Sequence[Batch], Array, Sequence[Interval], Progress | None], np.ndarray]
"""``score(params, batches, key, intervals, progress) -> [intervals]``."""

Criterion = Callable[[ApplyFn, Objective, DrawSpec], Score]
"""``criterion(apply_fn, objective, spec) -> score``; compiles at the first call of ``score``."""


class ClipChoice(NamedTuple):
    """Outcome of a search among ``intervals``; scores that are not finite are None."""

    low: float
    high: float
    criterion: str
    block_size: int
    step: int
    intervals: tuple[Interval, ...]
    scores: tuple[float | None, ...]

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {
            "intervals": [list(i) for i in self.intervals],
            "scores": list(self.scores),
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "ClipChoice":
        """Inverse of :meth:`to_dict`; ValueError if a field is missing or unknown."""
        if set(record) != set(cls._fields):
            raise ValueError(
                f"a clip choice has the fields {', '.join(cls._fields)}, got "
                f"{', '.join(sorted(record))}"
            )
        intervals = tuple((float(low), float(high)) for low, high in record["intervals"])
        return cls(**record | {"intervals": intervals, "scores": tuple(record["scores"])})


def candidate_intervals(block_size: int) -> tuple[Interval, ...]:
    """The 36 published candidates: the whole range, and widths from 0.5 to 0.9 in steps of 0.05.
    For blocks of one token only the whole range and (0.999, 1). ValueError unless block_size >= 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if block_size == 1:
        return ((SMALLEST_RATE, 1.0), (1.0 - SMALLEST_RATE, 1.0))
    # In percent, so that no end is off by a rounding.
    ranges = [(low, low + w) for w in _WIDTHS for low in range(0, 101 - w, _STEP)]
    narrow = tuple((max(low / 100, SMALLEST_RATE), high / 100) for low, high in ranges)
    return ((SMALLEST_RATE, 1.0), *narrow)


def reachable_counts(block_size: int, low: float, high: float) -> range:
    """Numbers k >= 1 of masked tokens whose fraction k / block_size lies in [low, high]."""
    slack = 1e-9  # 0.3 * 10 is 3.0000000000000004
    first = max(1, math.ceil(low * block_size - slack))
    return range(first, min(block_size, math.floor(high * block_size + slack)) + 1)


def check_feasible(block_size: int, low: float, high: float) -> None:
    """Raises ValueError unless 0 <= low < high <= 1 and a number of masked tokens is within."""
    if block_size < 1 or not 0 <= low < high <= 1:
        raise ValueError(
            f"a range of masking rates needs 0 <= low < high <= 1, got {low}, {high} for blocks of "
            f"{block_size}"
        )
    if not reachable_counts(block_size, low, high):
        raise ValueError(
            f"no number of masked tokens out of {block_size} has a fraction in [{low}, {high}]; "
            "widen the range or take larger blocks"
        )


def make_clip_search(
    apply_fn: ApplyFn,
    objective: Objective,
    batch_shape: tuple[int, int],
    *,
    criterion: Criterion | None = None,
    intervals: Sequence[Interval] | None = None,
) -> Callable[..., ClipChoice]:
    """``search(params, batches, key, step=0, progress=None) -> ClipChoice``, compiled once.

    Scores ranges of the masking rate on at least two batches of ``batch_shape`` = (rows, length)
    (published: 100), with the same rows and base noise; blocks draw rates independently.
    ``apply_fn`` is without dropout; ``objective`` has one level per block and a uniform law of the
    rate. By default ``criterion`` is :func:`gradient_noise_to_signal` (a pass over the batches per
    range), ``intervals`` are :func:`candidate_intervals`; ``step``, of the parameters, is only
    recorded.
    Raises: ValueError if the law is not uniform or a range is infeasible; in ``search``, if there
    are fewer than two batches or no score is finite.
    """
    rows, length = batch_shape
    spec = objective.spec(rows, length)
    block_size = length // spec.num_levels
    if not np.allclose(base_density(objective, np.array([0.1, 0.5, 0.9])), 1.0, rtol=1e-3):
        raise ValueError(
            "the search draws masking rates uniformly from a range; give an objective with a "
            "uniform law (linear schedule), not one that prefers some rates already"
        )
    candidates = candidate_intervals(block_size) if intervals is None else tuple(intervals)
    for low, high in candidates:
        check_feasible(block_size, low, high)
    criterion = gradient_noise_to_signal if criterion is None else criterion
    score = criterion(apply_fn, objective, spec)

    def search(
        params: PyTree,
        batches: Sequence[Batch],
        key: Array,
        step: int = 0,
        progress: Progress | None = None,
    ) -> ClipChoice:
        if len(batches) < 2:
            raise ValueError(f"at least 2 batches are needed to score a range, got {len(batches)}")
        scores = score(params, batches, key, candidates, progress)
        if not np.any(np.isfinite(scores)):
            raise ValueError(f"no range has a finite score under {criterion.__name__}")
        best = int(np.argmin(np.where(np.isfinite(scores), scores, np.inf)))
        return ClipChoice(
            *candidates[best],
            criterion=criterion.__name__,
            block_size=block_size,
            step=step,
            intervals=candidates,
            scores=tuple(float(s) if np.isfinite(s) else None for s in scores),
        )

    return search


def raw_variance(apply_fn: ApplyFn, objective: Objective, spec: DrawSpec) -> Score:
    """Variance of the block losses, data variance included, nats per token squared; as published.
    Favours high, narrow ranges, as it is not relative to their mean loss.
    """
    moments = block_loss_moments(apply_fn, objective, spec)
    return lambda *arguments: moments(*arguments).variance


def relative_variance(apply_fn: ApplyFn, objective: Objective, spec: DrawSpec) -> Score:
    """:func:`raw_variance` over the squared mean loss."""
    moments = block_loss_moments(apply_fn, objective, spec)

    def score(*arguments: Any) -> np.ndarray:
        measured = moments(*arguments)
        return measured.variance / measured.mean**2

    return score


def gradient_noise_to_signal(apply_fn: ApplyFn, objective: Objective, spec: DrawSpec) -> Score:
    """``tr Cov(G) / |E G|^2`` of the batch gradient, with data noise; infinite without signal."""
    estimator = make_estimator(apply_fn, objective)

    @jax.jit
    def draw(key: Array, interval: Array) -> Draw:
        return _in_interval(iid(stream(key, "draw"), spec), interval)

    def score(
        params: PyTree,
        batches: Sequence[Batch],
        key: Array,
        intervals: Sequence[Interval],
        progress: Progress | None = None,
    ) -> np.ndarray:
        placed = [jax.tree.map(jnp.asarray, batch) for batch in batches]

        def drawn(interval: np.ndarray) -> Iterator[tuple[Batch, Draw]]:
            for number, batch in enumerate(placed):
                yield batch, draw(jax.random.fold_in(key, number), interval)
                if progress is not None:
                    progress(1)

        scores = []
        for interval in np.asarray(intervals, np.float32):
            terms, square = gradient_deviations(estimator, params, drawn(interval))
            noise = float(np.mean(terms))
            signal = square - noise / len(placed)
            scores.append(noise / signal if signal > 0 else math.inf)
        return np.asarray(scores)

    return score


class BlockMoments(NamedTuple):
    """Moments of the block losses, nats per token, under each range, [intervals].
    Variances over rows, blocks and draws are averaged over batches, whose spread is the error.
    """

    mean: np.ndarray
    variance: np.ndarray
    standard_error: np.ndarray


def block_loss_moments(
    apply_fn: ApplyFn, objective: Objective, spec: DrawSpec
) -> Callable[..., BlockMoments]:
    """``moments(params, batches, key, intervals, progress=None) -> BlockMoments``.
    Of block losses ``S_b / (m L')`` with eligible tokens; ValueError if a batch has fewer than two.
    """

    @jax.jit
    def losses(params: PyTree, batch: Batch, key: Array, intervals: Array) -> tuple[Array, Array]:
        draw = iid(stream(key, "draw"), spec)

        def one(interval: Array) -> tuple[Array, Array]:
            stats = objective.loss(
                lambda *inputs: apply_fn(params, *inputs), batch, _in_interval(draw, interval)
            )
            value = stats.weight * stats.raw / jnp.maximum(stats.eligible, 1)
            return value[0], stats.eligible[0] > 0

        return jax.lax.map(one, intervals)

    def moments(
        params: PyTree,
        batches: Sequence[Batch],
        key: Array,
        intervals: Sequence[Interval],
        progress: Progress | None = None,
    ) -> BlockMoments:
        means, variances = [], []
        ranges = jnp.asarray(intervals, jnp.float32)
        for number, batch in enumerate(batches):
            one = jax.random.fold_in(key, number)
            value, eligible = losses(params, jax.tree.map(jnp.asarray, batch), one, ranges)
            value, eligible = to_host((value, eligible))
            kept = np.asarray(value, np.float64)[:, eligible[0]]
            if kept.shape[1] < 2:
                raise ValueError(
                    f"batch {number} has {kept.shape[1]} blocks with eligible tokens; 2 are needed"
                )
            means.append(kept.mean(1))
            variances.append(kept.var(1, ddof=1))
            if progress is not None:
                progress(1)
        spread = np.std(variances, axis=0, ddof=1) / math.sqrt(len(batches))
        return BlockMoments(np.mean(means, axis=0), np.mean(variances, axis=0), spread)

    return moments


def _in_interval(draw: Draw, interval: Array) -> Draw:
    # No weight, as the range itself is the target.
    return draw._replace(u=ClippedDensity(interval[0], interval[1]).icdf(draw.u))
