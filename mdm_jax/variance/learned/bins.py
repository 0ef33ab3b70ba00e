"""Levels that follow the loss in equal bins: exponential averages, or the latest losses."""

from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Bins, Decay, Whole, checked
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.types import Array
from mdm_jax.variance.densities import (
    Floor,
    LevelLosses,
    PiecewiseDensity,
    Target,
    WarmupSteps,
    bin_of,
    equal_edges,
    integrand,
    moment_density,
    squared_mean,
)
from mdm_jax.variance.ppots import running_bins
from mdm_jax.variance.transform import VarianceTransform
from mdm_jax.variance.warps import counters, learned_warp


@checked
def ema_bins(
    num_bins: Bins = 100,
    decay: Decay = 0.99,
    floor: Floor = 0.01,
    warmup_steps: WarmupSteps = 100,
    target: Target = squared_mean,
) -> VarianceTransform:
    """Levels in proportion to an exponential moving average of the loss in equally wide bins.

    Errors and other settings as :func:`~mdm_jax.variance.ppots`. A step moves each visited bin's
    average once (``decay``), towards the mean of the integrand there. The density over the logSNR
    is proportional to W E[l], or with ``target=densities.second_moment`` optimal.
    Keeps: E[weight f(u)] = int f at every step. Couples: steps, through the state. Costs: as ppots.
    Removes: the whole excess over the optimum if ``E f^2 / (E f)^2`` is the same at all levels.
    Bias: exact. Reference: Kingma and Gao 2023, app. F.
    """
    edges = equal_edges(num_bins)

    def keep(count: Array) -> Array:
        return jnp.where(count > 0, decay, 1.0)

    return running_bins("ema_bins", edges, keep, floor, warmup_steps, target)


class LossHistory(NamedTuple):
    """Ring buffers ``values`` [J, H] of the integrand per bin; counters as in PpotsState.
    Value n is at n modulo H. ``count`` [J]: values so far; known only modulo H once full.
    """

    values: Array
    count: Array
    steps: Array
    rejected: Array


@checked
def loss_history(
    num_bins: Bins = 32,
    length: Annotated[int, Whole("[1, 1e5]", "losses", "remembered of each bin")] = 10,
    floor: Floor = 1e-3,
) -> VarianceTransform:
    """Levels in proportion to the root mean square of the latest H losses of each equal bin.

    Uniform until all J = ``num_bins`` bins hold H = ``length`` values, about J (H + log J) / B
    batches: prefer some tens of bins to one per diffusion step.
    Keeps: E[weight f(u)] = int f at every step. Couples: steps, through the state. Costs: one view,
    J H numbers. Removes: as much as sqrt(E f^2) varies with the level, less for small H. Bias:
    exact. Reference: Nichol and Dhariwal 2021 (improved DDPM), second-moment resampler.
    """
    edges = equal_edges(num_bins)

    def init(_spec: DrawSpec) -> LossHistory:
        values = jnp.zeros((num_bins, length), jnp.float32)
        return LossHistory(values, jnp.zeros(num_bins, jnp.int32), **counters())

    def density(state: LossHistory) -> PiecewiseDensity:
        share = jnp.where(jnp.all(state.count >= length), floor, 1.0)
        return moment_density(edges, jnp.mean(jnp.square(state.values), axis=1), share)

    def learn(
        state: LossHistory, current: Draw, stats: LossStats
    ) -> tuple[dict[str, Array], Array]:
        losses = integrand(current, stats)
        finite = jnp.all(jnp.isfinite(jnp.square(losses.value)))
        return _remember(edges, state, current, losses), finite

    return learned_warp("loss_history", init, density, learn)


def _remember(
    edges: np.ndarray, state: LossHistory, draw: Draw, losses: LevelLosses
) -> dict[str, Array]:
    """Ring buffers and counts with the batch's values appended in order."""
    num_bins, length = state.values.shape
    entered = (_first_views(draw) & (losses.count > 0)).ravel()
    bins = bin_of(edges, draw.u).ravel()
    visits = (bins[:, None] == jnp.arange(num_bins)[None]) & entered[:, None]
    order = jnp.cumsum(visits, axis=0, dtype=jnp.int32)  # [N, J], from 1
    own, last = jnp.take_along_axis(order, bins[:, None], axis=1)[:, 0], order[-1]
    # Of more values than a bin holds the latest stay, so that no entry is written twice.
    stays = entered & (own > last[bins] - length)
    entry = (state.count[bins] + own - 1) % length
    values = state.values.at[jnp.where(stays, bins, num_bins), entry].set(
        losses.value.ravel(), mode="drop"
    )
    count = state.count + last
    # Kept small without losing the entry or being full: a long run would overflow.
    return {
        "values": values,
        "count": jnp.where(count < 2 * length, count, length + count % length),
    }


def _first_views(draw: Draw) -> Array:
    """[V, B, S] whether no earlier view of the row is at the same level (with the same value)."""
    same = draw.u[:, None] == draw.u[None]
    views = jnp.arange(len(draw.u))
    earlier = (views[None] < views[:, None])[..., None, None]
    return ~jnp.any(same & earlier, axis=1)
