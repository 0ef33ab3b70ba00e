"""EDM's stochastic sampler: Heun's method in sigma, with noise added back before each step."""

import math

import jax
import jax.numpy as jnp

from mdm_jax.samplers.denoiser import Denoise
from mdm_jax.samplers.gaussian import (
    GaussianContext,
    GaussianSampler,
    GaussianState,
    step_noise,
)

_MAX_CHURN = math.sqrt(2.0) - 1.0


def edm_heun(
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = math.inf,
    churn_noise: float = 1.0,
    second_order: bool = True,
) -> GaussianSampler:
    """Karras et al. 2022, algorithm 2; without churn algorithm 1.

    Works in ``x / alpha``, so on a network of any path. Two calls of the denoiser per step, one in
    a step to +inf. Goes with ``schedules.spacings.edm``.

    Args:
        churn: S_churn; noise is added back until sigma has grown by the factor
            ``1 + min(S_churn / N, sqrt(2) - 1)``, so values above 0.414 N change nothing.
        churn_min: S_tmin, smallest sigma / alpha at which noise is added back.
        churn_max: S_tmax, largest.
        churn_noise: S_noise, standard deviation of the added noise.
        second_order: False for Euler's method, with one call of the denoiser per step.

    Raises:
        ValueError: for negative settings or churn_min > churn_max.
    """
    if not (churn >= 0 and churn_noise >= 0 and 0 <= churn_min <= churn_max):
        raise ValueError(
            "edm_heun needs churn >= 0, churn_noise >= 0 and 0 <= churn_min <= churn_max, got "
            f"{churn}, {churn_noise}, {churn_min}, {churn_max}"
        )

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        path, clean = context.path, jnp.isposinf(context.next_logsnr)

        def estimate(z, logsnr):
            return denoise(path.alpha(logsnr) * z, logsnr)

        sigma, next_sigma = jnp.exp(-0.5 * context.logsnr), jnp.exp(-0.5 * context.next_logsnr)
        z, logsnr = state.x * jnp.exp(-path.log_alpha(context.logsnr)), context.logsnr
        if churn > 0:
            inside = (churn_min <= sigma) & (sigma <= churn_max)
            growth = jnp.where(inside, min(churn / context.num_steps, _MAX_CHURN), 0.0)
            added = sigma * jnp.sqrt(growth * (2 + growth))
            z = z + churn_noise * added * step_noise(context, z)
            sigma, logsnr = sigma * (1 + growth), logsnr - 2 * jnp.log1p(growth)
        x0 = estimate(z, logsnr)
        slope = (z - x0) / sigma
        ahead = z + (next_sigma - sigma) * slope

        def corrected():
            next_slope = (ahead - estimate(ahead, context.next_logsnr)) / next_sigma
            return z + (next_sigma - sigma) * 0.5 * (slope + next_slope)

        # From here the Euler step to sigma = 0 is exactly x0.
        z = jax.lax.cond(clean, lambda: x0, corrected if second_order else lambda: ahead)
        return GaussianState(path.alpha(context.next_logsnr) * z, x0, state.memory)

    return GaussianSampler("edm_heun", step, finite_start=True)
