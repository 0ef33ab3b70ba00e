"""Masked schedules: masking rates m(t) that rise over t in [0, 1], t = 0 clean.

With t uniform a schedule is a law of the logSNR at the quantile u = 1 - t. The papers' loss weight
m'(t) / m(t) is 1 / (rate * density of the rate): the schedule changes not the bound, only the
variance of its estimate. Two mirror-image curves are called "cosine" in public code: here
``cosine_md4`` and ``cosine_mdlm``. "loglinear" is the linear rate (``sigma = -log(1 - m)``).
"""

import abc
from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp

from mdm_jax.checks import (
    Logsnr,
    PositiveRate,
    Rate,
    Real,
    as_parameter,
    checked,
    parameters,
    unknown_name,
)
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.bell import beta, logit_normal
from mdm_jax.schedules.coordinates import (
    MaskingLevel,
    logsnr_from_log_masking_rate,
    masking_rate,
)
from mdm_jax.schedules.laws import Instant
from mdm_jax.schedules.schedule import MaskedSchedule
from mdm_jax.types import Array, ArrayLike

_HALF_PI = jnp.pi / 2
_QUARTER_PI = jnp.pi / 4


@pytree_dataclass
class Clipped(MaskedSchedule):
    """m = clean + (1 - noisy - clean) t, given by the rates left out at the two ends."""

    clean: ArrayLike
    noisy: ArrayLike

    def rate_formula(self, at: Instant) -> Array:
        return self.clean * at.rest + (1 - self.noisy) * at.t

    def logsnr_formula(self, at: Instant) -> Array:
        survival = (1 - self.clean) * at.rest + self.noisy * at.t
        return jnp.log(survival) - jnp.log(self.rate_formula(at))

    def time_formula(self, level: MaskingLevel) -> Instant:
        width = 1 - self.clean - self.noisy
        return Instant((level.rate - self.clean) / width, (level.survival - self.noisy) / width)

    def log_rate_density(self, level: MaskingLevel) -> Array:
        return jnp.full_like(level.logsnr, -jnp.log(1 - self.clean - self.noisy))


@pytree_dataclass
class CosineMD4(MaskedSchedule):
    """m = sin(pi t / 2), 1 - m = 2 sin(pi (1 - t) / 4)^2."""

    def rate_formula(self, at: Instant) -> Array:
        return jnp.sin(_HALF_PI * at.t)

    def logsnr_formula(self, at: Instant) -> Array:
        log_survival = jnp.log(2.0) + 2 * jnp.log(jnp.sin(_QUARTER_PI * at.rest))
        return log_survival - jnp.log(jnp.sin(_HALF_PI * at.t))

    def time_formula(self, level: MaskingLevel) -> Instant:
        return _quarter_circle(level.rate, jnp.sqrt(level.survival * (1 + level.rate)))

    def log_rate_density(self, level: MaskingLevel) -> Array:
        return -jnp.log(_HALF_PI) - 0.5 * (level.log_survival + jnp.log1p(level.rate))


@pytree_dataclass
class CosineMDLM(MaskedSchedule):
    """m = 1 - cos(pi t / 2) = 2 sin(pi t / 4)^2."""

    def rate_formula(self, at: Instant) -> Array:
        early = 2 * jnp.square(jnp.sin(_QUARTER_PI * at.t))
        return jnp.where(at.t < 0.5, early, 1 - jnp.sin(_HALF_PI * at.rest))

    def logsnr_formula(self, at: Instant) -> Array:
        log_rate = jnp.log(2.0) + 2 * jnp.log(jnp.sin(_QUARTER_PI * at.t))
        return jnp.log(jnp.sin(_HALF_PI * at.rest)) - log_rate

    def time_formula(self, level: MaskingLevel) -> Instant:
        return _quarter_circle(jnp.sqrt(level.rate * (1 + level.survival)), level.survival)

    def log_rate_density(self, level: MaskingLevel) -> Array:
        return -jnp.log(_HALF_PI) - 0.5 * (level.log_rate + jnp.log1p(level.survival))


