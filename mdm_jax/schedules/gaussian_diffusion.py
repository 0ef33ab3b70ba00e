"""Gaussian schedules written for variance-preserving diffusion: a rule for alpha or for its decay.

With ``a = sigmoid(logsnr)`` the kept fraction of the power, alpha = sqrt(a) and the time of the
Ornstein-Uhlenbeck process that has decayed this far is ``-log(a) / 2``.
"""

import jax
import jax.numpy as jnp

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import (
    log_survival_probability,
    logsnr_from_log_survival_probability,
)
from mdm_jax.schedules.curve_law import CurveLaw
from mdm_jax.schedules.laws import Logistic
from mdm_jax.schedules.masked_schedule import Instant
from mdm_jax.schedules.parameters import as_parameter, check_finite, check_interval, is_concrete
from mdm_jax.typing import Array, ArrayLike


@pytree_dataclass
class LinearBeta(CurveLaw):
    """alpha^2 = exp(-B), B(t) the integral of a rate that is linear in t."""

    beta_start: ArrayLike
    beta_end: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        total = jnp.asarray(0.5 * (self.beta_start + self.beta_end))
        return logsnr_from_log_survival_probability(-total), jnp.inf

    def logsnr_formula(self, at: Instant) -> Array:
        decay = at.t * (self.beta_start + 0.5 * (self.beta_end - self.beta_start) * at.t)
        return logsnr_from_log_survival_probability(-decay)

    def time_formula(self, logsnr: Array) -> Instant:
        decay = -log_survival_probability(logsnr)
        left = 0.5 * (self.beta_start + self.beta_end) - decay
        rate = self._rate(decay)
        return Instant(2 * decay / (self.beta_start + rate), 2 * left / (self.beta_end + rate))

    def log_pdf_formula(self, logsnr: Array) -> Array:
        rate = self._rate(-log_survival_probability(logsnr))
        return jax.nn.log_sigmoid(-logsnr) - jnp.log(rate)

    def _rate(self, decay: Array) -> Array:
        """dB/dt where B = decay."""
        growth = 2 * (self.beta_end - self.beta_start) * decay
        return jnp.sqrt(jnp.square(jnp.asarray(self.beta_start, decay.dtype)) + growth)


@pytree_dataclass
class AmplitudeLinear(CurveLaw):
    """alpha = 1 - t."""

    def logsnr_formula(self, at: Instant) -> Array:
        return 2 * jnp.log(at.rest) - jnp.log(at.t) - jnp.log(1 + at.rest)

    def time_formula(self, logsnr: Array) -> Instant:
        rest = jnp.exp(0.5 * jax.nn.log_sigmoid(logsnr))
        return Instant(jax.nn.sigmoid(-logsnr) / (1 + rest), rest)

    def log_pdf_formula(self, logsnr: Array) -> Array:
        log_survival, log_noise = jax.nn.log_sigmoid(logsnr), jax.nn.log_sigmoid(-logsnr)
        return 0.5 * log_survival + log_noise - jnp.log(2.0).astype(logsnr.dtype)


@pytree_dataclass
class Sigmoid(CurveLaw):
    """alpha^2 falls from 1 to 0 like a piece of the logistic curve, from ``low`` to ``high``."""

    low: ArrayLike
    high: ArrayLike

    def logsnr_formula(self, at: Instant) -> Array:
        half = 0.5 * (self.high - self.low)
        return _log_sinh(half * at.rest) - _log_sinh(half * at.t) - self._tilt()

    def time_formula(self, logsnr: Array) -> Instant:
        width = self.high - self.low
        ratio = logsnr + self._tilt()
        return Instant(_part(ratio, width) / width, _part(-ratio, width) / width)

    def log_pdf_formula(self, logsnr: Array) -> Array:
        width = self.high - self.low
        at = self.low + _part(logsnr + self._tilt(), width)
        slope = jnp.log(width) + jax.nn.log_sigmoid(at) + jax.nn.log_sigmoid(-at)
        ends = _log_cosh(0.5 * self.high) + _log_cosh(0.5 * self.low) + jnp.log(2.0)
        log_span = _log_sinh(0.5 * width) - ends
        spread = jax.nn.log_sigmoid(logsnr) + jax.nn.log_sigmoid(-logsnr)
        return spread + (log_span - slope).astype(logsnr.dtype)

    def _tilt(self) -> Array:
        return _log_cosh(0.5 * self.high) - _log_cosh(0.5 * self.low)


