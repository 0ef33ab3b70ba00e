"""Gaussian schedules written for the straight path x = (1 - t) data + t noise (rectified flow).

On that path sigma / alpha = t / (1 - t), hence logsnr = 2 log((1 - t) / t). The densities of t
used by Stable Diffusion 3 (Esser et al. 2024) become laws of the logSNR.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.curve_law import CurveLaw, solve_time
from mdm_jax.schedules.gaussian_cosine import Cosine
from mdm_jax.schedules.gaussian_sigma import Normal, lognormal
from mdm_jax.schedules.laws import Logistic
from mdm_jax.schedules.masked_schedule import Instant
from mdm_jax.schedules.parameters import as_parameter, check_finite, is_concrete
from mdm_jax.typing import Array, ArrayLike

_HALF_PI = jnp.pi / 2
_LARGEST_MODE_SCALE = 2 / (np.pi - 2)


@pytree_dataclass
class FlowMode(CurveLaw):
    """Flow time q + scale (q - sin^2(pi q / 2)) for a uniform q."""

    scale: ArrayLike

    def logsnr_formula(self, at: Instant) -> Array:
        flow = self._flow_time(at)
        return 2 * (jnp.log(flow.rest) - jnp.log(flow.t))

    def time_formula(self, logsnr: Array) -> Instant:
        return solve_time(self.logsnr_formula, logsnr)

    def log_pdf_formula(self, logsnr: Array) -> Array:
        at = self.time_formula(logsnr)
        # sin(pi q) from the nearer end
        swing = self.scale * _HALF_PI * jnp.sin(jnp.pi * jnp.minimum(at.t, at.rest))
        log_flow = jax.nn.log_sigmoid(0.5 * logsnr) + jax.nn.log_sigmoid(-0.5 * logsnr)
        return log_flow - jnp.log(2 * (1 + self.scale - swing))

    def _flow_time(self, at: Instant) -> Instant:
        def move(part: Array) -> Array:
            return (1 + self.scale) * part - self.scale * jnp.square(jnp.sin(_HALF_PI * part))

        return Instant(move(at.t), move(at.rest))


def flow() -> Logistic:
    """logsnr = 2 log((1 - t) / t), Logistic(0, 2): rectified flow, flow matching.

    What some call "sub-VP"; the sub-VP of Song et al. (2021), sigma = 1 - alpha^2, is a path and
    not this curve.
    """
    return Logistic(0.0, 2.0)


def indi() -> Logistic:
    """InDI (Delbracio & Milanfar 2023), x_t = (1 - t) x + t y with noise for y: as :func:`flow`."""
    return flow()


def flow_shifted(ratio: ArrayLike) -> Logistic:
    """:func:`flow` at the time ratio t / (1 + (ratio - 1) t). SD3's timestep shift.

    ``ratio`` is the square root of the ratio of pixel counts; above 1 the law moves to more noise,
    by -2 log ratio.

    Raises:
        ValueError: unless ratio is positive and finite.
    """
    ratio = as_parameter(ratio, "ratio")
    check_finite("flow_shifted", ratio=ratio)
    if is_concrete(ratio) and not ratio > 0:
        raise ValueError(f"flow_shifted needs ratio > 0, got {ratio}")
    return Logistic(-2 * jnp.log(ratio), 2.0)


def sd3_logit_normal(mean: ArrayLike = 0.0, std: ArrayLike = 1.0) -> Normal:
    """logit of the flow time ~ N(mean, std^2); the same law as ``lognormal(mean, std)``.

    A positive mean favours noise, because t = 1 is noise. Code that indexes a descending table of
    timesteps with the drawn number has the sign of the mean flipped.

    Raises:
        ValueError: unless std > 0, both finite.
    """
    return lognormal(mean, std)


def sd3_mode(scale: ArrayLike = 1.29) -> FlowMode:
    """Flow time q + scale (q - sin^2(pi q / 2)), q uniform; a positive scale favours the middle.

    Raises:
        ValueError: unless -1 <= scale <= 2 / (pi - 2) = 1.7519, where the map is monotone.
    """
    scale = as_parameter(scale, "scale")
    if is_concrete(scale) and not -1 <= scale <= _LARGEST_MODE_SCALE:
        raise ValueError(
            f"sd3_mode needs -1 <= scale <= 2 / (pi - 2) = {_LARGEST_MODE_SCALE:.8f}, where the "
            f"map of time is monotone, got {scale}"
        )
    return FlowMode(scale)


def sd3_cosmap() -> Cosine:
    """Flow time 1 - 1 / (1 + tan(pi q / 2)), q uniform: the law of ``cosine``."""
    return Cosine()
