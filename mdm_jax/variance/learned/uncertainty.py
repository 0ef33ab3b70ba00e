"""A learned weighting that equalises the mean loss over levels."""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mdm_jax.checks import LearningRate, Whole, checked
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.types import Array, PyTree
from mdm_jax.variance.densities import integrand
from mdm_jax.variance.transform import LevelProfile, Phase, VarianceTransform
from mdm_jax.variance.warps import all_finite, counters, updates


class UncertaintyState(NamedTuple):
    """Coefficients [C] of Fourier features, and Adam's moments; counters as in PpotsState."""

    coefficients: Array
    optimizer: PyTree
    steps: Array
    rejected: Array


def logit_coordinate(u: Array) -> Array:
    """``logit(u) / 8``: up to its sign EDM2's ``log(sigma) / 4``, for the law logistic(0, 1)."""
    return (jnp.log(u) - jnp.log1p(-u)) / 8


@checked
def uncertainty_weighting(
    coordinate: Callable[[Array], Array] = logit_coordinate,
    num_features: Annotated[int, Whole("[1, 1e6]", "", "Fourier features of the level")] = 128,
    learning_rate: LearningRate = 1e-2,
    seed: Annotated[int, Whole("[0, 4294967295]", "", "of the features")] = 0,
) -> VarianceTransform:
    """Learned loss weighting by level: divides the loss by ``exp(s(u))``, which follows its mean.

    ``s`` is linear in C = ``num_features`` frozen Fourier features (from ``seed``) of
    ``coordinate``, elementwise in the quantile and of order 1 (``lambda u: -law.icdf(u) / 8`` is
    EDM2's ``log(sigma) / 4``). Adam minimises ``f exp(-s) + s``, f the raw loss times the
    objective's weight per eligible element, at ``exp(s) = E[f | u]``. The network trains with s
    fixed: the gradient of joint training.
    Keeps: the levels (it is a chain's warp), not the loss: the weighting becomes
    ``p / E[l | level]`` over the logSNR, p the objective's law, and moves. Couples: steps, through
    the state. Costs: one view. Removes: variance by changing the estimand: all levels weigh the
    same. Bias: biased. Reference: Karras et al. 2024 (EDM2), app. B.2, but coefficients not
    normalised (zero at start); Kendall et al. 2018.
    """
    random = np.random.default_rng(seed)
    frequencies = 2 * np.pi * random.standard_normal(num_features)
    phases = 2 * np.pi * random.random(num_features)
    optimizer = optax.adam(learning_rate)

    def log_scale(coefficients: Array, u: Array) -> Array:
        each = (1,) * u.ndim + (-1,)
        angle = jnp.asarray(frequencies, u.dtype).reshape(each) * coordinate(u)[..., None]
        features = jnp.cos(angle + jnp.asarray(phases, u.dtype).reshape(each))
        return jnp.sum(coefficients.reshape(each) * features, axis=-1) * (2 / num_features) ** 0.5

    def init(_spec: DrawSpec) -> UncertaintyState:
        coefficients = jnp.zeros(num_features, jnp.float32)
        return UncertaintyState(coefficients, optimizer.init(coefficients), **counters())

    def draw(_key: Array, state: UncertaintyState, current: Draw, _spec: DrawSpec) -> Draw:
        log_weight = current.log_weight - log_scale(state.coefficients, current.u)
        return current._replace(log_weight=log_weight)

    def learn(
        state: UncertaintyState, current: Draw, stats: LossStats
    ) -> tuple[dict[str, PyTree], Array]:
        losses = integrand(current, stats)

        def mismatch(coefficients: Array) -> Array:
            return losses.mean(uncertainty_loss(losses.value, log_scale(coefficients, current.u)))

        gradient = jax.grad(mismatch)(state.coefficients)
        step, opt_state = optimizer.update(gradient, state.optimizer, state.coefficients)
        coefficients = optax.apply_updates(state.coefficients, step)
        changes = {"coefficients": coefficients, "optimizer": opt_state}
        return changes, all_finite(changes)

    def profile(state: UncertaintyState, u: Array) -> LevelProfile:
        return LevelProfile(jnp.zeros_like(u), -log_scale(state.coefficients, u))

    return VarianceTransform(
        "uncertainty_weighting",
        Phase.WARP,
        init,
        draw,
        updates(learn),
        bias="biased",
        profile=profile,
    )


def uncertainty_loss(loss: Array, log_scale: Array) -> Array:
    """``loss exp(-s) + s``: least over s where ``exp(s)`` is the mean loss."""
    return loss * jnp.exp(-log_scale) + log_scale