@pytree_dataclass
class CosineSquared(MaskedSchedule):
    """m = sin(pi t / 2)^2."""

    def rate_formula(self, at: Instant) -> Array:
        return jnp.square(jnp.sin(_HALF_PI * at.t))

    def logsnr_formula(self, at: Instant) -> Array:
        return 2 * (jnp.log(jnp.sin(_HALF_PI * at.rest)) - jnp.log(jnp.sin(_HALF_PI * at.t)))

    def time_formula(self, level: MaskingLevel) -> Instant:
        return _quarter_circle(jnp.sqrt(level.rate), jnp.sqrt(level.survival))

    def log_rate_density(self, level: MaskingLevel) -> Array:
        return -jnp.log(jnp.pi) - 0.5 * (level.log_rate + level.log_survival)


@pytree_dataclass
class Power(MaskedSchedule):
    exponent: ArrayLike

    def rate_formula(self, at: Instant) -> Array:
        return jnp.power(at.t, self.exponent)

    def logsnr_formula(self, at: Instant) -> Array:
        early = at.t < 0.5
        log_t = jnp.log(jnp.where(early, at.t, 0.5))
        log_t = jnp.where(early, log_t, jnp.log1p(-jnp.where(early, 0.5, at.rest)))
        return logsnr_from_log_masking_rate(self.exponent * log_t)

    def time_formula(self, level: MaskingLevel) -> Instant:
        log_t = level.log_rate / self.exponent
        return Instant(jnp.exp(log_t), -jnp.expm1(log_t))

    def log_rate_density(self, level: MaskingLevel) -> Array:
        return (1 / self.exponent - 1) * level.log_rate - jnp.log(self.exponent)


@pytree_dataclass
class Log(MaskedSchedule):
    """m = log2(1 + t), 1 - m = -log2(1 - (1 - t) / 2)."""

    def rate_formula(self, at: Instant) -> Array:
        return jnp.log1p(at.t) / jnp.log(2.0)

    def logsnr_formula(self, at: Instant) -> Array:
        return jnp.log(-jnp.log1p(-0.5 * at.rest)) - jnp.log(jnp.log1p(at.t))

    def time_formula(self, level: MaskingLevel) -> Instant:
        log_2 = jnp.log(2.0)
        return Instant(jnp.expm1(level.rate * log_2), -2 * jnp.expm1(-level.survival * log_2))

    def log_rate_density(self, level: MaskingLevel) -> Array:
        return jnp.log(jnp.log(2.0)) + level.rate * jnp.log(2.0)


class _LinearCoordinate(MaskedSchedule):
    """Schedules along which some coordinate of the level is linear in time."""

    def time_formula(self, level: MaskingLevel) -> Instant:
        (start, end), (value, _) = self.ends(), self.coordinate(level)
        return Instant((value - start) / (end - start), (end - value) / (end - start))

    def log_rate_density(self, level: MaskingLevel) -> Array:
        start, end = self.ends()
        return self.coordinate(level)[1] - jnp.log(jnp.abs(end - start))

    def interpolate(self, at: Instant) -> Array:
        start, end = self.ends()
        return start * at.rest + end * at.t

    @abc.abstractmethod
    def ends(self) -> tuple[ArrayLike, ArrayLike]:
        """The coordinate at t = 0 and at t = 1."""

    @abc.abstractmethod
    def coordinate(self, level: MaskingLevel) -> tuple[Array, Array]:
        """The coordinate, and the log of the absolute value of its derivative by the rate."""


