"""Gaussian samplers: DDIM, DDPM ancestral, DPM-Solver++, Euler's and Heun's methods.

The first two take exact steps of a frozen denoiser. With ``h = lambda_s - lambda_t`` from level t
to the cleaner level s, the estimate held at ``x0_t`` and z standard normal,

    x_s = (sigma_s / sigma_t) k x_t - alpha_s expm1(-h / 2 + log k) x0_t + eta sigma_s g z ,
    g^2 = 1 - exp(-h) ,   k^2 = 1 - eta^2 g^2 .
"""

import math
from typing import Annotated

import jax
import jax.numpy as jnp

from mdm_jax.checks import Real, checked, is_concrete
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

_FLOW, _VE = paths.flow(), paths.ve()
_MAX_CHURN = math.sqrt(2.0) - 1.0


@checked
def ddim(
    eta: Annotated[ArrayLike, Real("[0, 1]", "", "0: probability flow; 1: ancestral")] = 0.0,
) -> GaussianSampler:
    """DDIM: the probability flow at eta = 0, the ancestral sampler at eta = 1; else in between.

    At eta = 0 it is also DPM-Solver++ of order 1 and, on the same grid, Euler's method for the flow
    path and for EDM's sigma. ValueError for eta outside [0, 1]. Song et al. 2021 (arXiv
    2010.02502), equations 12 and 16.
    """
    deterministic = is_concrete(eta) and float(eta) == 0.0

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        x0 = denoise(state.x, context.logsnr)
        levels = (context.path, context.logsnr, context.next_logsnr)
        x = transition_mean(*levels, state.x, x0, eta)
        if not deterministic:
            x = x + eta * jnp.exp(log_posterior_std(*levels)) * step_noise(context, x)
        return GaussianState(x, x0, state.memory)

    return GaussianSampler("ddim", step)


@checked
def ddpm_ancestral(
    large_fraction: Annotated[
        ArrayLike, Real("[0, 1]", "of log variance", "0: the posterior's; 1: DDPM's beta")
    ] = 0.0,
) -> GaussianSampler:
    """DDPM's ancestral sampler, with a variance between its two bounds.

    The log variance is ``v log(large) + (1 - v) log(small)`` with v = large_fraction (ValueError
    outside [0, 1]): "small", the posterior ``sigma_s^2 (1 - exp(-h))``, is right for data without
    spread; "large", ``sigma_t^2 (1 - exp(-h))``, DDPM's beta_t, for N(0, 1) data on path ``vp``.
    Only "small" gives the same samples on every path. A step to +inf adds no noise. Ho et al. 2020,
    section 3.2; Nichol and Dhariwal 2021, equation 15.
    """

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        x0 = denoise(state.x, context.logsnr)
        levels = (context.path, context.logsnr, context.next_logsnr)
        x = transition_mean(*levels, state.x, x0, 1.0)
        std = ancestral_std(*levels, large_fraction)
        return GaussianState(x + std * step_noise(context, x), x0, state.memory)

    return GaussianSampler("ddpm_ancestral", step)


def dpm_solver_pp_2m(
    lower_order_final: Annotated[bool, "last step of first order"] = True,
) -> GaussianSampler:
    """DPM-Solver++(2M): DDIM with the estimate of the data extrapolated to the middle of the step.

    One denoiser call per step, order 2. With h the step in logSNR and r = h_previous / h it uses
    ``(1 + 1 / 2r) x0 - x0_previous / 2r``, but takes a DDIM step first, to +inf, and with
    ``lower_order_final`` (safer with few steps) last.
    Lu et al. 2022 (arXiv 2211.01095), algorithm 2.
    """

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        x0 = denoise(state.x, context.logsnr)
        size = context.next_logsnr - context.logsnr
        previous_size = context.logsnr - context.previous_logsnr
        first_order = (context.index == 0) | jnp.isposinf(context.next_logsnr)
        if lower_order_final:
            first_order |= context.index == context.num_steps - 1
        reach = jnp.where(first_order, 1.0, size) / jnp.where(first_order, 1.0, 2 * previous_size)
        middle = x0 + jnp.where(first_order, 0.0, reach) * (x0 - state.x0)
        x = transition_mean(context.path, context.logsnr, context.next_logsnr, state.x, middle)
        return GaussianState(x, x0, state.memory)

    return GaussianSampler("dpm_solver_pp_2m", step)


