"""Time warping: levels drawn from the slope of a fitted curve of the loss (CDCD, CDTD).

A curve F(xi) rises with a noise coordinate xi in (0, 1), here ``xi = 1 - u``. Divided by its value
at 1 it is a distribution function, so its slope is a density over levels and its inverse a sampler.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.types import Array, PyTree
from mdm_jax.variance.densities import find_cell, open_interval, target_loss
from mdm_jax.variance.transform import LevelProfile, Phase, VarianceTransform
from mdm_jax.variance.warps import all_finite, check_settings, counters, updates

_LEAST = 1e-6  # share of a cell at least; float32 cannot tell cells narrower than 2**-22


class LossCurve(NamedTuple):
    """A family of rising curves, as elementwise functions.

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
    """Cells: [K] logits of their widths, which add up to 1, and [K] logarithms of their rises."""

    widths: Array
    heights: Array


class LogisticShape(NamedTuple):
    """A logistic curve in the log odds of xi: m, and the softplus inverses of v - 1 and F(1)."""

    middle: Array
    steepness: Array
    scale: Array


def piecewise_linear_curve(num_bins: int = 100) -> LossCurve:
    """Piecewise-linear curves with ``num_bins`` cells (CDCD, Dieleman et al. 2022).
    ValueError unless ``num_bins`` is positive.
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
        cell = find_cell(left, xi)
        return low[cell] + (xi - left[cell]) * (heights / widths)[cell]

    def log_density(parameters: PiecewiseLinear, xi: Array) -> Array:
        widths, heights, left, low = cells(parameters)
        return jnp.log(heights / widths / low[-1])[find_cell(left, xi)]

    def quantile(parameters: PiecewiseLinear, share: Array) -> Array:
        widths, heights, left, low = cells(parameters)
        loss = share * low[-1]
        cell = find_cell(low, loss)
        inside = (loss - low[cell]) / heights[cell]
        return left[cell] + jnp.clip(inside, 0.0, 1.0) * widths[cell]

    return LossCurve(init, value, log_density, quantile)


def logistic_curve() -> LossCurve:
    """Curves of three parameters, ``F(xi) = c / (1 + (odds(xi) / exp(m))^-v)`` with v > 1.

    F / F(1) has the quantile ``sigmoid(m + logit(share) / v)``; CDTD (Mueller et al. 2025).
    """

    def init() -> LogisticShape:
        # The line has v = 1, which is out of reach; v = 1.02, F(1) = 1.
        starts = (0.0, -4.0, math.log(math.expm1(1.0)))
        return LogisticShape(*(jnp.asarray(a, jnp.float32) for a in starts))

    def steepness_of(parameters: LogisticShape) -> Array:
        return 1.0 + jax.nn.softplus(parameters.steepness)

    def odds(parameters: LogisticShape, xi: Array) -> Array:
        return steepness_of(parameters) * (_logit(xi) - parameters.middle)

    def value(parameters: LogisticShape, xi: Array) -> Array:
        return jax.nn.softplus(parameters.scale) * jax.nn.sigmoid(odds(parameters, xi))

    def log_density(parameters: LogisticShape, xi: Array) -> Array:
        z = odds(parameters, xi)
        rise = jax.nn.log_sigmoid(z) + jax.nn.log_sigmoid(-z) + jnp.log(steepness_of(parameters))
        return rise - jnp.log(xi) - jnp.log1p(-xi)

    def quantile(parameters: LogisticShape, share: Array) -> Array:
        return jax.nn.sigmoid(parameters.middle + _logit(share) / steepness_of(parameters))

    return LossCurve(init, value, log_density, quantile)


def squared_misfit(
    curve: LossCurve, parameters: PyTree, xi: Array, loss: Array, log_density: Array
) -> Array:
    """``(F(xi) - loss)^2 / density(xi)``, elementwise: uniform in xi for levels of that density.

    ``loss`` and ``log_density``, of the density that levels were *drawn* from (no gradient flows
    through it), are those at the noise ``xi``.
    """
    drawn = jax.lax.stop_gradient(log_density)
    return jnp.square(curve.value(parameters, xi) - loss) * jnp.exp(-drawn)


class CurveState(NamedTuple):
    """Fitted curves of the loss.

    Attributes:
        curves: parameters of the family, each with a leading axis of G curves, as fitted.
        averages: their exponential moving averages, from which levels are drawn.
        optimizer: Adam's moments.
        steps, rejected: as in :class:`~mdm_jax.variance.ppots.PpotsState`.
    """

    curves: PyTree
    averages: PyTree
    optimizer: PyTree
    steps: Array
    rejected: Array


def curve_warp(
    name: str,
    curve: LossCurve,
    curve_of_level: Callable[[int], np.ndarray],
    learning_rate: float,
    decay: float,
    log_factor: Callable[[Array], Array] | None = None,
) -> VarianceTransform:
    """Draws levels from the slopes of fitted curves and pays no weight.

    ``curve_of_level`` maps S to the number of each level's curve, [S] integers from 0 to G - 1;
    ``log_factor`` takes quantiles [V, B, S]. The rest, and errors, as for :func:`cdcd_warp`.
    """
    check_settings(name, decay=decay, learning_rate=learning_rate)
    optimizer = optax.adam(learning_rate, b2=0.99)

    def init(spec: DrawSpec) -> CurveState:
        count = int(np.max(curve_of_level(spec.num_levels))) + 1
        curves = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), curve.init())
        averages = jax.tree.map(jnp.copy, curves)  # a donated state holds no buffer twice
        return CurveState(curves, averages, optimizer.init(curves), **counters())

    def per_level(function: Callable[..., Array], curves: PyTree, *values: Array) -> Array:
        """``function(parameters of the level's curve, *values[..., s])`` for each s."""
        if jax.tree.leaves(curves)[0].shape[0] == 1:
            return function(jax.tree.map(lambda leaf: leaf[0], curves), *values)
        index = curve_of_level(values[0].shape[-1])
        each = jax.tree.map(lambda leaf: leaf[index], curves)
        axes = (0, *(-1 for _ in values))
        return jax.vmap(function, in_axes=axes, out_axes=-1)(each, *values)

    def draw(_key: Array, state: CurveState, current: Draw, _spec: DrawSpec) -> Draw:
        # F rises with the noise, u falls with it: small quantiles stay small.
        noise = per_level(curve.quantile, state.averages, 1.0 - current.u)
        return current._replace(u=open_interval(1.0 - noise))

    def learn(
        state: CurveState, current: Draw, stats: LossStats
    ) -> tuple[dict[str, PyTree], Array]:
        losses = target_loss(current, stats)
        value = losses.value
        if log_factor is not None:
            value = value * jnp.exp(log_factor(current.u))
        # Of the averages, which levels were drawn from, not of the curves that are fitted.
        drawn = per_level(curve.log_density, state.averages, 1.0 - current.u)

        def misfit(curves: PyTree) -> Array:
            def one(parameters: PyTree, u: Array, loss: Array, log_density: Array) -> Array:
                return squared_misfit(curve, parameters, 1.0 - u, loss, log_density)

            return losses.mean(per_level(one, curves, current.u, value, drawn))

        gradient = jax.grad(misfit)(state.curves)
        step, opt_state = optimizer.update(gradient, state.optimizer, state.curves)
        curves = optax.apply_updates(state.curves, step)
        averages = optax.incremental_update(curves, state.averages, 1.0 - decay)
        changes = {"curves": curves, "averages": averages, "optimizer": opt_state}
        return changes, all_finite(changes)

    def profile(state: CurveState, u: Array) -> LevelProfile:
        log_density = per_level(curve.log_density, state.averages, 1.0 - u)
        return LevelProfile(log_density, jnp.zeros_like(u))

    return VarianceTransform(
        name, Phase.WARP, init, draw, updates(learn), bias="biased", profile=profile
    )


def cdcd_warp(
    num_bins: int = 100,
    learning_rate: float = 1e-2,
    decay: float = 0.99,
    log_factor: Callable[[Array], Array] | None = None,
) -> VarianceTransform:
    """Draws levels so that each share of the draws covers the same share of the rise of the loss.

    A piecewise-linear curve F(xi) over the noise ``xi = 1 - u`` is fitted to the raw loss per
    target element by least squares, uniformly in xi. Levels are drawn from its slope, and *no*
    weight is paid. The loss has to rise with the noise; for Gaussian diffusion, where the error of
    eps falls, pass ``log_factor=lambda u: -law.icdf(u)`` to fit the error of the clean data.

    Keeps: the range of levels, not the loss: the effective weighting is the objective's times the
    learnt density, which moves. Couples: steps, through the state. Costs: one view.
    Removes: draws at levels where nothing is decided, by changing what is estimated. Bias: biased.
    Reference: Dieleman et al. 2022 (CDCD), time warping.
    Args: ``num_bins``, K cells free in width and height; ``learning_rate`` of Adam; ``decay`` per
    batch of the average that levels are drawn from, 0 for the curve as fitted; ``log_factor`` of
    the quantile, on the loss before it is fitted. Raises: ValueError if a setting is out of range.
    """
    curve = piecewise_linear_curve(num_bins)
    return curve_warp(
        "cdcd_warp", curve, lambda levels: np.zeros(levels, int), learning_rate, decay, log_factor
    )


def cdtd_warp(
    curve: LossCurve | None = None,
    groups: Sequence[int] | None = None,
    normalisers: Sequence[float] | None = None,
    learning_rate: float = 1e-2,
    decay: float = 0.99,
    log_factor: Callable[[Array], Array] | None = None,
) -> VarianceTransform:
    """Draws the levels of a row at one common fraction of the loss, a curve for each data type.

    As :func:`cdcd_warp`, with a curve for each group of the S levels of a row and one base quantile
    for all. Condition the network on the logSNR, not on the common quantile, which changes its
    meaning whenever a curve moves.

    Keeps: each level's range, not the loss (as there), nor the independence of a row's levels.
    Couples: the levels of a row; steps through the state. Costs: one view.
    Removes: differences in difficulty between levels and types, by changing what is estimated.
    Bias: biased. Reference: Mueller et al. 2025 (CDTD).

    Args:
        curve: family of curves, piecewise linear if not given, or ``logistic_curve()``.
        groups: for each level the number of its curve, 0 .. G - 1; one curve per level if not
            given.
        normalisers: for each level the unit that its loss is divided by before it is fitted, such
            as the entropy of a marginal; the loss that trains the network is not divided.
        learning_rate, decay, log_factor: see :func:`cdcd_warp`.

    Raises: ValueError if a setting is out of range, or groups or normalisers do not fit S.
    """
    if groups is not None and set(groups) != set(range(len(set(groups)))):
        raise ValueError(
            f"cdtd_warp needs groups numbered from 0 without gaps, got {tuple(groups)}"
        )
    units = None if normalisers is None else np.asarray(normalisers, np.float64)
    if units is not None and not (np.all(np.isfinite(units)) and np.all(units > 0)):
        raise ValueError(f"cdtd_warp needs positive normalisers, got {tuple(normalisers)}")

    def curve_of_level(levels: int) -> np.ndarray:
        for name, setting in (("groups", groups), ("normalisers", normalisers)):
            if setting is not None and len(setting) != levels:
                raise ValueError(
                    f"cdtd_warp: {len(setting)} {name} do not fit {levels} levels per row; give "
                    "one for each level"
                )
        return np.arange(levels) if groups is None else np.asarray(groups)

    def calibrated(u: Array) -> Array:
        factor = jnp.zeros_like(u) if log_factor is None else log_factor(u)
        if units is None:
            return factor
        return factor - jnp.log(jnp.asarray(units, u.dtype)).reshape(1, 1, -1)

    family = piecewise_linear_curve() if curve is None else curve
    each = curve_warp("cdtd_warp", family, curve_of_level, learning_rate, decay, calibrated)

    def draw(key: Array, state: CurveState, current: Draw, spec: DrawSpec) -> Draw:
        common = jnp.broadcast_to(current.u[..., :1], current.u.shape)
        return each.draw(key, state, current._replace(u=common), spec)

    return each._replace(draw=draw)


def _at_least(shares: Array) -> Array:
    return (shares + _LEAST) / (1.0 + _LEAST * shares.size)


def _edges(parts: Array, total: Array) -> Array:
    """[K + 1] from 0 to ``total``, which the sum of all parts may miss by rounding."""
    inner = jnp.cumsum(parts[:-1])
    return jnp.concatenate([jnp.zeros_like(parts[:1]), inner, total[None]])


def _logit(share: Array) -> Array:
    return jnp.log(share) - jnp.log1p(-share)
