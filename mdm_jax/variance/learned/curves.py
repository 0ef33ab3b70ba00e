"""Time warping (CDCD, CDTD): levels drawn from the derivative of a fitted curve of the loss.
F(xi) / F(1), increasing in the noise ``xi = 1 - u`` in (0, 1), serves as distribution function.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mdm_jax.checks import Bins, Decay, LearningRate, Whole, checked
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.types import Array, PyTree
from mdm_jax.variance.densities import find_cell, open_interval, target_loss
from mdm_jax.variance.transform import LevelProfile, Phase, VarianceTransform
from mdm_jax.variance.warps import all_finite, counters, updates

_END_PENALTY = 3e-3
_NOISIEST = 1.0 - 2.0**-24  # in the last cell
_LEAST = 1e-6  # share of a cell at least; float32 cannot tell cells narrower than 2**-22


class LossCurve(NamedTuple):
    """A family of increasing curves F, as elementwise functions; ``init()`` is near F(xi) = xi.
    ``value(parameters, xi)`` is the loss, ``log_density(parameters, xi)`` the log derivative of F /
    F(1), nats, ``quantile(parameters, share)`` the inverse of F / F(1), and ``scaled(parameters,
    factor)`` the parameters of ``factor F``. ``end_penalty`` is the weight of ``F(1)^2 / 2`` beside
    the misfit's mean square.
    """

    init: Callable[[], PyTree]
    value: Callable[[PyTree, Array], Array]
    log_density: Callable[[PyTree, Array], Array]
    quantile: Callable[[PyTree, Array], Array]
    scaled: Callable[[PyTree, Array], PyTree]
    end_penalty: float = 0.0


class PiecewiseLinear(NamedTuple):
    """[K] logits of the cells' widths, which sum to 1, and [K] logarithms of their rises."""

    widths: Array
    heights: Array


class LogisticShape(NamedTuple):
    """A logistic curve in the log odds of xi: m, and the softplus inverses of v - 1 and F(1)."""

    middle: Array
    steepness: Array
    scale: Array


@checked
def piecewise_linear_curve(num_bins: Bins = 100) -> LossCurve:
    """Piecewise-linear curves (CDCD, Dieleman et al. 2022)."""

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

    def scaled(parameters: PiecewiseLinear, factor: Array) -> PiecewiseLinear:
        return parameters._replace(heights=parameters.heights + jnp.log(factor))

    return LossCurve(init, value, log_density, quantile, scaled, _END_PENALTY)


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

    def scaled(parameters: LogisticShape, factor: Array) -> LogisticShape:
        end = factor * jax.nn.softplus(parameters.scale)
        return parameters._replace(scale=end + jnp.log(-jnp.expm1(-end)))  # inverse softplus

    return LossCurve(init, value, log_density, quantile, scaled)


def squared_misfit(
    curve: LossCurve, parameters: PyTree, xi: Array, loss: Array, log_density: Array
) -> Array:
    """``(F(xi) - loss)^2 / density(xi)``, elementwise: least squares uniform in xi.
    ``log_density`` is that of the density that ``xi`` was drawn from; no gradient flows through it.
    """
    drawn = jax.lax.stop_gradient(log_density)
    return jnp.square(curve.value(parameters, xi) - loss) * jnp.exp(-drawn)


class CurveState(NamedTuple):
    """Fitted curves of the loss; counters as in PpotsState.
    ``curves``: parameters with a leading axis of G curves. ``averages``: their exponential moving
    averages, which levels are drawn from. ``optimizer``: Adam's moments.
    """

    curves: PyTree
    averages: PyTree
    optimizer: PyTree
    steps: Array
    rejected: Array


@checked
def curve_warp(
    name: str,
    curve: LossCurve,
    curve_of_level: Callable[[int], np.ndarray],
    learning_rate: LearningRate,
    decay: Decay,
    log_factor: Callable[[Array], Array] | None = None,
) -> VarianceTransform:
    """Draws levels from the derivatives of fitted curves, unweighted; see :func:`cdcd_warp`.
    ``curve_of_level`` maps S to [S] curve numbers below G; ``log_factor`` takes u [V, B, S].
    """
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

            error = losses.mean(per_level(one, curves, current.u, value, drawn))
            if not curve.end_penalty:
                return error
            # Of cells the noisy end is above what noisy losses say: few draws fall on the last
            # ones, whose rises can only be positive. Woodroofe & Sun (1993) penalise the end, which
            # leaves the curve where the losses rise by more.
            end = per_level(curve.value, curves, jnp.full_like(current.u, _NOISIEST))
            return error + 0.5 * curve.end_penalty * jnp.mean(jnp.square(end))

        # Curves start at the scale of the first losses: cells that a far too large F leaves behind
        # at the noisy end, narrow and steep, would take some 1% of the draws for ever.
        # Batches with nothing to learn from count as steps, but not of the optimiser.
        started, factor = state.optimizer[0].count > 0, first_scale(value, losses.count)
        start = jax.tree.map(
            lambda old, new: jnp.where(started, old, new),
            (state.curves, state.averages),
            tuple(jax.vmap(curve.scaled)(c, factor) for c in (state.curves, state.averages)),
        )
        gradient = jax.grad(misfit)(start[0])
        step, opt_state = optimizer.update(gradient, state.optimizer, start[0])
        curves = optax.apply_updates(start[0], step)
        averages = optax.incremental_update(curves, start[1], 1.0 - decay)
        changes = {"curves": curves, "averages": averages, "optimizer": opt_state}
        return changes, all_finite(changes)

    def first_scale(value: Array, count: Array) -> Array:
        """Twice the mean loss of each curve's levels, [G]: F(1) of the line that fits."""
        index = curve_of_level(value.shape[-1])
        own = index[:, None] == np.arange(np.max(index) + 1)
        total, number = (jnp.sum(a, axis=(0, 1)) @ own for a in (count * value, count))
        mean = total / jnp.where(number > 0, number, 1.0)
        return jnp.where((mean > 0) & jnp.isfinite(mean), 2 * mean, 1.0)

    def profile(state: CurveState, u: Array) -> LevelProfile:
        log_density = per_level(curve.log_density, state.averages, 1.0 - u)
        return LevelProfile(log_density, jnp.zeros_like(u))

    return VarianceTransform(
        name, Phase.WARP, init, draw, updates(learn), bias="biased", profile=profile
    )


