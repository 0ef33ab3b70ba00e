"""Moments of the loss per level, and the density over levels that each purpose asks for.

With f the integrand (raw loss times the objective's weight, before any importance weight), v its
variance over masks, g its mean and c the variance of its mean over rows, an estimate from density p
has the second moment ``int E[f^2] / p``, so the best density is the root of a moment:

* levels independent: ``E f^2 = v + g^2 + c`` (:func:`second_moment`),
* levels stratified, which removes g^2 at leading order: ``v + c`` (:func:`level_variance`),
* the published scripts: ``v + g^2`` (:func:`published_second_moment`),
* Kingma and Gao: ``g^2``, a density proportional to the loss (:func:`squared_mean`).

For gradients ``E ||G||^2`` replaces ``E f^2``. With several views at one level f is their average.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from mdm_jax.draws import Draw, LossStats
from mdm_jax.types import Array, ArrayLike
from mdm_jax.variance.densities import PiecewiseDensity, check_edges, piecewise_density


class LevelLosses(NamedTuple):
    """Losses [V, B, S] of rows at the levels of a draw, averaged over a row's views at that level.

    ``count`` is 1 over the number of these views. Both are 0 where no token is eligible.
    """

    value: Array
    count: Array

    def mean(self, values: Array) -> Array:
        """Mean of ``values`` [V, B, S] over the estimates of the batch; 0 without any."""
        total = jnp.sum(self.count)
        return jnp.sum(self.count * values) / jnp.where(total > 0, total, 1.0)


def integrand(draw: Draw, stats: LossStats) -> LevelLosses:
    """f, whose mean over uniform quantiles is the loss, per eligible element."""
    return _per_level(draw, stats.raw * stats.weight, stats.scored)


def target_loss(draw: Draw, stats: LossStats) -> LevelLosses:
    """The raw loss per target element, without any weight."""
    return _per_level(draw, stats.raw, stats.targets)


def _per_level(draw: Draw, total: Array, elements: Array) -> LevelLosses:
    empty = elements == 0
    value = jnp.where(empty, 0.0, total / jnp.where(empty, 1, elements))
    # Views of a row at the same level are one estimate: average them before squaring.
    same = (draw.u[:, None] == draw.u[None]).astype(value.dtype)
    views = jnp.maximum(jnp.sum(same * jnp.where(empty, 0.0, 1.0)[None], axis=1), 1.0)
    joined = jnp.sum(same * value[None], axis=1) / views
    return LevelLosses(jnp.where(empty, 0.0, joined), jnp.where(empty, 0.0, 1.0 / views))


class LevelMoments(NamedTuple):
    """Moments of the integrand f in each of J bins of the level, over rows and masks.

    Attributes:
        second: [J] mean of f squared, ``v + g^2 + c``; for gradients the mean squared norm.
        mean: [J] mean of f, ``g``; for gradients the norm of the mean.
        data: [J] variance over rows of the mean of f given the row, ``c``, or None where it was
            not measured: that takes several masks of one row.
    """

    second: Array
    mean: Array
    data: Array | None = None


Target = Callable[[LevelMoments], Array]
"""From moments to the moment [J] whose root the density follows."""


def second_moment(moments: LevelMoments) -> Array:
    """``v + g^2 + c``: optimal for the total variance when levels are drawn independently."""
    return jnp.asarray(moments.second)


def level_variance(moments: LevelMoments) -> Array:
    """``v + c``, the second moment minus the squared mean: optimal for stratified levels only.

    Needs a uniform floor. Variation of g inside a bin counts as variance.
    """
    return jnp.maximum(jnp.asarray(moments.second) - jnp.square(moments.mean), 0.0)


def published_second_moment(moments: LevelMoments) -> Array:
    """``v + g^2``: the target of the StableDLLM scripts, optimal where c is like the rest or zero.

    ValueError if the moments hold no data variance.
    """
    if moments.data is None:
        raise ValueError(
            "published_second_moment needs the data variance c of each level; running moments "
            "from one mask per row cannot hold it: take moments that were measured with several "
            "masks per row, or another target"
        )
    return jnp.maximum(jnp.asarray(moments.second) - jnp.asarray(moments.data), 0.0)


def squared_mean(moments: LevelMoments) -> Array:
    """``g^2``, whose root is the mean loss: optimal where ``E f^2 / g^2`` is constant."""
    return jnp.square(moments.mean)


def moment_density(edges: ArrayLike, moment: ArrayLike, floor: ArrayLike) -> PiecewiseDensity:
    """Density proportional to the root of ``moment`` in each bin, mixed with the uniform one.

    Bin j of width d_j gets the mass ``(1 - floor) d_j sqrt(moment_j) / sum + floor d_j``, so no
    weight exceeds ``1 / floor``. Moments that are all zero or not finite give the uniform density.
    Args: ``edges``, [J + 1] quantiles from 0 to 1; ``moment``, [J] non-negative; ``floor``, the
    share of the uniform density in (0, 1]. The last two may be traced.
    Raises: ValueError if the edges do not run from 0 to 1, or there is not one moment per bin.
    """
    edges, moment = check_edges(edges), jnp.asarray(moment, jnp.float32)
    if moment.shape != (edges.size - 1,):  # one moment would be broadcast to all bins
        raise ValueError(
            f"{edges.size} edges make {edges.size - 1} bins and need a moment each, got moments of "
            f"shape {moment.shape}"
        )
    widths = jnp.diff(jnp.asarray(edges))
    root = jnp.sqrt(jnp.maximum(moment, 0.0))
    share = widths * (root / jnp.max(root))
    total = jnp.sum(share)
    usable = jnp.isfinite(total) & (total > 0)
    followed = jnp.where(usable, share / jnp.where(usable, total, 1.0), widths)
    return piecewise_density(edges, (1.0 - floor) * followed + floor * widths)


def check_floor(name: str, floor: float) -> None:
    """Raises ValueError unless ``floor`` is in (0, 1]."""
    if not 0 < floor <= 1:
        raise ValueError(
            f"{name} needs a floor in (0, 1], got {floor}: without a share of uniform levels a "
            "level that looked harmless would be lost, or get a huge weight"
        )


def gradient_stats(stats: LossStats, norms: Array) -> LossStats:
    """Statistics whose integrand is the row's gradient norm, for :func:`~mdm_jax.variance.ppots`.

    A loop that computes per-row gradients passes them to ``update`` in place of the loss
    statistics, ``norms`` [V, B, S] of the gradient of ``stats.raw * stats.weight``.
    """
    return stats._replace(raw=norms, weight=jnp.ones_like(norms))
