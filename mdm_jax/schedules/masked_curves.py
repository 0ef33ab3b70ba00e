"""Curves of the masked schedules: formulas that keep their precision at both ends.

Everything is written twice over, in t from the clean end and in 1 - t from the noisy end; see
:class:`~mdm_jax.schedules.masked_schedule.MaskedSchedule`. Parameters are checked by the factories
in :mod:`mdm_jax.schedules.masked`, not here.
"""

import jax
import jax.numpy as jnp

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import MaskingLevel, logsnr_from_log_masking_rate
from mdm_jax.schedules.masked_schedule import Instant, MaskedSchedule
from mdm_jax.typing import Array, ArrayLike

_HALF_PI = jnp.pi / 2
_QUARTER_PI = jnp.pi / 4


@pytree_dataclass
class Clipped(MaskedSchedule):
    """m = clean + (1 - noisy - clean) t, uniform on [clean, 1 - noisy].

    The two ends are given by the rates they leave out, so that a small ``noisy`` keeps its digits.
    """

    clean: ArrayLike
    noisy: ArrayLike

    def rate_formula(self, at: Instant) -> Array:
        return self.clean * at.rest + (1 - self.noisy) * at.t

    def logsnr_formula(self, at: Instant) -> Array:
        survival = (1 - self.clean) * at.rest + self.noisy * at.t
        return jnp.log(survival) - jnp.log(self.rate_formula(at))

    def weight_formula(self, at: Instant) -> Array:
        return self._width() / self.rate_formula(at)

    def time_formula(self, level: MaskingLevel) -> Instant:
        width = self._width()
        return Instant((level.rate - self.clean) / width, (level.survival - self.noisy) / width)

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return jnp.full_like(level.logsnr, -jnp.log(self._width()))

    def _width(self) -> ArrayLike:
        return 1 - self.clean - self.noisy


@pytree_dataclass
class CosineMD4(MaskedSchedule):
    """m = sin(pi t / 2)."""

    def rate_formula(self, at: Instant) -> Array:
        return jnp.sin(_HALF_PI * at.t)

    def logsnr_formula(self, at: Instant) -> Array:
        # 1 - sin(pi t / 2) = 2 sin(pi rest / 4)^2
        log_survival = jnp.log(2.0) + 2 * jnp.log(jnp.sin(_QUARTER_PI * at.rest))
        return log_survival - jnp.log(jnp.sin(_HALF_PI * at.t))

    def weight_formula(self, at: Instant) -> Array:
        return _HALF_PI * jnp.sin(_HALF_PI * at.rest) / jnp.sin(_HALF_PI * at.t)

    def time_formula(self, level: MaskingLevel) -> Instant:
        return _quarter_turn(level.rate, jnp.sqrt(level.survival * (1 + level.rate)))

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return -jnp.log(_HALF_PI) - 0.5 * (level.log_survival + jnp.log1p(level.rate))


@pytree_dataclass
class CosineMDLM(MaskedSchedule):
    """m = 1 - cos(pi t / 2)."""

    def rate_formula(self, at: Instant) -> Array:
        # Both are 1 - cos(pi t / 2), each exact at its own end.
        early = 2 * jnp.square(jnp.sin(_QUARTER_PI * at.t))
        return jnp.where(at.t < 0.5, early, 1 - jnp.sin(_HALF_PI * at.rest))

    def logsnr_formula(self, at: Instant) -> Array:
        log_rate = jnp.log(2.0) + 2 * jnp.log(jnp.sin(_QUARTER_PI * at.t))
        return jnp.log(jnp.sin(_HALF_PI * at.rest)) - log_rate

    def weight_formula(self, at: Instant) -> Array:
        return _HALF_PI / jnp.tan(_QUARTER_PI * at.t)

    def time_formula(self, level: MaskingLevel) -> Instant:
        return _quarter_turn(jnp.sqrt(level.rate * (1 + level.survival)), level.survival)

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return -jnp.log(_HALF_PI) - 0.5 * (level.log_rate + jnp.log1p(level.survival))


