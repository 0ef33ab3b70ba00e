"""Offline searches for sampling grids: interval costs, Align Your Steps, black-box search.

A sampler that freezes the denoiser D at the noisy end of each step has the KLUB of Sabour et al.
2024 (arXiv 2404.14507), ``K(a, b) = 1/2 int_a^b exp(lambda) E|D_lambda - D_a|^2 dlambda`` nats,
summed over steps. Measure samples too: for N(0, 1) the best 10-step grid has 1/20 of the cosine
grid's bound, yet its samples are further from the data.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.gaussian.paths import Path
from mdm_jax.gaussian.samplers.sampler import Denoise
from mdm_jax.rng import stream
from mdm_jax.types import Array, ArrayLike

IntervalCost = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``cost(noisy [M], clean [M]) -> K [M]``, nats, float64 on the host."""

Metric = Callable[[np.ndarray], float]
"""``metric(grid [N + 1] float64) -> float``, smaller is better, NaN never the best. Use the same
random numbers at every call."""

_BISECTIONS = 40


def klub(cost: IntervalCost, grid: ArrayLike) -> float:
    """KL bound of a grid, summed over its steps; nats. Raises as :func:`check_levels`."""
    levels = check_levels(grid)
    return float(np.sum(cost(levels[:-1], levels[1:])))


def normal_cost(data_std: float = 1.0) -> IntervalCost:
    """Exact cost per element for normal data; equal steps in the softplus are optimal for every N.

    ``K = 1/2 (exp(r) - 1 - r)`` with r the step in ``softplus(lambda + 2 log data_std)``.
    """
    shift = _check_std("normal_cost", data_std)

    def cost(noisy: np.ndarray, clean: np.ndarray) -> np.ndarray:
        r = np.logaddexp(0, clean + shift) - np.logaddexp(0, noisy + shift)
        return 0.5 * (np.expm1(r) - r)

    return cost


def curve_cost(logsnr: ArrayLike, eps_mse: ArrayLike) -> IntervalCost:
    """Cost from a tracked loss curve, without a network.

    ``K(a, b) = 1/2 [(exp(b - a) - 1) l(a) - int_a^b l dlambda]`` if D is the posterior mean, with
    l = E|eps - eps_hat|^2 summed over elements: ``eps_mse`` [K] at strictly increasing ``logsnr``
    [K], linear in between. May be negative for a noisy curve or a network far from the posterior
    mean, unlike :func:`pair_cost`. ValueError if shapes do not fit, levels do not increase, or
    errors are negative or not finite; from the cost, for levels outside the curve.
    """
    levels, curve = check_levels(logsnr), np.asarray(eps_mse, np.float64)
    if curve.shape != levels.shape or not np.all(np.isfinite(curve) & (curve >= 0)):
        raise ValueError(
            f"curve_cost needs one finite error >= 0 per level, {levels.shape}, got {curve.shape} "
            f"from {curve.min(initial=np.inf)} to {curve.max(initial=-np.inf)}"
        )
    areas = np.diff(levels) * 0.5 * (curve[1:] + curve[:-1])
    area = np.concatenate([[0.0], np.cumsum(areas)])

    def integral(level: np.ndarray) -> np.ndarray:
        cell = np.clip(np.searchsorted(levels, level, "right") - 1, 0, levels.size - 2)
        mean = 0.5 * (curve[cell] + np.interp(level, levels, curve))
        return area[cell] + (level - levels[cell]) * mean

    def cost(noisy: np.ndarray, clean: np.ndarray) -> np.ndarray:
        if np.min(noisy) < levels[0] or np.max(clean) > levels[-1]:
            raise ValueError(
                f"the curve covers [{levels[0]}, {levels[-1]}], but the steps reach from "
                f"{np.min(noisy)} to {np.max(clean)}"
            )
        first = np.interp(noisy, levels, curve)
        return 0.5 * (np.expm1(clean - noisy) * first - (integral(clean) - integral(noisy)))

    return cost


