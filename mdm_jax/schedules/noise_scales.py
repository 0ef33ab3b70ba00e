"""The noise coordinates of other code bases, from the logSNR and back.

Four quantities are called lambda or log-SNR in public code; here ``logsnr`` always means
``log(alpha^2 / sigma^2)``, large = clean. All functions are elementwise, logarithms natural.
"""

import jax
import jax.numpy as jnp

from mdm_jax.schedules.coordinates import as_float
from mdm_jax.typing import Array, ArrayLike


def sigma_from_logsnr(logsnr: ArrayLike) -> Array:
    """The sigma of EDM and EDM2: noise over signal amplitude, ``exp(-lambda / 2)``."""
    return jnp.exp(-0.5 * as_float(logsnr))


def logsnr_from_sigma(sigma: ArrayLike) -> Array:
    """``-2 log sigma``; +inf at 0."""
    return -2.0 * jnp.log(as_float(sigma))


def half_logsnr(logsnr: ArrayLike) -> Array:
    """The lambda of DPM-Solver, ``log(alpha / sigma)``; also the ``t`` of k-diffusion's DPM-++."""
    return 0.5 * as_float(logsnr)


def logsnr_from_half(half: ArrayLike) -> Array:
    """Inverse of :func:`half_logsnr`."""
    return 2.0 * as_float(half)


def vdm_gamma(logsnr: ArrayLike) -> Array:
    """The gamma of VDM, ``-lambda``."""
    return -as_float(logsnr)


def logsnr_from_vdm_gamma(gamma: ArrayLike) -> Array:
    """Inverse of :func:`vdm_gamma`."""
    return -as_float(gamma)


def flow_time(logsnr: ArrayLike) -> Array:
    """Noise amplitude of the flow path, the time of rectified flow with 0 = clean."""
    return jax.nn.sigmoid(-0.5 * as_float(logsnr))


def logsnr_from_flow_time(time: ArrayLike, rest: ArrayLike | None = None) -> Array:
    """``2 log((1 - t) / t)``.

    Args:
        time: in [0, 1], 0 is clean.
        rest: 1 - time, where the caller knows it more exactly than the difference.
    """
    time = as_float(time)
    log_rest = jnp.log1p(-time) if rest is None else jnp.log(as_float(rest))
    return 2.0 * (log_rest - jnp.log(time))


def cosine_time(logsnr: ArrayLike) -> Array:
    """Time of the cosine schedule ``alpha = cos(pi t / 2)``, 0 = clean."""
    return (2.0 / jnp.pi) * jnp.arctan(jnp.exp(-0.5 * as_float(logsnr)))


def logsnr_from_cosine_time(time: ArrayLike, rest: ArrayLike | None = None) -> Array:
    """``-2 log tan(pi t / 2)``.

    Args:
        time: in [0, 1], 0 is clean.
        rest: 1 - time, where the caller knows it more exactly than the difference; without it the
            result is as inexact near 1 as the argument.
    """
    time = as_float(time)
    rest = 1.0 - time if rest is None else as_float(rest)
    noisy = 2.0 * jnp.log(jnp.tan(0.5 * jnp.pi * jnp.minimum(rest, 0.5)))
    clean = -2.0 * jnp.log(jnp.tan(0.5 * jnp.pi * jnp.minimum(time, 0.5)))
    return jnp.where(time < 0.5, clean, noisy)
