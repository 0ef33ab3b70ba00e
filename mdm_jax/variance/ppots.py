"""P-POTS that learns while training."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.typing import Array
from mdm_jax.variance.learning import LevelLosses, accept, integrand
from mdm_jax.variance.moments import (
    LevelMoments,
    Target,
    check_floor,
    moment_density,
    second_moment,
)
from mdm_jax.variance.quantile_density import (
    PiecewiseDensity,
    density_profile,
    log_spaced_edges,
    warp,
)
from mdm_jax.variance.transform import LevelProfile, Phase, VarianceTransform


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
