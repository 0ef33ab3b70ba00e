"""Levels from the slope of a fitted curve of the loss: what time warping methods share."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.typing import Array, PyTree
from mdm_jax.variance.learning import accept, all_finite, target_loss, total_count
from mdm_jax.variance.loss_curves import LossCurve, squared_misfit
from mdm_jax.variance.quantile_density import open_interval
from mdm_jax.variance.transform import LevelProfile, Phase, VarianceTransform


class CurveState(NamedTuple):
    """Fitted curves of the loss.

    Attributes:
        curves: parameters of the family, each with a leading axis of G curves, as fitted.
        averages: their exponential moving averages, from which levels are drawn.
        optimizer: Adam's moments.
        steps: number of batches learnt from.
        rejected: number of batches that were not finite and changed nothing else.
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

    Args:
        name: of the transform.
        curve: family of the curves.
        curve_of_level: from S to the number of each level's curve, [S] integers from 0 to G - 1.
        learning_rate: of Adam.
        decay: of the averages per batch; 0 draws from the curves as fitted.
        log_factor: log of a factor on the loss as a function of the quantile [V, B, S], before it
            is fitted.

    Raises:
        ValueError: unless the learning rate is positive and the decay in [0, 1).
    """
    if not learning_rate > 0:
        raise ValueError(f"{name} needs learning_rate > 0, got {learning_rate}")
    if not 0 <= decay < 1:
        raise ValueError(f"{name} needs a decay in [0, 1), got {decay}")
    optimizer = optax.adam(learning_rate, b2=0.99)

    def init(spec: DrawSpec) -> CurveState:
        count = int(np.max(curve_of_level(spec.num_levels))) + 1
        curves = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), curve.init())
        return CurveState(
            curves=curves,
            averages=curves,
            optimizer=optimizer.init(curves),
            steps=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((), jnp.int32),
        )

    def per_level(function: Callable[..., Array], curves: PyTree, *values: Array) -> Array:
        """``function(parameters of the level's curve, *values[..., s])`` for each s."""
        if jax.tree.leaves(curves)[0].shape[0] == 1:
            return function(jax.tree.map(lambda leaf: leaf[0], curves), *values)
        chosen = curve_of_level(values[0].shape[-1])
        each = jax.tree.map(lambda leaf: leaf[chosen], curves)
        axes = (0, *(-1 for _ in values))
        return jax.vmap(function, in_axes=axes, out_axes=-1)(each, *values)

    def draw(_key: Array, state: CurveState, current: Draw, _spec: DrawSpec) -> Draw:
        # F rises with the noise, u falls with it: small quantiles stay small.
        noise = per_level(curve.quantile, state.averages, 1.0 - current.u)
        return current._replace(u=open_interval(1.0 - noise))

    def update(state: CurveState, current: Draw, stats: LossStats) -> CurveState:
        value, count = losses = target_loss(current, stats)
        if log_factor is not None:
            value = value * jnp.exp(log_factor(current.u))
        # Of the averages, which levels were drawn from, not of the curves that are fitted.
        drawn = per_level(curve.log_density, state.averages, 1.0 - current.u)

        def misfit(curves: PyTree) -> Array:
            def one(parameters: PyTree, u: Array, loss: Array, log_density: Array) -> Array:
                return squared_misfit(curve, parameters, 1.0 - u, loss, log_density)

            each = per_level(one, curves, current.u, value, drawn)
            return jnp.sum(count * each) / total_count(losses)

        gradient = jax.grad(misfit)(state.curves)
        updates, opt_state = optimizer.update(gradient, state.optimizer, state.curves)
        curves = optax.apply_updates(state.curves, updates)
        learnt = CurveState(
            curves=curves,
            averages=optax.incremental_update(curves, state.averages, 1.0 - decay),
            optimizer=opt_state,
            steps=state.steps + 1,
            rejected=state.rejected,
        )
        return accept(all_finite(learnt), learnt, state)

    def profile(state: CurveState, u: Array) -> LevelProfile:
        log_density = per_level(curve.log_density, state.averages, 1.0 - u)
        return LevelProfile(log_density, jnp.zeros_like(u))

    return VarianceTransform(name, Phase.WARP, init, draw, update, bias="biased", profile=profile)