def dpm_solver_pp_3m(
    lower_order_final: Annotated[bool, "last two steps of orders two and one"] = True,
) -> GaussianSampler:
    """DPM-Solver++(3M): the estimate of the data as a parabola in logSNR, through the last three.

    One denoiser call per step, order 3. The first step and one to +inf are DDIM's, the second one
    is :func:`dpm_solver_pp_2m`'s, and so, with ``lower_order_final``, are the last two. The second
    derivative counts in full: with half of it, as in widespread code, the order is 2.
    Lu et al. 2022 (arXiv 2211.01095), appendix B.
    """

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        x0 = denoise(state.x, context.logsnr)
        older_x0, older_size = state.memory
        # In half the logSNR, as in the paper.
        size = 0.5 * (context.next_logsnr - context.logsnr)
        previous_size = 0.5 * (context.logsnr - context.previous_logsnr)
        before = older_size.reshape(-1, *(1,) * (x0.ndim - 1))
        last = context.num_steps - context.index if lower_order_final else jnp.inf
        first_order = (context.index == 0) | (last == 1) | jnp.isinf(size + previous_size)
        not_third = first_order | (context.index == 1) | (last == 2) | jnp.isinf(before)
        h, h0 = (jnp.where(first_order, 1.0, each) for each in (size, previous_size))
        h1 = jnp.where(not_third, 1.0, before)
        slope, older_slope = (x0 - state.x0) / h0, (state.x0 - older_x0) / h1
        bend = (slope - older_slope) / (h0 + h1)
        middle = x0 + jnp.where(not_third & ~first_order, 0.5 * h * slope, 0.0)
        x = transition_mean(context.path, context.logsnr, context.next_logsnr, state.x, middle)
        gone = jnp.expm1(-h)
        parabola = (h + gone) * (slope + h0 * bend) + (h * h - 2 * (h + gone)) * bend
        x = x + jnp.where(not_third, 0.0, context.path.alpha(context.next_logsnr) * parabola)
        return GaussianState(x, x0, (state.x0, jnp.full_like(older_size, previous_size)))

    def init(x: Array) -> tuple[Array, Array]:
        """The estimate before the last one, and the size of the step between the two."""
        return jnp.zeros_like(x), jnp.zeros(x.shape[:1], x.dtype)

    return GaussianSampler("dpm_solver_pp_3m", step, init)


def dpm_solver_pp_2s() -> GaussianSampler:
    """DPM-Solver++(2S): the whole step with the estimate of the data in its middle.

    Two denoiser calls per step, order 2; one, DDIM's, in steps from -inf or to +inf.
    Lu et al. 2022 (arXiv 2211.01095), algorithm 1 with r = 1/2.
    """

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        start, end = context.logsnr, context.next_logsnr
        x0, halfway = denoise(state.x, start), 0.5 * (start + end)
        whole = jnp.isinf(halfway)

        def middle() -> Array:
            x = transition_mean(context.path, start, halfway, state.x, x0)
            return denoise(x, halfway)

        estimate = jax.lax.cond(whole, lambda: x0, middle)
        x = transition_mean(context.path, start, end, state.x, estimate)
        return GaussianState(x, x0, state.memory)

    return GaussianSampler("dpm_solver_pp_2s", step)


def transition_mean(
    path: Path, logsnr: Array, next_logsnr: Array, x: Array, x0: Array, eta: ArrayLike = 0.0
) -> Array:
    """Mean of x at the next level (x0 at +inf), given x at this one (-inf allowed) and x0."""
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
    return jnp.log(-jnp.expm1(-step))