@pytree_dataclass
class CosineSquared(MaskedSchedule):
    """m = sin(pi t / 2)^2."""

    def rate_formula(self, at: Instant) -> Array:
        return jnp.square(jnp.sin(_HALF_PI * at.t))

    def logsnr_formula(self, at: Instant) -> Array:
        return 2 * (jnp.log(jnp.sin(_HALF_PI * at.rest)) - jnp.log(jnp.sin(_HALF_PI * at.t)))

    def weight_formula(self, at: Instant) -> Array:
        return jnp.pi * jnp.sin(_HALF_PI * at.rest) / jnp.sin(_HALF_PI * at.t)

    def time_formula(self, level: MaskingLevel) -> Instant:
        return _quarter_turn(jnp.sqrt(level.rate), jnp.sqrt(level.survival))

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return -jnp.log(jnp.pi) - 0.5 * (level.log_rate + level.log_survival)


@pytree_dataclass
class Power(MaskedSchedule):
    """m = t^exponent."""

    exponent: ArrayLike

    def rate_formula(self, at: Instant) -> Array:
        return jnp.power(at.t, self.exponent)

    def logsnr_formula(self, at: Instant) -> Array:
        early = at.t < 0.5
        log_t = jnp.where(
            early, jnp.log(jnp.where(early, at.t, 0.5)), jnp.log1p(-jnp.where(early, 0.5, at.rest))
        )
        return logsnr_from_log_masking_rate(self.exponent * log_t)

    def weight_formula(self, at: Instant) -> Array:
        return self.exponent / at.t

    def time_formula(self, level: MaskingLevel) -> Instant:
        log_t = level.log_rate / self.exponent
        return Instant(jnp.exp(log_t), -jnp.expm1(log_t))

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return (1 / self.exponent - 1) * level.log_rate - jnp.log(self.exponent)


@pytree_dataclass
class Log(MaskedSchedule):
    """m = log2(1 + t)."""

    def rate_formula(self, at: Instant) -> Array:
        return jnp.log1p(at.t) / jnp.log(2.0)

    def logsnr_formula(self, at: Instant) -> Array:
        # log 2 - log(1 + t) = -log(1 - rest / 2)
        return jnp.log(-jnp.log1p(-0.5 * at.rest)) - jnp.log(jnp.log1p(at.t))

    def weight_formula(self, at: Instant) -> Array:
        return 1 / ((1 + at.t) * jnp.log1p(at.t))

    def time_formula(self, level: MaskingLevel) -> Instant:
        log_2 = jnp.log(2.0)
        return Instant(jnp.expm1(level.rate * log_2), -2 * jnp.expm1(-level.survival * log_2))

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return jnp.log(jnp.log(2.0)) + level.rate * jnp.log(2.0)


@pytree_dataclass
class Geometric(MaskedSchedule):
    """m = 1 - exp(-sigma) with sigma = sigma_min^(1 - t) sigma_max^t."""

    sigma_min: ArrayLike
    sigma_max: ArrayLike

    def rate_formula(self, at: Instant) -> Array:
        return -jnp.expm1(-self._sigma(at))

    def logsnr_formula(self, at: Instant) -> Array:
        return -logsnr_from_log_masking_rate(-self._sigma(at))

    def weight_formula(self, at: Instant) -> Array:
        return _inverse_expm1(self._sigma(at)) * self._sigma(at) * self._log_ratio()

    def time_formula(self, level: MaskingLevel) -> Instant:
        log_sigma = jnp.log(-level.log_survival)
        return Instant(
            (log_sigma - jnp.log(self.sigma_min)) / self._log_ratio(),
            (jnp.log(self.sigma_max) - log_sigma) / self._log_ratio(),
        )

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        log_sigma = jnp.log(-level.log_survival)
        return -level.log_survival - log_sigma - jnp.log(self._log_ratio())

    def _sigma(self, at: Instant) -> Array:
        return _interpolate_geometrically(self.sigma_min, self.sigma_max, at)

    def _log_ratio(self) -> Array:
        return jnp.log(self.sigma_max) - jnp.log(self.sigma_min)


