"""The latest losses of each level, remembered one by one."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.typing import Array
from mdm_jax.variance.ema_bins import equal_edges
from mdm_jax.variance.learning import LevelLosses, accept, integrand
from mdm_jax.variance.moments import check_floor, moment_density
from mdm_jax.variance.quantile_density import PiecewiseDensity, density_profile, warp
from mdm_jax.variance.transform import LevelProfile, Phase, VarianceTransform


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
