"""Euler's and Heun's methods along the straight path of flow matching.

On the flow path ``x = (1 - tau) x0 + tau eps`` with tau = sigmoid(-lambda / 2) the probability flow
is ``dx / dtau = (x - x0) / tau``. A network trained on another path serves as well: the state is
rescaled to the flow path and back.
"""

import jax
import jax.numpy as jnp

from mdm_jax.samplers.denoiser import Denoise
from mdm_jax.samplers.gaussian import GaussianContext, GaussianSampler, GaussianState
from mdm_jax.schedules import Path, paths
from mdm_jax.typing import Array

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
