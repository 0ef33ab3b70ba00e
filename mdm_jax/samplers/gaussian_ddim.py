"""DDPM's ancestral sampler and DDIM, one family: exact steps of a frozen denoiser.

With the step ``h = lambda_s - lambda_t > 0`` from level t to the cleaner level s, and the estimate
of the data held at ``x0_t``, the process between them has a closed form,

    x_s = (sigma_s / sigma_t) k x_t - alpha_s expm1(-h / 2 + log k) x0_t + eta sigma_s g z ,
    g^2 = 1 - exp(-h) ,   k^2 = 1 - eta^2 g^2 ,

with z standard normal. It never forms an estimate of the noise, which loses digits at clean levels.
"""

import jax.numpy as jnp

from mdm_jax.samplers.denoiser import Denoise
from mdm_jax.samplers.gaussian import (
    GaussianContext,
    GaussianSampler,
    GaussianState,
    step_noise,
)
from mdm_jax.schedules import Path
from mdm_jax.schedules.parameters import is_concrete
from mdm_jax.typing import Array, ArrayLike


def ddim(eta: ArrayLike = 0.0) -> GaussianSampler:
    """DDIM: the probability flow at eta = 0, the ancestral sampler at eta = 1.

    At eta = 0 it is also DPM-Solver++ of order 1 and, on the same grid, Euler's method for the flow
    path and for EDM's sigma. Song et al. 2021 (arXiv 2010.02502), equations 12 and 16.

    Args:
        eta: share of the fresh noise, in [0, 1].

    Raises:
        ValueError: for eta outside [0, 1].
    """
    if is_concrete(eta) and not 0 <= eta <= 1:
        raise ValueError(f"ddim needs 0 <= eta <= 1, got {eta}")
    deterministic = is_concrete(eta) and float(eta) == 0.0

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        x0 = denoise(state.x, context.logsnr)
        levels = (context.path, context.logsnr, context.next_logsnr)
        x = transition_mean(*levels, state.x, x0, eta)
        if not deterministic:
            std = eta * jnp.exp(log_posterior_std(*levels))
            x = x + std * step_noise(context, x)
        return GaussianState(x, x0, state.memory)

    return GaussianSampler("ddim", step)


def ddpm_ancestral(large_fraction: ArrayLike = 0.0) -> GaussianSampler:
    """DDPM's ancestral sampler, with a variance between its two bounds.

    The log variance is ``v log(large) + (1 - v) log(small)``: "small", the posterior variance
    ``sigma_s^2 (1 - exp(-h))``, is right for data without spread; "large",
    ``sigma_t^2 (1 - exp(-h))``, for normal data of unit variance on the variance-preserving path,
    where it is DDPM's beta_t. Only "small" gives the same samples on every path. A step to +inf
    adds no noise. Ho et al. 2020, section 3.2; Nichol and Dhariwal 2021, equation 15.

    Args:
        large_fraction: v in [0, 1]; 0 is "small", 1 is "large".

    Raises:
        ValueError: for a fraction outside [0, 1].
    """
    if is_concrete(large_fraction) and not 0 <= large_fraction <= 1:
        raise ValueError(f"ddpm_ancestral needs 0 <= large_fraction <= 1, got {large_fraction}")

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        x0 = denoise(state.x, context.logsnr)
        levels = (context.path, context.logsnr, context.next_logsnr)
        x = transition_mean(*levels, state.x, x0, 1.0)
        std = ancestral_std(*levels, large_fraction)
        return GaussianState(x + std * step_noise(context, x), x0, state.memory)

    return GaussianSampler("ddpm_ancestral", step)


def transition_mean(
    path: Path, logsnr: Array, next_logsnr: Array, x: Array, x0: Array, eta: ArrayLike = 0.0
) -> Array:
    """Mean of x at the next level given x at this one and the estimate x0 of the data.

    Args:
        path: of x and of the result.
        logsnr: [] level of x; may be -inf.
        next_logsnr: [] cleaner level; may be +inf, where the mean is x0.
        x: the noisy data.
        x0: estimate of the clean data.
        eta: share of the fresh noise, as in :func:`ddim`.
    """
    half_step = 0.5 * (next_logsnr - logsnr)
    log_keep = 0.5 * jnp.log1p(jnp.square(eta) * jnp.expm1(-2 * half_step))
    from_x = jnp.exp(path.log_sigma(next_logsnr) - path.log_sigma(logsnr) + log_keep)
    return from_x * x - path.alpha(next_logsnr) * jnp.expm1(log_keep - half_step) * x0


def log_posterior_std(path: Path, logsnr: Array, next_logsnr: Array) -> Array:
    """log standard deviation of x at the next level given x at this one and the clean data."""
    return path.log_sigma(next_logsnr) + 0.5 * _log_share(next_logsnr - logsnr)


def ancestral_std(
    path: Path, logsnr: Array, next_logsnr: Array, large_fraction: ArrayLike = 0.0
) -> Array:
    """Standard deviation of the noise of :func:`ddpm_ancestral`'s step; 0 towards +inf."""
    clean = jnp.isposinf(next_logsnr)
    log_small = jnp.where(clean, 0.0, path.log_sigma(next_logsnr))
    log_sigma = large_fraction * path.log_sigma(logsnr) + (1 - large_fraction) * log_small
    std = jnp.exp(log_sigma + 0.5 * _log_share(next_logsnr - logsnr))
    return jnp.where(clean, 0.0, std)


def _log_share(step: Array) -> Array:
    """``log(1 - exp(-h))``."""
    return jnp.log(-jnp.expm1(-step))
