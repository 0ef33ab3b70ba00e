"""logSNR coordinates of masking.

The survival probability is ``sigmoid(logsnr)`` and the masking rate ``sigmoid(-logsnr)``: large
logSNR is clean. It holds rates near 0 and near 1 equally well, a rate does not: in float32 the
survival probability ``1 - m`` has no correct digit left once m is within 6e-8 of 1. So levels
travel as logSNR, and the rate and its complement are each computed from it directly.

All functions work elementwise on arrays of any shape. Rates are probabilities, logarithms natural.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.types import Array, ArrayLike


class MaskingLevel(NamedTuple):
    """One noise level in every coordinate, none obtained by subtracting from 1.

    Attributes:
        logsnr: lambda, ``log_survival - log_rate``.
        rate: masking rate m.
        survival: survival probability 1 - m.
        log_rate: log m.
        log_survival: log(1 - m).
    """

    logsnr: Array
    rate: Array
    survival: Array
    log_rate: Array
    log_survival: Array


def level_from_logsnr(logsnr: ArrayLike) -> MaskingLevel:
    """Every coordinate of the level, each exact to rounding."""
    logsnr = as_float(logsnr)
    return MaskingLevel(
        logsnr=logsnr,
        rate=masking_rate(logsnr),
        survival=survival_probability(logsnr),
        log_rate=log_masking_rate(logsnr),
        log_survival=log_survival_probability(logsnr),
    )


def level_from_masking_rate(rate: ArrayLike) -> MaskingLevel:
    """Every coordinate of the level; near rate 1 only as exact as ``1 - rate`` is."""
    rate = as_float(rate)
    log_rate, log_survival = jnp.log(rate), jnp.log1p(-rate)
    return MaskingLevel(log_survival - log_rate, rate, 1 - rate, log_rate, log_survival)


def masking_rate(logsnr: ArrayLike) -> Array:
    """Probability that a token is masked, ``sigmoid(-logsnr)``."""
    return jax.nn.sigmoid(-as_float(logsnr))


def survival_probability(logsnr: ArrayLike) -> Array:
    """Probability that a token is kept, ``sigmoid(logsnr)``."""
    return jax.nn.sigmoid(as_float(logsnr))


def log_masking_rate(logsnr: ArrayLike) -> Array:
    """log of :func:`masking_rate`; finite, as is its gradient, where the rate itself underflows."""
    return jax.nn.log_sigmoid(-as_float(logsnr))


def log_survival_probability(logsnr: ArrayLike) -> Array:
    """log of :func:`survival_probability`; finite, as is its gradient, where that underflows."""
    return jax.nn.log_sigmoid(as_float(logsnr))


def logsnr_from_masking_rate(rate: ArrayLike) -> Array:
    """``log((1 - m) / m)``; +inf at 0, -inf at 1.

    Near 1 the result is as inexact as the argument: use :func:`logsnr_from_survival_probability`.
    """
    rate = as_float(rate)
    return jnp.log1p(-rate) - jnp.log(rate)


def logsnr_from_survival_probability(survival: ArrayLike) -> Array:
    """``log(a / (1 - a))``; -inf at 0, +inf at 1."""
    return -logsnr_from_masking_rate(survival)


def logsnr_from_log_masking_rate(log_rate: ArrayLike) -> Array:
    """``log(1 - m) - log m`` for log m <= 0."""
    log_rate = as_float(log_rate)
    return jax.nn.log1mexp(-log_rate) - log_rate


def logsnr_from_log_survival_probability(log_survival: ArrayLike) -> Array:
    """``log a - log(1 - a)`` for log a <= 0."""
    return -logsnr_from_log_masking_rate(log_survival)


def as_float(x: ArrayLike) -> Array:
    """``x`` as an array of a float dtype; integers become the default float."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)