@pytree_dataclass
class LogUniform(_LinearCoordinate):
    """log m linear from log low to log high; its loss weight is constant."""

    low: ArrayLike
    high: ArrayLike

    def ends(self) -> tuple[ArrayLike, ArrayLike]:
        return jnp.log(self.low), jnp.log(self.high)

    def coordinate(self, level: MaskingLevel) -> tuple[Array, Array]:
        return level.log_rate, -level.log_rate

    def rate_formula(self, at: Instant) -> Array:
        return _interpolate_geometrically(self.low, self.high, at)

    def logsnr_formula(self, at: Instant) -> Array:
        return logsnr_from_log_masking_rate(self.interpolate(at))


@pytree_dataclass
class UniformLogsnr(_LinearCoordinate):
    low: ArrayLike
    high: ArrayLike

    def ends(self) -> tuple[ArrayLike, ArrayLike]:
        return self.high, self.low

    def coordinate(self, level: MaskingLevel) -> tuple[Array, Array]:
        return level.logsnr, -level.log_rate - level.log_survival

    def rate_formula(self, at: Instant) -> Array:
        return masking_rate(self.interpolate(at))

    def logsnr_formula(self, at: Instant) -> Array:
        return self.interpolate(at)


@pytree_dataclass
class LinearSigma(_LinearCoordinate):
    """m = 1 - exp(-sigma), sigma linear from sigma_min to sigma_max."""

    sigma_min: ArrayLike
    sigma_max: ArrayLike

    def ends(self) -> tuple[ArrayLike, ArrayLike]:
        return self.sigma_min, self.sigma_max

    def coordinate(self, level: MaskingLevel) -> tuple[Array, Array]:
        return -level.log_survival, -level.log_survival

    def sigma(self, at: Instant) -> Array:
        return self.interpolate(at)

    def rate_formula(self, at: Instant) -> Array:
        return -jnp.expm1(-self.sigma(at))

    def logsnr_formula(self, at: Instant) -> Array:
        return -logsnr_from_log_masking_rate(-self.sigma(at))


@pytree_dataclass
class Geometric(LinearSigma):
    """m = 1 - exp(-sigma), log sigma linear from log sigma_min to log sigma_max."""

    def ends(self) -> tuple[ArrayLike, ArrayLike]:
        return jnp.log(self.sigma_min), jnp.log(self.sigma_max)

    def coordinate(self, level: MaskingLevel) -> tuple[Array, Array]:
        log_sigma = jnp.log(-level.log_survival)
        return log_sigma, -level.log_survival - log_sigma

    def sigma(self, at: Instant) -> Array:
        return _interpolate_geometrically(self.sigma_min, self.sigma_max, at)


def _quarter_circle(sine: Array, cosine: Array) -> Instant:
    """(2/pi) times the angle and its complement."""
    return Instant(jnp.arctan2(sine, cosine) / _HALF_PI, jnp.arctan2(cosine, sine) / _HALF_PI)


def _interpolate_geometrically(low: ArrayLike, high: ArrayLike, at: Instant) -> Array:
    log_ratio = jnp.log(high) - jnp.log(low)
    from_low, from_high = low * jnp.exp(at.t * log_ratio), high * jnp.exp(-at.rest * log_ratio)
    return jnp.where(at.t < 0.5, from_low, from_high)


Sigma = Annotated[ArrayLike, Real("[0, 1e6]", "total noise", "-log of the rate of survival")]
PositiveSigma = Annotated[ArrayLike, Real("(0, 1e6]", "total noise", "-log of survival")]


def linear() -> Clipped:
    """m = t, a uniform masking rate. Weight 1/t."""
    return Clipped(0.0, 0.0)


@checked
def loglinear(
    eps: Annotated[ArrayLike, Real("[0, 1)", "masking rate", "distance of the end from 1")] = 1e-3,
) -> Clipped:
    """m = (1 - eps) t, 0 <= eps < 1, stopping short of rate 1. SEDD, RADD, MDLM, BD3-LM, Duo."""
    return Clipped(0.0, as_parameter(eps, "eps"))