def ddpm_linear(beta_start: ArrayLike = 0.1, beta_end: ArrayLike = 20.0) -> LinearBeta:
    """alpha^2 = exp(-B), B = beta_start t + (beta_end - beta_start) t^2 / 2.

    The continuous limit of the linear betas of DDPM (Ho et al. 2020), the VP-SDE of Song et al.
    (2021); ends at logSNR -10.05. The table of 1000 steps is ``gaussian.ddpm_discrete``.

    Raises:
        ValueError: unless 0 < beta_start <= beta_end, both finite.
    """
    low, high = as_parameter(beta_start, "beta_start"), as_parameter(beta_end, "beta_end")
    check_finite("ddpm_linear", beta_start=low, beta_end=high)
    if is_concrete(low, high) and not 0 < low <= high:
        raise ValueError(f"ddpm_linear needs 0 < beta_start <= beta_end, got {low}, {high}")
    return LinearBeta(low, high)


def ou_time(max_time: ArrayLike = 5.025) -> LinearBeta:
    """Uniform in Ornstein-Uhlenbeck time up to ``max_time``: alpha = exp(-max_time t).

    The default ends where :func:`ddpm_linear` does.

    Raises:
        ValueError: unless max_time is positive and finite.
    """
    max_time = as_parameter(max_time, "max_time")
    check_finite("ou_time", max_time=max_time)
    if is_concrete(max_time) and not max_time > 0:
        raise ValueError(f"ou_time needs max_time > 0, got {max_time}")
    return LinearBeta(2 * max_time, 2 * max_time)


def variance_linear() -> Logistic:
    """alpha^2 = 1 - t, variance sigma^2 = t. Chen (2023), "gamma(t) = 1 - t".

    The law of a uniform masking rate.
    """
    return Logistic(0.0, 1.0)


def amplitude_linear() -> AmplitudeLinear:
    """alpha = 1 - t with sigma^2 = 1 - alpha^2: uniform in the correlation with the data.

    Not the flow schedule, where sigma = t too.
    """
    return AmplitudeLinear()


def chen_sigmoid(
    start: ArrayLike = -3.0, end: ArrayLike = 3.0, temperature: ArrayLike = 1.0
) -> Sigmoid:
    """alpha^2 = (S(end) - S(z)) / (S(end) - S(start)), z from start to end, S(x) = sigmoid(x / T).

    The sigmoid family of Jabri et al. (2022) and Chen (2023).

    Raises:
        ValueError: unless start < end and temperature > 0, all finite.
    """
    start, end = as_parameter(start, "start"), as_parameter(end, "end")
    temperature = as_parameter(temperature, "temperature")
    check_finite("chen_sigmoid", start=start, end=end, temperature=temperature)
    check_interval("chen_sigmoid", start, end, "start and end")
    if is_concrete(temperature) and not temperature > 0:
        raise ValueError(f"chen_sigmoid needs temperature > 0, got {temperature}")
    return Sigmoid(start / temperature, end / temperature)


def _part(log_ratio: Array, width: ArrayLike) -> Array:
    """x in [0, width] with log(sinh((width - x) / 2) / sinh(x / 2)) = log_ratio."""
    numerator = -jnp.expm1(-jnp.asarray(width, log_ratio.dtype))
    return jnp.log1p(numerator / (jnp.exp(log_ratio - 0.5 * width) + jnp.exp(-width)))


def _log_sinh(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return x + jax.nn.log1mexp(2 * x) - jnp.log(2.0)


def _log_cosh(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return jnp.logaddexp(x, -x) - jnp.log(2.0)
