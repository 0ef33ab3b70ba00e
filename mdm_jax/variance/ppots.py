"""P-POTS that learns while training.

P-POTS with measured bins.

P-POTS with its parametric family.

P-POTS for the gradient, by what the network's outputs say of it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.types import Array, ArrayLike
from mdm_jax.variance.densities import (
    PiecewiseDensity,
    density_profile,
    log_spaced_edges,
    piecewise_density,
    warp,
)
from mdm_jax.variance.epr import EprParameters, epr_curve
from mdm_jax.variance.moments import (
    LevelLosses,
    LevelMoments,
    Target,
    accept,
    check_floor,
    gradient_stats,
    integrand,
    moment_density,
    second_moment,
)
from mdm_jax.variance.transform import LevelProfile, Phase, VarianceTransform
from mdm_jax.variance.warps import importance


class PpotsState(NamedTuple):
    """Running moments of the integrand per bin.

    Attributes:
        second: [J] decayed mean of the squared integrand.
        mean: [J] decayed mean of the integrand.
        weight: [J] total weight of these means, from 0 (bin never visited) towards 1.
        steps: number of batches learnt from.
        rejected: number of batches that were not finite and changed nothing else.
    """

    second: Array
    mean: Array
    weight: Array
    steps: Array
    rejected: Array


def ppots(
    num_bins: int = 32,
    smallest_rate: float = 1e-3,
    decay: float = 0.999,
    floor: float = 0.1,
    warmup_steps: int = 100,
    target: Target = second_moment,
) -> VarianceTransform:
    """Levels from bins whose masses follow running moments of the raw loss.

    Bins are equally wide in the logarithm of the masking rate m = 1 - u. Each step the density is
    formed from the past only and paid for exactly, which keeps every step exact. Inside a bin
    levels are uniform under any density, so the plain mean over a bin's draws of the squared
    integrand is unbiased for that bin. The integrand is the raw loss times the objective's weight,
    per scored element, without the importance weight. Views of a row at one level are averaged
    first: with ``mirror`` the moments are those of the pair, as the optimum for pairs asks for.

    The first ``warmup_steps`` batches are uniform. A bin never visited counts as average until the
    floor has led there. Moments of a bin average over its latest ``1 / (1 - decay)`` draws or so.

    Keeps: E[weight f(u)] = int f at every step. Couples: nothing within a step; steps through the
    state. Costs: one view, and a few operations on vectors of the number of bins.
    Removes: as :func:`~mdm_jax.variance.ppots_binned`, without a calibration run. Bias: exact.
    Reference: P-POTS, arXiv 2511.18159, made adaptive; adaptive importance sampling of the level as
    in Nichol and Dhariwal 2021, with an exact weight.

    The gradient's second moment, the better target: pass
    ``gradient_stats(stats, norms)`` to ``update`` in a loop that has per-row gradient norms; the
    trainer of this package does not compute them, use ``ppots_binned`` with measured ones there.

    Args:
        num_bins: J.
        smallest_rate: masking rate below which there is one bin.
        decay: of the moments per draw of a bin, in [0, 1).
        floor: share of uniform levels, in (0, 1]; bounds the weights by ``1 / floor``.
        warmup_steps: number of batches with uniform levels.
        target: :func:`~mdm_jax.variance.second_moment`, or
            :func:`~mdm_jax.variance.level_variance` when levels are stratified.

    Raises:
        ValueError: if a setting is out of range, or the target needs what is not known here.
    """
    check_decay("ppots", decay)
    edges = log_spaced_edges(num_bins, smallest_rate)
    return running_bins("ppots", edges, lambda count: decay**count, floor, warmup_steps, target)


def running_bins(
    name: str,
    edges: np.ndarray,
    keep: Callable[[Array], Array],
    floor: float,
    warmup_steps: int,
    target: Target,
) -> VarianceTransform:
    """Levels from bins whose masses follow running moments: :func:`ppots` and its like.

    Args:
        name: of the transform.
        edges: [J + 1] quantiles from 0 to 1.
        keep: from the number of draws in each bin [J] to the share of the old moments that stays.
        floor: as for :func:`ppots`, like the rest.
        warmup_steps: number of batches with uniform levels.
        target: from moments to the moment whose root is followed.

    Raises:
        ValueError: if a setting is out of range, or the target needs what is not known here.
    """
    check_floor(name, floor)
    if warmup_steps < 0:
        raise ValueError(f"{name} needs warmup_steps >= 0, got {warmup_steps}")
    num_bins = len(edges) - 1
    target(LevelMoments(jnp.ones(num_bins), jnp.ones(num_bins)))  # raises where it needs more

    def init(_spec: DrawSpec) -> PpotsState:
        # Five buffers: a train step that donates its state must not be handed one twice.
        moments = (jnp.zeros(num_bins, jnp.float32) for _ in range(3))
        return PpotsState(*moments, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def density(state: PpotsState) -> PiecewiseDensity:
        share = jnp.where(state.steps < warmup_steps, 1.0, floor)
        return moment_density(edges, target(level_moments(state)), share)

    def draw(_key: Array, state: PpotsState, current: Draw, _spec: DrawSpec) -> Draw:
        return warp(current, density(state))

    def update(state: PpotsState, current: Draw, stats: LossStats) -> PpotsState:
        count, total, squares = _bin_sums(edges, current.u, integrand(current, stats))
        some = jnp.where(count > 0, count, 1.0)
        old = keep(count)
        learnt = PpotsState(
            second=old * state.second + (1 - old) * squares / some,
            mean=old * state.mean + (1 - old) * total / some,
            weight=old * state.weight + (1 - old),
            steps=state.steps + 1,
            rejected=state.rejected,
        )
        finite = jnp.all(jnp.isfinite(total)) & jnp.all(jnp.isfinite(squares))
        return accept(finite, learnt, state)

    def profile(state: PpotsState, u: Array) -> LevelProfile:
        return density_profile(density(state), u)

    return VarianceTransform(name, Phase.WARP, init, draw, update, profile=profile)


def check_decay(name: str, decay: float) -> None:
    """Raises ValueError unless ``decay`` is in [0, 1)."""
    if not 0 <= decay < 1:
        raise ValueError(f"{name} needs a decay in [0, 1), got {decay}")


def level_moments(state: PpotsState) -> LevelMoments:
    """Moments per bin, debiased; a bin never visited gets the mean over the visited ones."""
    total = jnp.sum(state.weight)

    def debiased(value: Array) -> Array:
        average = jnp.sum(value) / jnp.where(total > 0, total, 1.0)
        seen = state.weight > 0
        return jnp.where(seen, value / jnp.where(seen, state.weight, 1.0), average)

    return LevelMoments(debiased(state.second), debiased(state.mean))


def _bin_sums(edges: np.ndarray, u: Array, losses: LevelLosses) -> tuple[Array, Array, Array]:
    """Per bin: number of estimates, sum of the integrand and of its square."""
    bins = jnp.searchsorted(jnp.asarray(edges[1:-1]), u, side="right")
    inside = bins[..., None] == jnp.arange(len(edges) - 1).reshape(1, 1, 1, -1)

    def gather(values: Array) -> Array:
        # Not a scatter, whose order of summation is left open on accelerators.
        return jnp.sum(jnp.where(inside, values[..., None], 0.0), axis=(0, 1, 2))

    value, count = losses
    return gather(count), gather(count * value), gather(count * jnp.square(value))


def ppots_binned(
    edges: ArrayLike, second_moments: ArrayLike, floor: float = 0.1
) -> VarianceTransform:
    """Levels from bins with mass in proportion to ``d_j sqrt(second_moments_j)``, d_j the width.

    The moments are measured once, of the loss or of the gradient; which one is right for a chain,
    :mod:`mdm_jax.variance.moments` says: pass ``second_moment(m)``, ``level_variance(m)`` (for
    stratified levels) or ``published_second_moment(m)`` of the measured ``m``. Bins equally wide in
    the logarithm of the rate (:func:`~mdm_jax.variance.log_spaced_edges`) reach within half a
    percent of the optimum with ten bins, where bins of equal width need fifty or more.

    Keeps: E[weight f(u)] = int f. Couples: nothing. Costs: one view.
    Removes: as much as sqrt(E f^2) varies with the level: the variance falls by the variance of
    that root under a uniform level. Bias: exact.
    Reference: P-POTS, arXiv 2511.18159, as a histogram; the optimal density is the classical one of
    importance sampling.

    Args:
        edges: [J + 1] quantiles from 0 to 1; the first bin holds the highest masking rates.
        second_moments: [J] non-negative, in any unit.
        floor: share of uniform levels, in (0, 1]; bounds the weights by ``1 / floor``.

    Raises:
        ValueError: if the edges do not cover (0, 1), there is not one moment per bin, a moment is
            negative or not finite, or the floor is out of range.
    """
    check_floor("ppots_binned", floor)
    moments = np.asarray(second_moments, np.float64)
    if not (np.all(np.isfinite(moments)) and np.all(moments >= 0)):
        raise ValueError(f"ppots_binned: moments must be finite and not negative, got {moments}")
    density = moment_density(edges, moments, floor)
    return importance(density)._replace(name="ppots_binned")


_NUM_CELLS = 256
_NODES = 8


def ppots_parametric(
    parameters: EprParameters | Sequence[float], floor: float = 0.1
) -> VarianceTransform:
    """Levels from the seven-parameter curve of P-POTS, fitted by :func:`~mdm_jax.variance.fit_epr`.

    The curve is integrated over 256 equal cells of the masking rate m = 1 - u, and those cells are
    both sampled and paid for. The published engine samples uniformly inside the cells of a grid,
    pays for a density interpolated between the grid's points, and never draws the rates beyond its
    first and last point: three faults that this form cannot have.

    Keeps: E[weight f(u)] = int f. Couples: nothing. Costs: one view.
    Removes: what the curve captures of the optimal density. Bias: exact.
    Reference: P-POTS, arXiv 2511.18159, and the "EPR" family of its code.

    Args:
        parameters: of the curve; seven numbers in the order of ``EprParameters``.
        floor: share of uniform levels, in (0, 1]; bounds the weights by ``1 / floor``.

    Raises:
        ValueError: if the number or the range of the parameters or the floor is wrong.
    """
    density = epr_density(parameters, floor)
    return importance(density)._replace(name="ppots_parametric")


def epr_density(parameters: EprParameters | Sequence[float], floor: float) -> PiecewiseDensity:
    """The density of :func:`ppots_parametric`; arguments and errors as there."""
    check_floor("ppots_parametric", floor)
    parameters = tuple(parameters)
    if len(parameters) != len(EprParameters._fields):
        raise ValueError(
            f"ppots_parametric needs the numbers {', '.join(EprParameters._fields)}, "
            f"got {len(parameters)} of them"
        )
    p = EprParameters(*map(float, parameters))
    if not (
        np.all(np.isfinite(p)) and min(p) >= 0 and min(p.high_power, p.low_power, p.mean_power) >= 1
    ):
        raise ValueError(f"ppots_parametric: scales and growth are positive, powers >= 1; got {p}")
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    edges = np.linspace(0.0, 1.0, _NUM_CELLS + 1)
    places = edges[:-1, None] + (nodes + 1) / 2 / _NUM_CELLS
    shares = epr_curve(p, 1.0 - places) @ weights
    shares = shares / shares.sum()
    return piecewise_density(edges, (1.0 - floor) * shares + floor / _NUM_CELLS)


def ppots_slopes(
    num_bins: int = 32,
    smallest_rate: float = 1e-3,
    decay: float = 0.99,
    floor: float = 0.2,
    warmup_steps: int = 50,
    target: Target = second_moment,
) -> VarianceTransform:
    """Levels from bins whose masses follow running moments of the loss's slope at the outputs.

    As :func:`~mdm_jax.variance.ppots` in all but what it learns from. The best density follows the
    second moment of the row's *gradient*, which is not that of its loss: many masked tokens have a
    large loss and gradients that point all ways, one masked token has a small loss and the largest
    weight. Per-row gradients are not to be had for nothing, but their size at the network's outputs
    is: for a cross-entropy, at least ``(1 - p)^2`` and at most twice that, with p the probability
    of the right token. The objective sums these over the row's targets (``LossStats.slopes``), and
    the density follows the mean of ``weight^2 slopes`` per bin. That is the gradient's second
    moment but for a factor, as far as tokens' gradients do not line up and the network below
    stretches them alike at every level. Where that does not hold the density is not the best one;
    the estimate stays exact.

    Keeps: E[weight f(u)] = int f at every step. Couples: nothing within a step; steps through the
    state. Costs: one view, an exponential per token, and a few operations on vectors of the number
    of bins. Removes: the spread of the root of the gradient's second moment over levels, as
    :func:`~mdm_jax.variance.ppots_binned` does with a measured one. Bias: exact.
    Reference: the bound of a gradient by that at the last layer is Katharopoulos and Fleuret 2018,
    who choose rows by it; P-POTS is arXiv 2511.18159.

    Args:
        num_bins: J.
        smallest_rate: masking rate below which there is one bin.
        decay: of the moments per draw of a bin, in [0, 1).
        floor: share of uniform levels, in (0, 1]; bounds the weights by ``1 / floor``.
        warmup_steps: number of batches with uniform levels.
        target: from moments per bin to the moment whose root the density follows.

    Raises:
        ValueError: if a setting is out of range, or the target needs what is not known here; from
            ``update``, for statistics without slopes.
    """
    name = "ppots_slopes"
    check_decay(name, decay)
    edges = log_spaced_edges(num_bins, smallest_rate)
    bins = running_bins(name, edges, lambda count: decay**count, floor, warmup_steps, target)

    def update(state: PpotsState, current: Draw, stats: LossStats) -> PpotsState:
        return bins.update(state, current, gradient_stats(stats, _output_norms(stats)))

    return bins._replace(update=update)


def _output_norms(stats: LossStats) -> Array:
    """[V, B, S] size of the gradient at the outputs; NaN where the loss is no number."""
    if stats.slopes is None:
        raise ValueError(
            "ppots_slopes learns from LossStats.slopes, which this objective does not fill in; use "
            "ppots, which learns from the loss, or an objective of masked tokens"
        )
    return jnp.where(jnp.isfinite(stats.raw), jnp.sqrt(stats.slopes) * stats.weight, jnp.nan)