@checked
def edm_heun(
    churn: Annotated[float, Real("[0, 1e6]", "", "noise added back, over all steps")] = 0.0,
    churn_min: Annotated[float, Real("[0, 1e6]", "sigma", "smallest at which it is added")] = 0.0,
    churn_max: Annotated[float, Real("[0, 1e6]", "sigma", "largest at which it is added")] = 1e6,
    churn_noise: Annotated[float, Real("[0, 1e3]", "", "factor on that noise's scale")] = 1.0,
    second_order: Annotated[bool, "two denoiser calls a step; False: Euler's method"] = True,
) -> GaussianSampler:
    """EDM's sampler: Heun's method in sigma, with noise added back before each step.

    Karras et al. 2022, algorithm 2; without churn algorithm 1. For networks of any path. Two
    denoiser calls per step, one in a step to +inf. Pair with ``spacings.edm``. ValueError for
    negative settings or churn_min > churn_max.

    Args:
        churn: S_churn; noise is added back until sigma has grown by the factor
            ``1 + min(S_churn / N, sqrt(2) - 1)``, so values above 0.414 N change nothing.
        churn_min, churn_max: S_tmin and S_tmax, sigma / alpha between which noise is added back.
        churn_noise: S_noise, standard deviation of the added noise.
        second_order: False for Euler's method, with one denoiser call per step.
    """
    if not (churn >= 0 and churn_noise >= 0 and 0 <= churn_min <= churn_max):
        raise ValueError(
            "edm_heun needs churn >= 0, churn_noise >= 0 and 0 <= churn_min <= churn_max, got "
            f"{churn}, {churn_noise}, {churn_min}, {churn_max}"
        )

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        z, logsnr = _change_path(state.x, context.path, _VE, context.logsnr), context.logsnr
        if churn > 0:
            sigma = _VE.sigma(logsnr)
            inside = (churn_min <= sigma) & (sigma <= churn_max)
            growth = jnp.where(inside, min(churn / context.num_steps, _MAX_CHURN), 0.0)
            added = sigma * jnp.sqrt(growth * (2 + growth))
            z = z + churn_noise * added * step_noise(context, z)
            logsnr = logsnr - 2 * jnp.log1p(growth)
        x, x0 = _ode_step(context, denoise, z, _VE, logsnr, second_order)
        return GaussianState(x, x0, state.memory)

    return GaussianSampler("edm_heun", step, finite_start=True)


def euler_flow() -> GaussianSampler:
    """Euler's method in flow time (Liu et al. 2023): steps as in DDIM on the same grid."""
    return GaussianSampler("euler_flow", _flow_step(second_order=False))


def indi() -> GaussianSampler:
    """Inversion by direct iteration: ``x <- (d / t) x0 + (1 - d / t) x``, t the share of the noise.

    :func:`euler_flow` by its authors' name. They step in equal parts of t, from a degraded picture:
    grid "flow" for ``x = (1 - t) x0 + t eps``, "uniform_sigma" for ``x0 + t eps``. Delbracio and
    Milanfar 2023 (arXiv 2303.11435), equation 8, without their additional noise.
    """
    return euler_flow()._replace(name="indi")


def heun_flow() -> GaussianSampler:
    """Heun's method in flow time, order 2: two denoiser calls per step, one in a step to +inf."""
    return GaussianSampler("heun_flow", _flow_step(second_order=True))


def _flow_step(second_order: bool):
    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        x = _change_path(state.x, context.path, _FLOW, context.logsnr)
        x, x0 = _ode_step(context, denoise, x, _FLOW, context.logsnr, second_order)
        return GaussianState(x, x0, state.memory)

    return step


def _ode_step(
    context: GaussianContext,
    denoise: Denoise,
    x: Array,
    path: Path,
    logsnr: Array,
    second_order: bool,
) -> tuple[Array, Array]:
    """Step of the flow ``dx / dt = (x - x0) / t``, x on path flow or ve; the new state and x0."""
    target, clean = context.next_logsnr, jnp.isposinf(context.next_logsnr)
    time, next_time = path.sigma(logsnr), path.sigma(target)

    def estimate(x: Array, level: Array) -> Array:
        return denoise(_change_path(x, path, context.path, level), level)

    x0 = estimate(x, logsnr)
    velocity = (x - x0) / time
    # Euler's step to t = 0 is exactly x0.
    ahead = jnp.where(clean, x0, x + (next_time - time) * velocity)

    def heun() -> Array:
        next_velocity = (ahead - estimate(ahead, target)) / next_time
        return x + (next_time - time) * 0.5 * (velocity + next_velocity)

    end = jax.lax.cond(clean, lambda: ahead, heun) if second_order else ahead
    return _change_path(end, path, context.path, target), x0


def _change_path(x: Array, source: Path, target: Path, logsnr: Array) -> Array:
    by_noise = target.log_sigma(logsnr) - source.log_sigma(logsnr)
    by_signal = target.log_alpha(logsnr) - source.log_alpha(logsnr)
    return x * jnp.exp(jnp.where(logsnr < 0, by_noise, by_signal))
