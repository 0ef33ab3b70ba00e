"""Objectives with another weighting of their levels, clamped losses, self-conditioning."""

from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Real, as_parameter, checked, log_positive
from mdm_jax.corruption.uniform import token_estimate
from mdm_jax.draws import GRID_BITS, Draw, LossStats
from mdm_jax.models.cross_entropy import as_logits
from mdm_jax.objectives.objective import Objective, flatten_views, rate_importance
from mdm_jax.schedules.laws import Law
from mdm_jax.types import Array, ArrayLike, Batch, ModelFn

LogFactor = Callable[[Array], Array]
"""From the logSNR to the log of a factor on the weight, elementwise."""


def reweighted(objective: Objective, log_factor: LogFactor, name: str) -> Objective:
    """``objective`` with its weight multiplied by ``exp(log_factor(logsnr))``; "biased".

    On masked diffusion ``exp(logsnr)`` is the odds of a token being visible. ``log_factor`` is
    fixed, such as :func:`min_snr_factor` or the ``log_weight`` of a weighting without a law;
    ``variance.uncertainty_weighting`` learns one. ``name`` is appended to the objective's.
    """

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        stats = objective.loss(model_fn, batch, draw)
        factor = jnp.exp(log_factor(objective.law.icdf(draw.u)))
        return stats._replace(weight=stats.weight * factor)

    own = objective.log_level_weight
    return objective._replace(
        name=f"{objective.name}, {name}",
        loss=loss,
        bias="biased",
        log_level_weight=own and (lambda logsnr: own(logsnr) + log_factor(logsnr)),
    )


@checked
def clamped(
    objective: Objective,
    limit: Annotated[
        float, Real("(0, 1e6]", "nats per eligible token", "that the weighted loss of a row counts")
    ] = 10.0,
) -> Objective:
    """``objective`` with the weighted loss of a row and level clamped; "biased".

    A loss above ``limit`` times the level's eligible tokens counts as that, without gradient.
    ``limit`` > 0 (ValueError). Importance weights of the draw are not part of what is clamped.
    Reference: arXiv 2511.18159, its code, with 10 nats per answer token.
    """

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        stats = objective.loss(model_fn, batch, draw)
        most = limit * stats.eligible / jnp.maximum(stats.weight, jnp.finfo(jnp.float32).tiny)
        return stats._replace(raw=jnp.where(stats.raw > most, most, stats.raw))

    return objective._replace(name=f"{objective.name}, clamped", loss=loss, bias="biased")


def law_factor(law: Law) -> LogFactor:
    """log of the law's density of the masking rate: levels count as often as the law draws them.

    Of an objective under the same law, what is left is the integrand without importance weight.
    """
    importance = rate_importance(law)
    return lambda logsnr: -importance(logsnr)


@checked
def min_snr_factor(
    gamma: Annotated[ArrayLike, Real("(0, 1e6]", "SNR", "above which weights fall")] = 5.0,
) -> LogFactor:
    """log of ``min(1, gamma exp(-lambda))``, gamma > 0 (ValueError). Hang et al. 2023."""
    log_gamma = log_positive("min_snr", "gamma", gamma)
    return lambda logsnr: jnp.minimum(0.0, log_gamma - logsnr)


@checked
def p2_factor(
    k: Annotated[ArrayLike, Real("(0, 1e6]", "SNR", "below which weights are flat")] = 1.0,
    gamma: Annotated[ArrayLike, Real("[-100, 100]", "", "exponent of the fall")] = 1.0,
) -> LogFactor:
    """log of ``(k + exp(lambda))^-gamma``, k > 0, finite gamma (ValueError). Choi et al. 2022.

    By default the masking rate: masked tokens count alike, as in simple cross-entropy.
    """
    gamma = as_parameter(gamma, "gamma")
    log_k = log_positive("p2", "k", k)
    return lambda logsnr: -gamma * jnp.logaddexp(log_k, logsnr)


