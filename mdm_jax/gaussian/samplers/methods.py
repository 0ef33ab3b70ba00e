"""DDPM's ancestral sampler and DDIM, one family: exact steps of a frozen denoiser.

With the step ``h = lambda_s - lambda_t > 0`` from level t to the cleaner level s, and the estimate
of the data held at ``x0_t``, the process between them has a closed form,

    x_s = (sigma_s / sigma_t) k x_t - alpha_s expm1(-h / 2 + log k) x0_t + eta sigma_s g z ,
    g^2 = 1 - exp(-h) ,   k^2 = 1 - eta^2 g^2 ,

with z standard normal. It never forms an estimate of the noise, which loses digits at clean levels.

EDM's stochastic sampler: Heun's method in sigma, with noise added back before each step.

Euler's and Heun's methods along the straight path of flow matching.

On the flow path ``x = (1 - tau) x0 + tau eps`` with tau = sigmoid(-lambda / 2) the probability flow
is ``dx / dtau = (x - x0) / tau``. A network trained on another path serves as well: the state is
rescaled to the flow path and back.

DPM-Solver++, second order, multistep.
"""

import math

import jax
import jax.numpy as jnp

from mdm_jax.checks import is_concrete
from mdm_jax.gaussian import paths
from mdm_jax.gaussian.paths import Path
from mdm_jax.gaussian.samplers.sampler import (
    Denoise,
    GaussianContext,
    GaussianSampler,
    GaussianState,
    step_noise,
)
from mdm_jax.types import Array, ArrayLike


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


_FLOW = paths.flow()


def euler_flow() -> GaussianSampler:
    """Euler's method in flow time; the same steps as DDIM on the same grid, and InDI's update.

    Liu et al. 2023 (rectified flow); Delbracio and Milanfar 2023 (InDI).
    """

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        start = _to_flow(context.path, context.logsnr, state.x)
        x0 = denoise(state.x, context.logsnr)
        end = start + _time_step(context) * _slope(start, x0, context.logsnr)
        return GaussianState(_from_flow(context.path, context.next_logsnr, end), x0, state.memory)

    return GaussianSampler("euler_flow", step)


def heun_flow() -> GaussianSampler:
    """Heun's method in flow time, order 2: two calls of the denoiser per step, one towards +inf."""

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        path, target = context.path, context.next_logsnr
        start = _to_flow(path, context.logsnr, state.x)
        x0 = denoise(state.x, context.logsnr)
        slope = _slope(start, x0, context.logsnr)
        ahead = start + _time_step(context) * slope

        def corrected():
            ahead_x0 = denoise(_from_flow(path, target, ahead), target)
            return start + _time_step(context) * 0.5 * (slope + _slope(ahead, ahead_x0, target))

        end = jax.lax.cond(jnp.isposinf(target), lambda: ahead, corrected)
        return GaussianState(_from_flow(path, target, end), x0, state.memory)

    return GaussianSampler("heun_flow", step)


def _time(logsnr: Array) -> Array:
    return jax.nn.sigmoid(-0.5 * logsnr)


def _time_step(context: GaussianContext) -> Array:
    return _time(context.next_logsnr) - _time(context.logsnr)


def _slope(x: Array, x0: Array, logsnr: Array) -> Array:
    return (x - x0) / _time(logsnr)


def _to_flow(path: Path, logsnr: Array, x: Array) -> Array:
    return x * jnp.exp(_log_ratio(path, logsnr))


def _from_flow(path: Path, logsnr: Array, x: Array) -> Array:
    return x * jnp.exp(-_log_ratio(path, logsnr))


def _log_ratio(path: Path, logsnr: Array) -> Array:
    """log of the flow path's amplitudes over this path's; signal's and noise's ratio are equal."""
    by_noise = _FLOW.log_sigma(logsnr) - path.log_sigma(logsnr)
    by_signal = _FLOW.log_alpha(logsnr) - path.log_alpha(logsnr)
    return jnp.where(logsnr < 0, by_noise, by_signal)


def dpm_solver_pp_2m(lower_order_final: bool = True) -> GaussianSampler:
    """DPM-Solver++(2M): DDIM with the estimate of the data extrapolated to the middle of the step.

    One call of the denoiser per step, order 2. With h the step in logSNR and r = h_previous / h the
    estimate used is ``(1 + 1 / 2r) x0 - x0_previous / 2r``; the first step is DDIM's.
    Lu et al. 2022 (arXiv 2211.01095), algorithm 2.

    Args:
        lower_order_final: make the last step DDIM's too, which is safer with few steps. A step to
            +inf is one in any case.
    """

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        x0 = denoise(state.x, context.logsnr)
        size = context.next_logsnr - context.logsnr
        previous_size = context.logsnr - context.previous_logsnr
        first_order = (context.index == 0) | jnp.isposinf(context.next_logsnr)
        if lower_order_final:
            first_order |= context.index == context.num_steps - 1
        reach = jnp.where(first_order, 1.0, size) / jnp.where(first_order, 1.0, 2 * previous_size)
        reach = jnp.where(first_order, 0.0, reach)
        middle = x0 + reach * (x0 - state.x0)
        x = transition_mean(context.path, context.logsnr, context.next_logsnr, state.x, middle)
        return GaussianState(x, x0, state.memory)

    return GaussianSampler("dpm_solver_pp_2m", step)