@checked
def cdcd_warp(
    num_bins: Bins = 100,
    learning_rate: LearningRate = 1e-2,
    decay: Decay = 0.99,
    log_factor: Callable[[Array], Array] | None = None,
) -> VarianceTransform:
    """CDCD time warping: equal shares of the draws cover equal rises of the loss.

    A piecewise-linear curve F(xi) of ``num_bins`` cells, free in width and height, is fitted to the
    raw loss per target element by least squares uniform in the noise ``xi = 1 - u``, with Adam, and
    a small penalty on F(1)^2: without it losses that are flat at high noise keep some draws there.
    Levels come from the derivative of its average (``decay`` per batch, 0 for none), with *no*
    weight. The loss has to rise with the noise: for Gaussian diffusion, where the error of eps
    falls, fit that of the clean data by ``log_factor=lambda u: -law.icdf(u)``, added to the log
    loss.
    Keeps: the range of levels, not the loss: the effective weighting is the objective's times the
    learnt density, which moves. Couples: steps, through the state. Costs: one view. Removes: draws
    at levels where the loss hardly changes, by changing the estimand. Bias: biased. Reference:
    Dieleman et al. 2022 (CDCD).
    """
    curve = piecewise_linear_curve(num_bins)
    return curve_warp(
        "cdcd_warp", curve, lambda levels: np.zeros(levels, int), learning_rate, decay, log_factor
    )


@checked
def cdtd_warp(
    curve: LossCurve | None = None,
    groups: Annotated[
        Sequence[int], Whole("[0, 1e6]", "", "curve of each level, from 0; (): one each", True)
    ] = (),
    normalisers: Sequence[float] | None = None,
    learning_rate: LearningRate = 1e-2,
    decay: Decay = 0.99,
    log_factor: Callable[[Array], Array] | None = None,
) -> VarianceTransform:
    """CDTD time warping: a row's levels at one common fraction of the loss, a curve per data type.

    :func:`cdcd_warp` with one base quantile for the S levels of a row and a ``curve`` (piecewise
    linear if not given) per group; ``groups`` [S] numbers each level's from 0, one each if
    empty. The fit, not training, divides losses by ``normalisers`` [S], such as entropies of
    marginals. Condition the network on the logSNR: the meaning of the common quantile changes with
    the curves.
    Keeps: each level's range, not the loss, nor the independence of a row's levels. Couples: the
    levels of a row; steps through the state. Costs: one view. Removes: differences in difficulty
    between levels and types, by changing the estimand. Bias: biased. Reference: Mueller et al. 2025
    (CDTD). Raises: ValueError if groups or normalisers do not fit S.
    """
    if set(groups) != set(range(len(set(groups)))):
        raise ValueError(
            f"cdtd_warp needs groups numbered from 0 without gaps, got {tuple(groups)}"
        )
    units = None if normalisers is None else np.asarray(normalisers, np.float64)
    if units is not None and not (np.all(np.isfinite(units)) and np.all(units > 0)):
        raise ValueError(f"cdtd_warp needs positive normalisers, got {tuple(normalisers)}")

    def curve_of_level(levels: int) -> np.ndarray:
        for name, setting in (("groups", groups), ("normalisers", normalisers)):
            if setting and len(setting) != levels:
                raise ValueError(
                    f"cdtd_warp: {len(setting)} {name} do not fit {levels} levels per row; give "
                    "one for each level"
                )
        return np.asarray(groups) if groups else np.arange(levels)

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


@checked
def cdtd_warp_logistic(
    groups: Annotated[
        Sequence[int], Whole("[0, 1e6]", "", "curve of each level, from 0; (): one each", True)
    ] = (),
    normalisers: Sequence[float] | None = None,
    learning_rate: LearningRate = 1e-2,
    decay: Decay = 0.99,
    log_factor: Callable[[Array], Array] | None = None,
) -> VarianceTransform:
    """:func:`cdtd_warp` with the curves of :func:`logistic_curve`, of three parameters each.

    Keeps, Couples, Costs, Removes, Bias, Reference, Raises: as there.
    """
    each = cdtd_warp(logistic_curve(), groups, normalisers, learning_rate, decay, log_factor)
    return each._replace(name="cdtd_warp_logistic")


def _at_least(shares: Array) -> Array:
    return (shares + _LEAST) / (1.0 + _LEAST * shares.size)


def _edges(parts: Array, total: Array) -> Array:
    """[K + 1] cumulative sums from 0 to exactly ``total``."""
    inner = jnp.cumsum(parts[:-1])
    return jnp.concatenate([jnp.zeros_like(parts[:1]), inner, total[None]])


def _logit(share: Array) -> Array:
    return jnp.log(share) - jnp.log1p(-share)