def loss_curve(
    key: Array, denoise: Denoise, data: ArrayLike, logsnr: ArrayLike, *, path: Path
) -> np.ndarray:
    """Mean ``|eps - eps_hat|^2`` of the rows of ``data`` at each level [K], for :func:`curve_cost`.

    Summed over elements; the noise of a row is the same at all levels. It is smoothed as theory
    demands: the error of the predicted data, ``exp(-lambda)`` times this, does not rise.
    """
    data, levels = jnp.asarray(data), jnp.asarray(logsnr, jnp.float32)
    eps = jax.random.normal(stream(key, "noise"), data.shape, data.dtype)

    def error(level: Array) -> Array:
        x = path.alpha(level) * data + path.sigma(level) * eps
        return jnp.mean(jnp.sum(jnp.square(denoise(x, level) - data), axis=-1))

    mmse = np.asarray(jax.jit(lambda levels: jax.lax.map(error, levels))(levels), np.float64)
    return np.minimum.accumulate(mmse) * np.exp(np.asarray(logsnr, np.float64))


def unmasking_cost(rates: ArrayLike, nats: ArrayLike) -> IntervalCost:
    """Cost per token of revealing masked tokens in steps, from a curve of cross-entropies.

    Tokens revealed between masking rates a > b are predicted at a: the bound with steps exceeds the
    continuous one by ``(a - b) l(a) - int_b^a l dm``, with l(m) = ``nats`` [K], the mean
    cross-entropy of a masked token, at rising ``rates`` [K] (made to rise too; linear in between
    and constant outside). ValueError unless shapes fit, rates increase in [0, 1], nats are finite.
    """
    rates, nats = np.asarray(rates, np.float64), np.asarray(nats, np.float64)
    within = rates.ndim == 1 and np.all(np.diff(rates, prepend=0, append=1) >= 0)
    if rates.shape != nats.shape or not within or not np.all(np.isfinite(nats)):
        raise ValueError(
            f"unmasking_cost needs finite nats at rates that rise in [0, 1], got {nats} at {rates}"
        )
    knots = np.unique(np.concatenate([[0.0, 1.0], rates]))
    curve = np.interp(knots, rates, np.maximum.accumulate(nats))
    area = np.append(0.0, np.cumsum(np.diff(knots) * 0.5 * (curve[1:] + curve[:-1])))

    def integral(rate: np.ndarray) -> np.ndarray:
        cell = np.clip(np.searchsorted(knots, rate, "right") - 1, 0, knots.size - 2)
        mean = 0.5 * (curve[cell] + np.interp(rate, knots, curve))
        return area[cell] + (rate - knots[cell]) * mean

    def cost(noisy: np.ndarray, clean: np.ndarray) -> np.ndarray:
        first, last = (1 / (1 + np.exp(np.asarray(end, np.float64))) for end in (noisy, clean))
        gained = integral(first) - integral(last)
        return (first - last) * np.interp(first, knots, curve) - gained

    return cost


def pair_cost(
    key: Array, denoise: Denoise, data: ArrayLike, *, path: Path, data_std: float = 1.0
) -> IntervalCost:
    """Cost of a trained network, from pairs of noisy versions of the same data; nats per row.

    One level is drawn per row and interval, from Sabour et al.'s proposal for normal data of
    standard deviation ``data_std``. All intervals share random numbers, so differences between
    grids are far less noisy than values. ``denoise``, with [B] levels, runs twice per interval and
    compiles once per number of intervals. ValueError unless data_std > 0 and ``data`` has rows.
    """
    shift = _check_std("pair_cost", data_std)
    data = jnp.asarray(data)
    if data.ndim < 2 or data.shape[0] < 1:
        raise ValueError(f"pair_cost needs data [rows, elements, ...], got {data.shape}")
    rows, column = data.shape[0], (data.shape[0], *(1,) * (data.ndim - 1))
    jitter = jax.random.uniform(stream(key, "quantile"), (rows,), data.dtype)
    quantile = (jnp.arange(rows) + jitter) / rows
    fine = jax.random.normal(stream(key, "fine"), data.shape, data.dtype)
    coarse = jax.random.normal(stream(key, "coarse"), data.shape, data.dtype)

    def estimate(interval: tuple[Array, Array]) -> Array:
        noisy, clean = interval
        total, r = _normal_quantile(quantile, noisy + shift, clean + shift)
        step = _level_after(r, noisy + shift) - (noisy + shift)
        step = jnp.clip(step, 0.0, clean - noisy)
        logsnr = (noisy + step).reshape(column)
        # x / alpha at the drawn level, and further along the same path at the noisy end.
        z = data + jnp.exp(-0.5 * logsnr) * fine
        extra = jnp.exp(-0.5 * noisy) * jnp.sqrt(-jnp.expm1(-step)).reshape(column)
        at_noisy = denoise(path.alpha(noisy) * (z + extra * coarse), jnp.full((rows,), noisy))
        change = denoise(path.alpha(logsnr) * z, logsnr.reshape(rows)) - at_noisy
        square = jnp.sum(jnp.square(change).reshape(rows, -1), axis=-1)
        # What normal data of this spread would give per element.
        expected = jnp.exp(shift) * jax.nn.sigmoid(-(noisy + step + shift)) * jnp.expm1(r)
        return total * jnp.mean(square / expected)

    mapped = jax.jit(lambda noisy, clean: jax.lax.map(estimate, (noisy, clean)))

    def cost(noisy: np.ndarray, clean: np.ndarray) -> np.ndarray:
        ends = (jnp.asarray(end, data.dtype) for end in (noisy, clean))
        return np.asarray(mapped(*ends), np.float64)

    return cost