@pytree_dataclass
class LinearSigma(MaskedSchedule):
    """m = 1 - exp(-sigma) with sigma = sigma_min + (sigma_max - sigma_min) t."""

    sigma_min: ArrayLike
    sigma_max: ArrayLike

    def rate_formula(self, at: Instant) -> Array:
        return -jnp.expm1(-self._sigma(at))

    def logsnr_formula(self, at: Instant) -> Array:
        return -logsnr_from_log_masking_rate(-self._sigma(at))

    def weight_formula(self, at: Instant) -> Array:
        return (self.sigma_max - self.sigma_min) * _inverse_expm1(self._sigma(at))

    def time_formula(self, level: MaskingLevel) -> Instant:
        width = self.sigma_max - self.sigma_min
        sigma = -level.log_survival
        return Instant((sigma - self.sigma_min) / width, (self.sigma_max - sigma) / width)

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return -level.log_survival - jnp.log(self.sigma_max - self.sigma_min)

    def _sigma(self, at: Instant) -> Array:
        return self.sigma_min * at.rest + self.sigma_max * at.t


@pytree_dataclass
class LogUniform(MaskedSchedule):
    """m = low^(1 - t) high^t; its loss weight is constant."""

    low: ArrayLike
    high: ArrayLike

    def rate_formula(self, at: Instant) -> Array:
        return _interpolate_geometrically(self.low, self.high, at)

    def logsnr_formula(self, at: Instant) -> Array:
        return logsnr_from_log_masking_rate(jnp.log(self.low) * at.rest + jnp.log(self.high) * at.t)

    def weight_formula(self, at: Instant) -> Array:
        return jnp.full_like(at.t, self._log_ratio())

    def time_formula(self, level: MaskingLevel) -> Instant:
        return Instant(
            (level.log_rate - jnp.log(self.low)) / self._log_ratio(),
            (jnp.log(self.high) - level.log_rate) / self._log_ratio(),
        )

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return -level.log_rate - jnp.log(self._log_ratio())

    def _log_ratio(self) -> Array:
        return jnp.log(self.high) - jnp.log(self.low)


@pytree_dataclass
class UniformLogsnr(MaskedSchedule):
    """logSNR = high - (high - low) t."""

    low: ArrayLike
    high: ArrayLike

    def rate_formula(self, at: Instant) -> Array:
        return jax.nn.sigmoid(-self.logsnr_formula(at))

    def logsnr_formula(self, at: Instant) -> Array:
        return self.low * at.t + self.high * at.rest

    def weight_formula(self, at: Instant) -> Array:
        return (self.high - self.low) * jax.nn.sigmoid(self.logsnr_formula(at))

    def time_formula(self, level: MaskingLevel) -> Instant:
        width = self.high - self.low
        return Instant((self.high - level.logsnr) / width, (level.logsnr - self.low) / width)

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return -level.log_rate - level.log_survival - jnp.log(self.high - self.low)


def _quarter_turn(sine: Array, cosine: Array) -> Instant:
    """(2/pi) times the angle and its complement."""
    return Instant(jnp.arctan2(sine, cosine) / _HALF_PI, jnp.arctan2(cosine, sine) / _HALF_PI)


def _inverse_expm1(x: Array) -> Array:
    """1 / (exp(x) - 1) for x > 0, without overflow."""
    return jnp.exp(-x) / -jnp.expm1(-x)


def _interpolate_geometrically(low: ArrayLike, high: ArrayLike, at: Instant) -> Array:
    """low^(1 - t) high^t, from the nearer end: exact at both."""
    log_ratio = jnp.log(high) - jnp.log(low)
    return jnp.where(
        at.t < 0.5, low * jnp.exp(at.t * log_ratio), high * jnp.exp(-at.rest * log_ratio)
    )