@checked
def entropy_rise_factor(
    bits: Annotated[
        Sequence[float], Real("[0, 1e6]", "bits", "by masking rate, of mdm evaluate", several=True)
    ] = (),
    floor: Annotated[float, Real("(0, 1]", "of the mean", "the least weight")] = 0.1,
) -> LogFactor:
    """log of the rise of the cross-entropy by masking rate: levels count as bits are lost there.

    ``bits`` [K] are those of a masked token, means over K equal ranges of the masking rate, in any
    unit. The factor is linear between the edges of the ranges, constant beyond the inner ones, and
    its mean over rates is 1; rises below ``floor`` times their mean count as that. It is the
    density of CDCD's time warping (Dieleman et al. 2022) for a fixed curve. ValueError for fewer
    than three ranges, or bits that do not rise from the first to the last.
    """
    values = np.asarray(bits, np.float64)
    if values.size < 3 or not values[-1] > values[0]:
        raise ValueError(
            f"entropy_rise needs bits of a masked token in 3 or more ranges of the masking rate, "
            f"rising from the first to the last, got {tuple(bits)}; mdm evaluate prints those of a "
            "masked run"
        )
    rise = np.maximum(np.diff(values), floor * np.mean(np.diff(values)))
    edges = np.arange(1, values.size) / values.size
    mean = np.trapezoid(rise, edges) + (rise[0] + rise[-1]) / values.size
    edges, weight = (np.asarray(each, np.float32) for each in (edges, rise / mean))
    return lambda logsnr: jnp.log(jnp.interp(jax.nn.sigmoid(-logsnr), edges, weight))


def self_conditioned(objective: Objective, num_tokens: int) -> Objective:
    """``objective`` for a network that takes an estimate of the clean tokens as a further input.

    For half of the rows of every view (:func:`estimate_coin`) a first pass without an estimate
    gives probabilities, without gradient, and the loss is that of a second pass with them. The
    expectation is the mean of the losses of one and two passes (:func:`two_pass`); if the objective
    is a bound, both are. Costs a forward pass over all rows. Reference: Chen et al. 2022 (Analog
    Bits), section 3.

    The network is ``model_fn(inputs [N, L], logsnr, documents, estimate=None) -> [N, L, K]``, the
    estimate [N, L, K]; ids from ``num_tokens`` on (special tokens) have probability zero in it.
    """

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        rows = flatten_views(estimate_coin(draw.noise))
        return objective.loss(two_pass(model_fn, num_tokens, rows), batch, draw)

    return objective._replace(name=f"{objective.name}, self-conditioned", loss=loss)


def two_pass(model_fn: ModelFn, num_tokens: int, rows: Array | None = None) -> ModelFn:
    """A network that feeds the probabilities of a first pass to a second one.

    Arguments as for :func:`self_conditioned`; rows [N] bool that are false get a zero estimate.
    """

    def second(inputs: Array, logsnr: Array, documents: Array | None = None) -> Array:
        estimate = token_estimate(as_logits(model_fn(inputs, logsnr, documents)), num_tokens)
        if rows is not None:
            estimate = jnp.where(rows[:, None, None], estimate, 0.0)
        return model_fn(inputs, logsnr, documents, estimate=estimate)

    return second


def estimate_coin(noise: Array) -> Array:
    """A fair coin per view and row, [V, B] bool, from the draw's base noise [V, B, ...].

    The parity of the first view's numbers on their grid (``draws.GRID_BITS``), independent of
    corruptions, which read size and order only; it alternates from view to view.
    """
    index = jnp.floor(noise[0] * 2**GRID_BITS).astype(jnp.int32)
    parity = jnp.sum((index & 1).reshape(index.shape[0], -1), axis=-1)
    view = jnp.arange(noise.shape[0])[:, None]
    return (parity[None] + view) % 2 == 1