def check_levels(grid: ArrayLike) -> np.ndarray:
    """The levels as float64; ValueError unless [n >= 2], finite and strictly increasing."""
    levels = np.asarray(grid, np.float64)
    if levels.ndim != 1 or levels.size < 2:
        raise ValueError(f"levels must be [n] with n >= 2, got shape {levels.shape}")
    if not (np.all(np.isfinite(levels)) and np.all(np.diff(levels) > 0)):
        raise ValueError(f"levels must be finite and strictly increasing, got {levels}")
    return levels


def _normal_quantile(quantile: Array, noisy: Array, clean: Array) -> tuple[Array, Array]:
    """Cost of the interval for N(0, 1), and r = softplus steps at the quantiles of its density."""
    top = jax.nn.softplus(clean) - jax.nn.softplus(noisy)
    total = 0.5 * _excess(top)

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        left, right = bounds
        middle = 0.5 * (left + right)
        short = 0.5 * _excess(middle) < quantile * total
        return jnp.where(short, middle, left), jnp.where(short, right, middle)

    bounds = (jnp.zeros_like(quantile), jnp.full_like(quantile, top))
    return total, 0.5 * sum(jax.lax.fori_loop(0, _BISECTIONS, halve, bounds))


def _excess(r: Array) -> Array:
    """``exp(r) - 1 - r``, by its series where the difference would lose digits."""
    series = 0.5 * jnp.square(r) * (1 + r / 3 * (1 + r / 4 * (1 + r / 5)))
    return jnp.where(r < 0.05, series, jnp.expm1(r) - r)


def _level_after(r: Array, level: Array) -> Array:
    """The level at which softplus has grown by r since ``level``."""
    value = jax.nn.softplus(level) + r
    return value + jnp.log(-jnp.expm1(-value))


def _check_std(name: str, data_std: float) -> float:
    if not 0 < data_std < np.inf:
        raise ValueError(f"{name} needs a positive, finite data_std, got {data_std}")
    return float(2 * np.log(data_std))


class AlignedSteps(NamedTuple):
    grid: np.ndarray  # [N + 1] float64 levels, strictly increasing, with the ends of the start
    cost: float  # total of the grid, nats
    trace: list[float]  # total before the first and after each sweep; falls, except at ``doubled``
    doubled: list[int]  # indices into the trace, first entries of a longer grid


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
    """Move the inner levels of a grid until no candidate lowers the cost, then double the steps.

    A sweep tries equally spaced candidates around each inner level, at first between its
    neighbours, and keeps the best; every second level moves at once. When a sweep no longer helps,
    the window is halved. Doubling inserts midpoints. With an estimated cost use few refinements, or
    the search fits noise. ValueError for a bad start or settings. Sabour et al. 2024, section 3.

    Args:
        start: [N + 1] finite levels, strictly increasing; the ends stay.
        doublings, refinements: how often to double N, and to halve the window.
        candidates: levels tried per move, odd and >= 3, so that the present one is among them.
        max_sweeps: at most so many sweeps per window.
        tolerance: relative fall of the cost below which a sweep does not count as helping.
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
            levels = np.insert(levels, range(1, levels.size), 0.5 * (levels[1:] + levels[:-1]))
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
        total = cost(np.stack([left, tried]).ravel(), np.stack([tried, right]).ravel())
        total = total.reshape(2, *tried.shape).sum(0)
        best, stay, rows = np.argmin(total, axis=1), candidates // 2, np.arange(middle.size)
        better = total[rows, best] < total[:, stay]
        levels[middle] = tried[rows, np.where(better, best, stay)]
    return levels


class Improvement(NamedTuple):
    """The best grid so far, and the number of the metric's call, from 0."""

    evaluation: int
    value: float
    grid: np.ndarray


