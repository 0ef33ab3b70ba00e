"""Curves of the loss over the noise, fitted by regression: what time warping draws from.

A curve F(xi) rises with a noise coordinate xi in (0, 1), here ``xi = 1 - u``. Divided by its value
at 1 it is a distribution function, so its slope is a density over levels and its inverse a sampler.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.typing import Array, PyTree

_LEAST = 1e-6  # share of a cell at least; float32 cannot tell cells narrower than 2**-22


class LossCurve(NamedTuple):
    """A family of rising curves. Functions of xi are elementwise and jit-able.

    Attributes:
        init: ``init() -> parameters``, near the line F(xi) = xi.
        value: ``value(parameters, xi)``, the loss at this noise.
        log_density: ``log_density(parameters, xi)``, log of the slope of F / F(1), nats.
        quantile: ``quantile(parameters, share)``, where F / F(1) has the given value.
    """

    init: Callable[[], PyTree]
    value: Callable[[PyTree, Array], Array]
    log_density: Callable[[PyTree, Array], Array]
    quantile: Callable[[PyTree, Array], Array]


class PiecewiseLinear(NamedTuple):
    """Cells that are free in both directions.

    Attributes:
        widths: [K] logits of the widths, which add up to 1.
        heights: [K] logarithms of the rises.
    """

    widths: Array
    heights: Array


class LogisticShape(NamedTuple):
    """A logistic curve in the log odds of xi.

    Attributes:
        middle: [] log odds at which half of the loss is reached, m.
        steepness: [] softplus inverse of v - 1.
        scale: [] softplus inverse of F(1).
    """

    middle: Array
    steepness: Array
    scale: Array


def piecewise_linear_curve(num_bins: int = 100) -> LossCurve:
    """Piecewise-linear curves with ``num_bins`` cells (CDCD, Dieleman et al. 2022).

    Raises:
        ValueError: unless ``num_bins`` is positive.
    """
    if num_bins < 1:
        raise ValueError(f"piecewise_linear_curve needs num_bins >= 1, got {num_bins}")

    def init() -> PiecewiseLinear:
        level = -math.log(num_bins)
        return PiecewiseLinear(*(jnp.full(num_bins, level, jnp.float32) for _ in range(2)))

    def cells(parameters: PiecewiseLinear) -> tuple[Array, Array, Array, Array]:
        """Widths and rises, [K], and both summed up, [K + 1]."""
        widths = _at_least(jax.nn.softmax(parameters.widths))
        heights = jnp.exp(parameters.heights)
        total = jnp.sum(heights)
        heights = total * _at_least(heights / total)
        return widths, heights, _edges(widths, jnp.ones_like(total)), _edges(heights, total)

    def value(parameters: PiecewiseLinear, xi: Array) -> Array:
        widths, heights, left, low = cells(parameters)
        cell = _find(left, xi)
        return low[cell] + (xi - left[cell]) * (heights / widths)[cell]

    def log_density(parameters: PiecewiseLinear, xi: Array) -> Array:
        widths, heights, left, low = cells(parameters)
        return jnp.log(heights / widths / low[-1])[_find(left, xi)]

    def quantile(parameters: PiecewiseLinear, share: Array) -> Array:
        widths, heights, left, low = cells(parameters)
        place = share * low[-1]
        cell = _find(low, place)
        inside = (place - low[cell]) / heights[cell]
        return left[cell] + jnp.clip(inside, 0.0, 1.0) * widths[cell]

    return LossCurve(init, value, log_density, quantile)


def logistic_curve() -> LossCurve:
    """Curves of three parameters, ``F(xi) = c / (1 + (odds(xi) / exp(m))^-v)`` with v > 1.

    F / F(1) is a distribution function with the quantile ``sigmoid(m + logit(share) / v)``.
    The form of CDTD (Mueller et al. 2025).
    """

    def init() -> LogisticShape:
        # The line has v = 1, which is out of reach; v = 1.02, F(1) = 1.
        starts = (0.0, -4.0, math.log(math.expm1(1.0)))
        return LogisticShape(*(jnp.asarray(a, jnp.float32) for a in starts))

    def shape(parameters: LogisticShape) -> tuple[Array, Array]:
        return 1.0 + jax.nn.softplus(parameters.steepness), jax.nn.softplus(parameters.scale)

    def value(parameters: LogisticShape, xi: Array) -> Array:
        steepness, scale = shape(parameters)
        return scale * jax.nn.sigmoid(steepness * (_logit(xi) - parameters.middle))

    def log_density(parameters: LogisticShape, xi: Array) -> Array:
        steepness, _ = shape(parameters)
        z = steepness * (_logit(xi) - parameters.middle)
        rise = jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z) + jnp.log(steepness)
        return rise - jnp.log(xi) - jnp.log1p(-xi)

    def quantile(parameters: LogisticShape, share: Array) -> Array:
        steepness, _ = shape(parameters)
        return jax.nn.sigmoid(parameters.middle + _logit(share) / steepness)

    return LossCurve(init, value, log_density, quantile)


def squared_misfit(
    curve: LossCurve, parameters: PyTree, xi: Array, loss: Array, log_density: Array
) -> Array:
    """``(F(xi) - loss)^2 / density(xi)``, elementwise: uniform in xi for levels of that density.

    Args:
        curve: the family.
        parameters: of the curve F that is fitted.
        xi: noise, any shape.
        loss: at this noise, same shape.
        log_density: log of the density over xi that the levels were *drawn* from, nats, same shape.
            Nothing is fitted through it.
    """
    drawn = jax.lax.stop_gradient(log_density)
    return jnp.square(curve.value(parameters, xi) - loss) * jnp.exp(-drawn)


def _at_least(shares: Array) -> Array:
    return (shares + _LEAST) / (1.0 + _LEAST * shares.size)


def _edges(parts: Array, total: Array) -> Array:
    """[K + 1] from 0 to ``total``, which the sum of all parts may miss by rounding."""
    inner = jnp.cumsum(parts[:-1])
    return jnp.concatenate([jnp.zeros_like(parts[:1]), inner, total[None]])


def _find(edges: Array, places: Array) -> Array:
    cell = jnp.searchsorted(edges, places, side="right") - 1
    return jnp.clip(cell, 0, edges.size - 2)


def _logit(share: Array) -> Array:
    return jnp.log(share) - jnp.log1p(-share)
