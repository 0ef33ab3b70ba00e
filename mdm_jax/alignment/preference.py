"""Losses of preference pairs on bounds: DPO (VRPO), IPO, SimPO, KTO, plain and cross-fitted.

All take scores [R, B] of R independent estimates, in nats (``bounds.replicate_means``), and return
a loss for each of B pairs or answers. The plain loss of their mean is biased upwards by the mask
noise and its gradient with it; a *cross-fitted* one multiplies the gradient of each estimate by the
loss's derivative at the mean of the *others*, so its direction is exact where the score is a single
number. Both need no pass more.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdm_jax.alignment.bounds import ElboPair, replicate_means
from mdm_jax.alignment.methods import PER_ANSWER, PER_TOKEN, Constant, in_unit
from mdm_jax.types import Array


def margins(chosen: ElboPair, rejected: ElboPair, replicates: int = 1) -> Array:
    """``(Bd - Bd_ref)(chosen) - (Bd - Bd_ref)(rejected)``, nats [R, B].

    Policy and reference should share their draw; chosen and rejected should not (whether that helps
    depends on the sign of a covariance of unlike answers).
    """
    values = (chosen.policy - chosen.reference) - (rejected.policy - rejected.reference)
    return replicate_means(values, replicates)


def crossfitted(loss: Callable[[Array], Array], scores: Array) -> Array:
    """``loss`` of scores [R, ...] with the derivative at each taken from the other R - 1.

    ELBO: the gradient's expectation is ``E[loss'(mean of R - 1)] grad score``: for one score, of
    the exact direction, and of the exact length too where the loss is quadratic. Its value is that
    of the plain loss of the mean, for logs. ValueError for R < 2.
    """
    count = scores.shape[0]
    if count < 2:
        raise ValueError(
            "a cross-fitted loss needs two or more independent replicates of the chain, got "
            f"{count}: take replicates=2 (alignment.replicates), or the plain loss"
        )
    fixed = jax.lax.stop_gradient(scores)
    others = (jnp.sum(fixed, axis=0, keepdims=True) - fixed) / (count - 1)
    slope = jax.vjp(loss, others)[1](jnp.ones_like(loss(others)))[0]
    surrogate = jnp.mean(slope * scores, axis=0)
    return plain(loss, fixed) + surrogate - jax.lax.stop_gradient(surrogate)


def plain(loss: Callable[[Array], Array], scores: Array) -> Array:
    """``loss`` of the mean of scores [R, ...] over R: biased by half its curvature times Var."""
    return loss(jnp.mean(scores, axis=0))


Estimate = Callable[[Callable[[Array], Array], Array], Array]
"""How the loss of a noisy score is estimated: :func:`crossfitted` or :func:`plain`."""


def dpo(scores: Array, beta: Constant, estimate: Estimate = crossfitted) -> Array:
    """``-log sigmoid(beta margin)`` [B] of :func:`margins`; beta in 1/nats per answer.

    ELBO: exact; with :func:`crossfitted` the direction of the gradient, with :func:`plain` (VRPO)
    neither: it adds a penalty on the mask variance. Policy gradient: none. Passes: R views of
    policy and reference for each answer. Source: Rafailov et al. 2023; VRPO (LLaDA 1.5, arXiv
    2505.19223). DARE's code divides the bounds by the padded length and keeps beta, so that the
    sigmoid stays at 1/2. TypeError and ValueError for a beta in another unit.
    """
    beta = in_unit(beta, PER_ANSWER, "beta of dpo")
    return estimate(lambda margin: -jax.nn.log_sigmoid(beta * margin), scores)


def ipo(scores: Array, beta: Constant, estimate: Estimate = crossfitted) -> Array:
    """``(margin - 1 / (2 beta))^2`` [B] of :func:`margins`; beta in 1/nats per answer.

    ELBO: exact, and cross-fitted the gradient as well, in direction and length. Policy gradient:
    none. Passes as of :func:`dpo`. Source: Azar et al. 2023.
    """
    target = 0.5 / in_unit(beta, PER_ANSWER, "beta of ipo")
    return estimate(lambda margin: jnp.square(margin - target), scores)


def simpo(
    chosen: Array,
    rejected: Array,
    beta: Constant,
    gap: float = 0.5,
    estimate: Estimate = crossfitted,
) -> Array:
    """``-log sigmoid(beta (chosen - rejected) - gap)`` [B] of bounds per token [R, B].

    ELBO: exact. Policy gradient: none. Passes: R views of the policy for each answer, and no
    reference. Source: Meng et al. 2024. ``beta`` in 1/nats per token; ``gap``, a pure number, is
    their gamma.
    """
    beta = in_unit(beta, PER_TOKEN, "beta of simpo")
    return estimate(lambda score: -jax.nn.log_sigmoid(beta * score - gap), chosen - rejected)


def kto(
    scores: Array,
    desirable: Array,
    beta: Constant,
    *,
    weights: tuple[float, float] = (1.0, 1.0),
    estimate: Estimate = crossfitted,
) -> Array:
    """``w (1 - sigmoid(+-beta (score - z)))`` [B] of ``Bd - Bd_ref`` [R, B], answers unpaired.

    ``desirable`` [B] bool gives the sign and w (``weights``: of desirable ones, of others); z is
    the batch's mean score, at least 0, without gradient: an estimate of the divergence from the
    reference by this batch's own answers. ELBO: exact. Policy gradient: none. Passes as of
    :func:`dpo`. Source: Ethayarajh et al. 2024; ELBO-KTO (arXiv 2510.23658), whose code keeps the
    same masks of a row in every epoch and scores nats per token.
    """
    beta = in_unit(beta, PER_ANSWER, "beta of kto")
    fixed = jax.lax.stop_gradient(jnp.mean(scores, axis=0))
    zero = jnp.maximum(jnp.mean(fixed), 0.0)

    def loss(score: Array) -> Array:
        good = jnp.broadcast_to(desirable, score.shape)
        gain = jnp.where(good, beta, -beta) * (score - zero)
        return jnp.where(good, *weights) * jax.nn.sigmoid(-gain)

    return estimate(loss, scores)
