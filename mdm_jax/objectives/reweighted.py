"""An objective with another weighting of its levels."""

from collections.abc import Callable

import jax.numpy as jnp

from mdm_jax.batches import Batch
from mdm_jax.draws import Draw, LossStats
from mdm_jax.objectives.objective import Objective
from mdm_jax.schedules import weightings
from mdm_jax.schedules.laws import logistic
from mdm_jax.typing import Array, ArrayLike, ModelFn

LogFactor = Callable[[Array], Array]
"""From the logSNR to the log of a factor on the weight, elementwise."""


def reweighted(objective: Objective, log_factor: LogFactor, name: str) -> Objective:
    """``objective`` with its weight multiplied by ``exp(log_factor(logsnr))``.

    With W the effective weight of the objective over the logSNR, the new one is W times the factor.
    The raw loss, the law and the noise stay as they were, so weightings of Gaussian diffusion can
    be put on masked diffusion: there ``exp(logsnr)`` is the odds of a token being visible, and the
    factor falls on the bound's integrand. The expectation is no bound any more: "biased".

    The factor of any weighting of :mod:`~mdm_jax.schedules.weightings` that holds no law will do,
    such as ``weightings.sigmoid(2.0).log_weight``.

    Args:
        objective: any.
        log_factor: a fixed function; :func:`~mdm_jax.variance.uncertainty_weighting` learns one.
        name: what the factor is called; it is appended to the objective's name.
    """

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        stats = objective.loss(model_fn, batch, draw)
        factor = jnp.exp(log_factor(objective.law.icdf(draw.u)))
        return stats._replace(weight=stats.weight * factor)

    return objective._replace(name=f"{objective.name}, {name}", loss=loss, bias="biased")


def min_snr_factor(gamma: ArrayLike = 5.0) -> LogFactor:
    """log of ``min(1, gamma exp(-lambda))`` (Hang et al. 2023): no more weight on clean levels.

    Raises:
        ValueError: unless gamma > 0.
    """
    return weightings.min_snr(logistic(), gamma).factors[0].log_weight


def p2_factor(k: ArrayLike = 1.0, gamma: ArrayLike = 1.0) -> LogFactor:
    """log of ``(k + exp(lambda))^-gamma`` (Choi et al. 2022).

    Raises:
        ValueError: unless k > 0 and gamma is finite.
    """
    return weightings.p2(logistic(), k, gamma).factors[0].log_weight
