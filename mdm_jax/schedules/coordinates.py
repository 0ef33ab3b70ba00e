"""Coordinates of a noise level: logSNR, masking rate, survival probability.

Survival probability ``sigmoid(logsnr)``, masking rate m ``sigmoid(-logsnr)``; large logSNR is
clean. Levels are passed as logSNR because float32 rates lose all digits of 1 - m once m is within
6e-8 of 1. Functions are elementwise, logarithms natural.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.types import Array, ArrayLike


class MaskingLevel(NamedTuple):
    """A noise level in every coordinate. On the path ``vp`` rate is sigma^2, survival alpha^2."""

    logsnr: Array  # log_survival - log_rate
    rate: Array
    survival: Array
    log_rate: Array
    log_survival: Array


def level_from_logsnr(logsnr: ArrayLike) -> MaskingLevel:
    """All coordinates of a logSNR, each exact to rounding."""
    x = as_float(logsnr)
    log_rate, log_survival = log_masking_rate(x), log_survival_probability(x)
    return MaskingLevel(x, masking_rate(x), survival_probability(x), log_rate, log_survival)


def level_from_masking_rate(rate: ArrayLike) -> MaskingLevel:
    """All coordinates of a masking rate; near rate 1 only as exact as ``1 - rate``."""
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
    """log of :func:`masking_rate`, finite with its gradient where the rate underflows."""
    return jax.nn.log_sigmoid(-as_float(logsnr))


def log_survival_probability(logsnr: ArrayLike) -> Array:
    """log of :func:`survival_probability`, finite with its gradient where that underflows."""
    return jax.nn.log_sigmoid(as_float(logsnr))


def logsnr_from_masking_rate(rate: ArrayLike) -> Array:
    """``log((1 - m) / m)``; +inf at 0, -inf at 1. Near 1 use the survival probability instead."""
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