@checked
def clipped(low: Rate, high: Rate) -> Clipped:
    """m uniform on [low, high], 0 <= low < high <= 1. BD3-LM; (eps, 1) is that of LLaDA and SMDM.

    Weight (high - low)/m, for the integral on [low, high]. Public code with 1/m has the mean.
    """
    low, high = _rates("clipped", low, high)
    return Clipped(low, 1 - high)


def cosine_md4() -> CosineMD4:
    """m = sin(pi t / 2), "cosine" in MD4, dllm and Duo. Weight (pi/2) cot(pi t / 2)."""
    return CosineMD4()


def cosine_mdlm() -> CosineMDLM:
    """m = 1 - cos(pi t / 2). "cosine" in MDLM and BD3-LM. Weight (pi/2) cot(pi t / 4)."""
    return CosineMDLM()


def cosine_squared() -> CosineSquared:
    """m = sin(pi t / 2)^2, the law of the Gaussian cosine schedule. Weight pi cot(pi t / 2)."""
    return CosineSquared()


@checked
def power(
    exponent: Annotated[ArrayLike, Real("(0, 1e3]", "", "of time; above 1: more small rates")],
) -> Power:
    """m = t^exponent, exponent > 0; above 1 favours small rates. Weight exponent/t."""
    return Power(as_parameter(exponent, "exponent"))


def sqrt() -> Power:
    """m = t^(1/2). Weight 1/(2t)."""
    return Power(0.5)


def log() -> Log:
    """m = log2(1 + t). Weight 1/((1 + t) ln(1 + t))."""
    return Log()


@checked
def geometric(sigma_min: PositiveSigma, sigma_max: PositiveSigma) -> Geometric:
    """m = 1 - exp(-sigma), log sigma linear in t, 0 < sigma_min < sigma_max. SEDD, MDLM."""
    ends = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    rule = "0 < sigma_min < sigma_max"
    return Geometric(*parameters("geometric", rule, lambda a, b: 0 < a < b, **ends))


@checked
def linear_sigma(sigma_min: Sigma, sigma_max: Sigma) -> LinearSigma:
    """m = 1 - exp(-sigma), sigma linear in t, 0 <= sigma_min < sigma_max. MDLM's "linear"."""
    ends = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    rule = "0 <= sigma_min < sigma_max"
    return LinearSigma(*parameters("linear_sigma", rule, lambda a, b: 0 <= a < b, **ends))


@checked
def log_uniform(low: PositiveRate, high: PositiveRate) -> LogUniform:
    """log m uniform, 0 < low < high <= 1; MDLM's "importance sampling". Weight ln(high/low)."""
    return LogUniform(*_rates("log_uniform", low, high))


@checked
def uniform_logsnr(low: Logsnr, high: Logsnr) -> UniformLogsnr:
    """logSNR uniform on [low, high], low < high. Weight (high - low) (1 - m)."""
    ends = {"low": low, "high": high}
    return UniformLogsnr(*parameters("uniform_logsnr", "low < high", lambda a, b: a < b, **ends))


MASKED_SCHEDULES: dict[str, Callable[..., MaskedSchedule]] = {
    factory.__name__: factory
    for factory in (
        *(linear, loglinear, clipped, cosine_md4, cosine_mdlm, cosine_squared, power, sqrt, log),
        *(geometric, linear_sigma, log_uniform, uniform_logsnr, logit_normal, beta),
    )
}
"""Name -> factory, for configurations. Factories raise a ValueError for bad parameters."""


def by_name(name: str, **settings: ArrayLike) -> MaskedSchedule:
    """The named schedule; ValueError for unknown names, TypeError for unknown parameters."""
    if name not in MASKED_SCHEDULES:
        raise unknown_name(name, MASKED_SCHEDULES, "masked schedule")
    return MASKED_SCHEDULES[name](**settings)


def _rates(name: str, low: ArrayLike, high: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
    rule = "masking rates 0 <= low < high <= 1"
    return parameters(name, rule, lambda a, b: 0 <= a < b <= 1, low=low, high=high)