class SearchResult(NamedTuple):
    grid: np.ndarray  # [N + 1] float64, the best grid
    value: float  # the metric there
    trace: list[Improvement]  # every improvement, in order; the last is the result
    evaluations: int  # calls of the metric
    converged: bool  # whether the search ran to its end, rather than out of its budget


def exhaustive_search(
    metric: Metric, candidates: ArrayLike, num_inner: int, low: float, high: float, budget: int
) -> SearchResult:
    """Minimise ``metric`` over all choices of ``num_inner`` = N - 1 inner levels among candidates.

    ``candidates`` [M] increase strictly between low and high. WaveGrad's search (Chen et al. 2021,
    arXiv 2009.00713). ValueError for unusable candidates, ``budget`` below M choose N - 1 calls of
    the metric, or a metric that is NaN everywhere.
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
    for levels in itertools.combinations(inner, num_inner):
        record.consider(np.array([low, *levels, high], np.float64))
    return record.result(converged=True)


def pattern_search(
    metric: Metric,
    start: ArrayLike,
    budget: int,
    *,
    step: float = 1.0,
    smallest_step: float = 1e-6,
) -> SearchResult:
    """Minimise ``metric`` by moving one inner level at a time, halving the step when none helps.

    ``start`` [N + 1] is finite and strictly increasing; ends stay, levels do not cross. ``budget``
    >= 1 counts metric calls; converged once the logSNR step is below ``smallest_step``. ValueError
    for a bad start, budget or steps, or if the metric was NaN throughout.
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
        for index, sign in itertools.product(range(1, levels.size - 1), (1.0, -1.0)):
            moved = levels.copy()
            moved[index] += sign * step
            if not levels[index - 1] < moved[index] < levels[index + 1]:
                continue
            if record.evaluations == budget:
                return record.result(converged=False)
            if record.consider(moved):
                levels, improved = moved, True
        if not improved:
            step /= 2
    return record.result(converged=True)


def refined_grid(
    metric: Metric, second: Metric, starts: Sequence[ArrayLike], budget: int, knots: int = 8
) -> np.ndarray:
    """The grid [N + 1] of least metric that about ``budget`` grids find from the best of starts.

    Where there are few steps, half of the budget goes to choices among the levels of a finer grid
    (:func:`exhaustive_search`); the rest moves the ends of up to ``knots`` intervals, between which
    levels follow (:func:`pattern_search`). What looks best has partly good luck: the last
    improvements are compared with the start by ``second`` alone, which has other random numbers.
    ValueError for N < 2, bad starts, a budget below 1, or a metric that was NaN throughout.
    """
    best = min(map(check_levels, starts), key=metric)
    steps, found = best.size - 1, [best]
    if steps < 2:
        raise ValueError("refined_grid needs grids of 2 steps or more, whose inner levels can move")
    sizes = [m for m in range(steps, steps + 7) if math.comb(m, steps - 1) <= budget // 2]
    if sizes:
        at = np.linspace(0, steps, sizes[-1] + 2)[1:-1]
        finer = np.interp(at, np.arange(steps + 1), best)
        ends = float(best[0]), float(best[-1])
        chosen = exhaustive_search(metric, finer, steps - 1, *ends, budget=budget // 2)
        budget -= chosen.evaluations
        found.append(chosen.grid)
        best = min(found, key=metric)
    fixed = best[np.unique(np.round(np.linspace(0, steps, min(steps, knots) + 1)).astype(int))]

    def between(moved: np.ndarray) -> np.ndarray:
        return np.interp(best, fixed, moved)

    reach = float(best[-1] - best[0]) / (2 * (fixed.size - 1))
    moves = pattern_search(
        lambda moved: metric(between(moved)), fixed, budget, step=reach, smallest_step=reach / 16
    )
    found += [between(each.grid) for each in moves.trace[-3:]]
    return min(found, key=second)


class _Record:
    def __init__(self, metric: Metric):
        self.metric, self.evaluations, self.trace = metric, 0, []

    def consider(self, grid: np.ndarray) -> bool:
        """Record a call; whether the grid is the best so far."""
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
