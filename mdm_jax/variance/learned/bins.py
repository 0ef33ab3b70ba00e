"""Exponential averages of the loss in equal bins of the level.

The latest losses of each level, remembered one by one.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.types import Array
from mdm_jax.variance.densities import PiecewiseDensity, check_edges, density_profile, warp
from mdm_jax.variance.moments import (
    LevelLosses,
    Target,
    accept,
    check_floor,
    integrand,
    moment_density,
    squared_mean,
)
from mdm_jax.variance.ppots import check_decay, running_bins
from mdm_jax.variance.transform import LevelProfile, Phase, VarianceTransform


def ema_bins(
    num_bins: int = 100,
    decay: float = 0.99,
    floor: float = 0.01,
    warmup_steps: int = 100,
    target: Target = squared_mean,
) -> VarianceTransform:
    """Levels in proportion to an exponential average of the loss in bins of equal width.

    Bins are equally wide in the quantile u, hence in the logSNR where the objective's law is
    uniform. A step moves the average of every bin that it visited, once, towards the mean of the
    integrand over its draws there, and leaves the others. The integrand is the raw loss times the
    objective's weight, per scored element. So the density is proportional to W E[l] over the
    logSNR, and it is paid for exactly.

    The published target is the first moment. ``target=second_moment`` follows the root of the mean
    square instead, which is the optimum, at the same cost; ``level_variance`` is for stratified
    levels. The state is that of :func:`~mdm_jax.variance.ppots`, which differs in its bins and in
    that its averages decay per draw. Averages start from the first visit of a bin; until then it
    counts as average, instead of as 1, which would be in another unit than the loss.

    Keeps: E[weight f(u)] = int f at every step. Couples: nothing within a step; steps through the
    state. Costs: one view, and a few operations on vectors of the number of bins.
    Removes: what sampling in proportion to the mean loss can, the whole excess over the optimum
    where E f^2 / (E f)^2 does not depend on the level. Bias: exact.
    Reference: Kingma and Gao 2023, appendix F.

    Args:
        num_bins: J, at least 1.
        decay: of a bin's average per step that visits it, in [0, 1).
        floor: share of uniform levels, in (0, 1]; bounds the weights by ``1 / floor``.
        warmup_steps: number of batches with uniform levels.
        target: from moments per bin to the moment whose root the density follows.

    Raises:
        ValueError: if a setting is out of range, or the target needs what is not known here.
    """
    check_decay("ema_bins", decay)
    edges = equal_edges("ema_bins", num_bins)

    def keep(count: Array) -> Array:
        return jnp.where(count > 0, decay, 1.0)

    return running_bins("ema_bins", edges, keep, floor, warmup_steps, target)


def equal_edges(name: str, num_bins: int) -> np.ndarray:
    """[J + 1] edges of bins equally wide in the quantile.

    Raises:
        ValueError: unless ``num_bins`` is positive and the bins are no narrower than 2**-22.
    """
    if num_bins < 1:
        raise ValueError(f"{name} needs num_bins >= 1, got {num_bins}")
    return check_edges(np.linspace(0.0, 1.0, num_bins + 1))


class LossHistory(NamedTuple):
    """The latest H values of the integrand in each of J bins.

    Attributes:
        values: [J, H] ring buffers; entry n of a bin is at position n modulo H.
        count: [J] int32, number of values that a bin has had; once full, known modulo H only.
        steps: number of batches learnt from.
        rejected: number of batches that were not finite and changed nothing else.
    """

    values: Array
    count: Array
    steps: Array
    rejected: Array


def loss_history(num_bins: int = 32, length: int = 10, floor: float = 1e-3) -> VarianceTransform:
    """Levels in proportion to the root mean square of the latest losses of each bin.

    Bins are equally wide in the quantile u. Each keeps its latest ``length`` values of the
    integrand (raw loss times the objective's weight, per scored element); the rows of one batch
    enter in their order. Levels are uniform until every bin is full, which takes about
    J (length + log J) / B batches: prefer some tens of bins over one per diffusion step.

    Keeps: E[weight f(u)] = int f at every step. Couples: nothing within a step; steps through the
    state. Costs: one view, and the memory of J times ``length`` numbers.
    Removes: as much as sqrt(E f^2) varies with the level; with few values per bin the density is
    noisy, which costs variance and no bias. Bias: exact.
    Reference: Nichol and Dhariwal 2021 (improved DDPM), the resampler by the second moment of the
    loss.

    Args:
        num_bins: J, at least 1.
        length: H, values remembered per bin, at least 1.
        floor: share of uniform levels, in (0, 1]; bounds the weights by ``1 / floor``.

    Raises:
        ValueError: if a setting is out of range.
    """
    if length < 1:
        raise ValueError(f"loss_history needs length >= 1, got {length}")
    check_floor("loss_history", floor)
    edges = equal_edges("loss_history", num_bins)

    def init(_spec: DrawSpec) -> LossHistory:
        return LossHistory(
            values=jnp.zeros((num_bins, length), jnp.float32),
            count=jnp.zeros(num_bins, jnp.int32),
            steps=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((), jnp.int32),
        )

    def density(state: LossHistory) -> PiecewiseDensity:
        share = jnp.where(jnp.all(state.count >= length), floor, 1.0)
        return moment_density(edges, jnp.mean(jnp.square(state.values), axis=1), share)

    def draw(_key: Array, state: LossHistory, current: Draw, _spec: DrawSpec) -> Draw:
        return warp(current, density(state))

    def update(state: LossHistory, current: Draw, stats: LossStats) -> LossHistory:
        losses = integrand(current, stats)
        learnt = state._replace(steps=state.steps + 1, **_remember(edges, state, current, losses))
        return accept(jnp.all(jnp.isfinite(jnp.square(losses.value))), learnt, state)

    def profile(state: LossHistory, u: Array) -> LevelProfile:
        return density_profile(density(state), u)

    return VarianceTransform("loss_history", Phase.WARP, init, draw, update, profile=profile)


def _remember(
    edges: np.ndarray, state: LossHistory, draw: Draw, losses: LevelLosses
) -> dict[str, Array]:
    """The ring buffers and counts after the values of a batch, in their order."""
    num_bins, length = state.values.shape
    entered = (_first_views(draw) & (losses.count > 0)).ravel()
    bins = jnp.searchsorted(jnp.asarray(edges[1:-1]), draw.u, side="right").ravel()
    visits = (bins[:, None] == jnp.arange(num_bins)[None]) & entered[:, None]
    order = jnp.cumsum(visits, axis=0, dtype=jnp.int32)  # [N, J], from 1
    own, last = jnp.take_along_axis(order, bins[:, None], axis=1)[:, 0], order[-1]
    # Of more values than a bin holds the latest stay, so that no place is written twice.
    stays = entered & (own > last[bins] - length)
    place = (state.count[bins] + own - 1) % length
    values = state.values.at[jnp.where(stays, bins, num_bins), place].set(
        losses.value.ravel(), mode="drop"
    )
    count = state.count + last
    # Kept small without losing the place or being full: a long run would overflow.
    return {
        "values": values,
        "count": jnp.where(count < 2 * length, count, length + count % length),
    }


def _first_views(draw: Draw) -> Array:
    """[V, B, S] whether no earlier view of the row is at the same level: it has the same value."""
    same = draw.u[:, None] == draw.u[None]
    views = jnp.arange(len(draw.u))
    earlier = (views[None] < views[:, None])[..., None, None]
    return ~jnp.any(same & earlier, axis=1)
