"""What a masked schedule is, and the law over the logSNR that it induces.

A schedule is a masking rate m(t) that rises over t in [0, 1] (t = 0 clean). With t uniform it is
nothing but a law of the noise level, and the loss weight of its papers is

    weight(t) = m'(t) / m(t) = 1 / (m * density of m),

one over the rate times the sampling density: the bound does not depend on the schedule, only the
variance of its estimate does.

Curves of the masked schedules: formulas that keep their precision at both ends.

Everything is written twice over, in t from the clean end and in 1 - t from the noisy end; see
:class:`~mdm_jax.schedules.masked_schedule.MaskedSchedule`. Parameters are checked by the factories
in :mod:`mdm_jax.schedules.masked`, not here.

A law from any masking rate m(t) that can be evaluated: tabulated once, exact thereafter.

The masked schedules of the literature, by name.

Two different curves are called "cosine" in public code, mirror images of each other; here each
carries the name of those who use it. "loglinear" is the linear masking rate: only its integrated
noise ``sigma = -log(1 - m)`` is a logarithm.

Every factory checks its parameters (traced ones are left alone) and stands in
:data:`MASKED_SCHEDULES` under its own name. Time t runs from 0, clean, to 1.
"""

import abc
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import as_parameter, check_finite, check_interval, is_concrete, unknown_name
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import (
    MaskingLevel,
    as_float,
    level_from_logsnr,
    level_from_masking_rate,
    logsnr_from_log_masking_rate,
    survival_probability,
)
from mdm_jax.schedules.laws import PiecewiseConstant, Tails, TwoSidedLaw, confine, inside
from mdm_jax.types import Array, ArrayLike


class Instant(NamedTuple):
    """A time with its distance from the noisy end, neither obtained from the other by rounding.

    Attributes:
        t: time in [0, 1], 0 clean.
        rest: 1 - t.
    """

    t: Array
    rest: Array


class LostSupport(NamedTuple):
    """Masking rates that a schedule never visits.

    Attributes:
        clean: m(0), the length of the interval of rates missing at the clean end.
        noisy: 1 - m(1), the same at the noisy end.
    """

    clean: Array
    noisy: Array


class MaskedSchedule(abc.ABC):
    """Base of the masked schedules.

    A subclass gives the five ``*_formula`` methods. They receive t together with 1 - t, or a level
    in all its coordinates, so that each can be written without a difference of nearly equal
    numbers: float32 then holds the logSNR at t = 2**-24 and at 1 - 2**-24 equally well. Decorate
    it with ``schedules.pytree_dataclass``, so that it can be passed through jit.
    """

    def masking_rate(self, t: ArrayLike, rest: ArrayLike | None = None) -> Array:
        """m(t).

        Args:
            t: time in [0, 1], any shape; 0 is clean.
            rest: 1 - t, where the caller knows it more exactly than the difference.
        """
        return self.rate_formula(_instant(t, rest))

    def survival_probability(self, t: ArrayLike, rest: ArrayLike | None = None) -> Array:
        """1 - m(t), exact where m(t) is close to 1."""
        return survival_probability(self.logsnr(t, rest))

    def logsnr(self, t: ArrayLike, rest: ArrayLike | None = None) -> Array:
        """log((1 - m) / m) at time t; +inf at rate 0, -inf at rate 1."""
        return self.logsnr_formula(_instant(t, rest))

    def weight(self, t: ArrayLike, rest: ArrayLike | None = None) -> Array:
        """m'(t) / m(t), the factor on the sum of the masked cross-entropies for t ~ U(0, 1).

        Infinite at t = 0 where m(0) = 0.
        """
        return self.weight_formula(_instant(t, rest))

    def time(self, rate: ArrayLike) -> Array:
        """The t at which the masking rate is ``rate``; 0 or 1 where it is outside [m(0), m(1)].

        This is also the distribution function of the rate.
        """
        level = level_from_masking_rate(rate)
        low, high = self.rate_range
        held = level_from_masking_rate(jnp.clip(level.rate, low, high))
        return jnp.clip(self.time_formula(held).t, 0, 1)

    def log_pdf_rate(self, rate: ArrayLike) -> Array:
        """Log density of the masking rate under t ~ U(0, 1); -inf outside (m(0), m(1)).

        The ends 0 and 1 count as outside: some densities are infinite there.
        """
        rate = as_float(rate)
        low, high = self.rate_range
        slack = 8 * jnp.finfo(rate.dtype).eps
        within = (
            (rate >= low * (1 - slack)) & (rate <= high * (1 + slack)) & (rate > 0) & (rate < 1)
        )
        safe = level_from_masking_rate(jnp.where(within, rate, 0.5 * (low + high)))
        return jnp.where(within, self.log_pdf_formula(safe), -jnp.inf)

    @property
    def rate_range(self) -> tuple[Array, Array]:
        """(m(0), m(1))."""
        return self.masking_rate(0.0), self.masking_rate(1.0)

    @property
    def logsnr_range(self) -> tuple[Array, Array]:
        """(logSNR at t = 1, logSNR at t = 0)."""
        return self.logsnr(1.0), self.logsnr(0.0)

    @property
    def lost_support(self) -> LostSupport:
        """Rates that are never visited. Both zero: estimates are exact.

        Otherwise they are of ``int_m(0)^m(1) g dm`` instead of ``int_0^1 g dm``, g being the mean
        per-row loss at a rate.
        """
        return LostSupport(self.masking_rate(0.0), self.survival_probability(1.0))

    @abc.abstractmethod
    def rate_formula(self, at: Instant) -> Array:
        """m(t)."""

    @abc.abstractmethod
    def logsnr_formula(self, at: Instant) -> Array:
        """log(1 - m(t)) - log m(t)."""

    @abc.abstractmethod
    def weight_formula(self, at: Instant) -> Array:
        """m'(t) / m(t)."""

    @abc.abstractmethod
    def time_formula(self, level: MaskingLevel) -> Instant:
        """Time of a level within the range."""

    @abc.abstractmethod
    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        """Log density of the masking rate, -log m'(t), of a level within the range."""


@pytree_dataclass
class ScheduleLaw(TwoSidedLaw):
    """Law of the logSNR of ``schedule`` at t ~ U(0, 1); the quantile u is 1 - t."""

    schedule: MaskedSchedule

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return self.schedule.logsnr_range

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        logsnr = as_float(logsnr)
        within = inside(logsnr, self.support)
        level = level_from_logsnr(jnp.where(within, logsnr, jnp.clip(0.0, *self.support)))
        log_density = self.schedule.log_pdf_formula(level) + level.log_rate + level.log_survival
        return jnp.where(within, log_density, -jnp.inf)

    def tails(self, logsnr: ArrayLike) -> Tails:
        logsnr = jnp.clip(as_float(logsnr), *self.support)
        t, rest = self.schedule.time_formula(level_from_logsnr(logsnr))
        return Tails(below=jnp.clip(rest, 0, 1), above=jnp.clip(t, 0, 1))

    def quantile(self, below: Array, above: Array) -> Array:
        return confine(self.schedule.logsnr_formula(Instant(t=above, rest=below)), self.support)


def law_of(schedule: MaskedSchedule) -> ScheduleLaw:
    """The law of the logSNR that a schedule with t ~ U(0, 1) draws from.

    Raises:
        TypeError: if ``schedule`` is not a masked schedule; a bare function m(t) goes to
            ``schedules.tabulated``.
    """
    if not isinstance(schedule, MaskedSchedule):
        raise TypeError(
            f"law_of needs a MaskedSchedule, got {type(schedule).__name__}; "
            "for a function m(t) use schedules.tabulated"
        )
    return ScheduleLaw(schedule)


def _instant(t: ArrayLike, rest: ArrayLike | None) -> Instant:
    t = as_float(t)
    return Instant(t, 1 - t if rest is None else as_float(rest))


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


_RESOLUTION = 2.0**-24
_CELLS_PER_OCTAVE = 16
_TAIL_OCTAVES = range(24, 5, -1)
_FLAT = 2.0**-8
_ROUNDING = 1e-6


def tabulated(
    masking_rate: Callable[[np.ndarray], ArrayLike], num_cells: int = 1024
) -> PiecewiseConstant:
    """Law of the logSNR of an arbitrary schedule m(t), t ~ U(0, 1).

    m is evaluated once, in float64, on a table of t that is uniform in the middle and refined by
    octaves towards both ends, down to quantiles of 2**-24. Between the points the law is uniform in
    the logSNR. Its density and inverse are exact for the law it is, which follows m(t) to a few
    parts in ``num_cells``; where m reaches 0 or 1, the tail beyond the last quantile is drawn from
    one more octave of logSNR, so the support is finite.

    Args:
        masking_rate: rate in [0, 1] for an array of times in [0, 1], elementwise and
            non-decreasing, built from NumPy or JAX operations; t = 0 is the clean end.
        num_cells: cells of the middle part, at least 16.

    Raises:
        ValueError: if m has another shape than its argument, leaves [0, 1], falls, stands still for
            more than 2**-8 of the time (no density describes an atom), or varies too little.
    """
    if num_cells < 16:
        raise ValueError(f"tabulated needs num_cells >= 16, got {num_cells}")
    quantile = _quantile_table(num_cells)
    times = 1 - quantile[::-1]
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        rate = _check_rate(times, np.asarray(masking_rate(times)))
        logsnr = np.asarray(level_from_masking_rate(rate[::-1]).logsnr)
    quantile, logsnr = _merge(*_close_ends(quantile, logsnr))
    if len(quantile) < 16:
        raise ValueError(
            f"tabulated: m(t) varies too little, from {rate[0]} to {rate[-1]}, for float32"
        )
    return PiecewiseConstant(jnp.asarray(logsnr), jnp.asarray(quantile))


def _quantile_table(num_cells: int) -> np.ndarray:
    """Increasing quantiles from 0 to 1 on multiples of 2**-24, which float32 holds exactly."""
    steps = 1 + np.arange(_CELLS_PER_OCTAVE) / _CELLS_PER_OCTAVE
    tail = np.concatenate([2.0**-octave * steps for octave in _TAIL_OCTAVES])
    middle = np.linspace(tail[-1], 1 - tail[-1], num_cells + 1)
    table = np.concatenate([[0.0, 1.0], tail, 1 - tail, middle])
    return np.unique(np.round(table / _RESOLUTION) * _RESOLUTION)


def _check_rate(times: np.ndarray, rate: np.ndarray) -> np.ndarray:
    if rate.shape != times.shape:
        raise ValueError(
            f"tabulated: m(t) must work elementwise, got {rate.shape} from {times.shape}"
        )
    rate = rate.astype(np.float64)
    if not np.all((rate >= 0) & (rate <= 1)):
        at = int(np.argmin((rate >= 0) & (rate <= 1)))
        raise ValueError(f"tabulated: m(t) must stay in [0, 1], but m({times[at]}) = {rate[at]}")
    rising = np.maximum.accumulate(rate)
    if np.any(rising - rate > _ROUNDING):
        at = int(np.argmax(rising - rate > _ROUNDING))
        raise ValueError(
            f"tabulated: m(t) must not fall, but m({times[at - 1]}) = {rate[at - 1]} "
            f"and m({times[at]}) = {rate[at]}"
        )
    start = 0
    for stop in [*np.flatnonzero(np.diff(rising) > 0), len(rising) - 1]:
        if times[stop] - times[start] > _FLAT:
            raise ValueError(
                f"tabulated: m(t) = {rising[start]} all the way from t = {times[start]} to "
                f"{times[stop]}, which has no density; rescale t to leave this part out"
            )
        start = stop + 1
    return rising


def _close_ends(quantile: np.ndarray, logsnr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replaces infinite levels at the ends by one octave beyond the outermost finite one."""
    finite = np.flatnonzero(np.isfinite(logsnr))
    first, last = finite[0], finite[-1]
    inner, level = quantile[first : last + 1], logsnr[first : last + 1]
    if first > 0:
        octave = level[np.searchsorted(inner, 2 * inner[0])] - level[0]
        inner, level = np.append(0.0, inner), np.append(level[0] - octave, level)
    if last < len(logsnr) - 1:
        octave = level[-1] - level[np.searchsorted(inner, 1 - 2 * (1 - inner[-1]))]
        inner, level = np.append(inner, 1.0), np.append(level, level[-1] + octave)
    return inner, level


def _merge(quantile: np.ndarray, logsnr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drops edges that float32 could not tell apart: cells keep at least 64 units of rounding."""
    width = 64 * np.finfo(np.float32).eps * np.maximum(1, np.abs(logsnr))
    kept = [0]
    for index in range(1, len(logsnr)):
        if logsnr[index] - logsnr[kept[-1]] >= width[index]:
            kept.append(index)
    if len(kept) > 1:
        kept[-1] = len(logsnr) - 1
    return quantile[kept], logsnr[kept]


def linear() -> MaskedSchedule:
    """m = t, a uniform masking rate. Weight 1/t."""
    return Clipped(0.0, 0.0)


def loglinear(eps: ArrayLike = 1e-3) -> MaskedSchedule:
    """m = (1 - eps) t: linear, stopping short of rate 1. SEDD, RADD, MDLM, BD3-LM and Duo.

    Raises:
        ValueError: unless 0 <= eps < 1.
    """
    eps = as_parameter(eps, "eps")
    if is_concrete(eps) and not 0 <= eps < 1:
        raise ValueError(f"loglinear needs 0 <= eps < 1, got {eps}")
    return Clipped(0.0, eps)


def clipped(low: ArrayLike, high: ArrayLike) -> MaskedSchedule:
    """m uniform on [low, high]. BD3-LM's clipped rates; (eps, 1) is that of LLaDA and SMDM.

    The weight (high - low)/m estimates the integral over [low, high]; public code that uses 1/m
    estimates the average instead.

    Raises:
        ValueError: unless 0 <= low < high <= 1.
    """
    low, high = _rates("clipped", low, high)
    return Clipped(low, 1 - high)


def cosine_md4() -> MaskedSchedule:
    """m = sin(pi t / 2), survival 1 - cos(pi (1 - t) / 2). "cosine" in MD4, dllm and Duo.

    Weight (pi/2) cot(pi t / 2). Mirror image of :func:`cosine_mdlm` in time and sign of the logSNR.
    """
    return CosineMD4()


def cosine_mdlm() -> MaskedSchedule:
    """m = 1 - cos(pi t / 2). "cosine" in MDLM and BD3-LM. Weight (pi/2) cot(pi t / 4)."""
    return CosineMDLM()


def cosine_squared() -> MaskedSchedule:
    """m = sin(pi t / 2)^2, symmetric; density sech(logsnr / 2) / (2 pi). Weight pi cot(pi t / 2).

    The same law of the logSNR as the variance-preserving Gaussian cosine schedule.
    """
    return CosineSquared()


def power(exponent: ArrayLike) -> MaskedSchedule:
    """m = t^exponent. Weight exponent/t. An exponent above 1 visits small rates more often.

    Raises:
        ValueError: unless the exponent is positive and finite.
    """
    exponent = as_parameter(exponent, "exponent")
    check_finite("power", exponent=exponent)
    if is_concrete(exponent) and not exponent > 0:
        raise ValueError(f"power needs exponent > 0, got {exponent}")
    return Power(exponent)


def sqrt() -> MaskedSchedule:
    """m = t^(1/2). Weight 1/(2t)."""
    return Power(0.5)


def log() -> MaskedSchedule:
    """m = log2(1 + t). Weight 1/((1 + t) ln(1 + t))."""
    return Log()


def geometric(sigma_min: ArrayLike, sigma_max: ArrayLike) -> MaskedSchedule:
    """m = 1 - exp(-sigma), log sigma linear in t from sigma_min to sigma_max. SEDD, MDLM.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max, both finite.
    """
    low, high = as_parameter(sigma_min, "sigma_min"), as_parameter(sigma_max, "sigma_max")
    check_finite("geometric", sigma_min=low, sigma_max=high)
    if is_concrete(low, high) and not 0 < low < high:
        raise ValueError(f"geometric needs 0 < sigma_min < sigma_max, got {low}, {high}")
    return Geometric(low, high)


def linear_sigma(sigma_min: ArrayLike, sigma_max: ArrayLike) -> MaskedSchedule:
    """m = 1 - exp(-sigma), sigma linear in t from sigma_min to sigma_max. MDLM's "linear".

    Raises:
        ValueError: unless 0 <= sigma_min < sigma_max, both finite.
    """
    low, high = as_parameter(sigma_min, "sigma_min"), as_parameter(sigma_max, "sigma_max")
    check_finite("linear_sigma", sigma_min=low, sigma_max=high)
    if is_concrete(low, high) and not 0 <= low < high:
        raise ValueError(f"linear_sigma needs 0 <= sigma_min < sigma_max, got {low}, {high}")
    return LinearSigma(low, high)


def log_uniform(low: ArrayLike, high: ArrayLike) -> MaskedSchedule:
    """log m uniform between log low and log high. Weight ln(high/low) for every t.

    So an unweighted sum of masked cross-entropies is the bound, up to that constant; MDLM's
    "importance sampling" option.

    Raises:
        ValueError: unless 0 < low < high <= 1.
    """
    low, high = _rates("log_uniform", low, high)
    if is_concrete(low) and not low > 0:
        raise ValueError(f"log_uniform needs low > 0, got {low}")
    return LogUniform(low, high)


def uniform_logsnr(low: ArrayLike, high: ArrayLike) -> MaskedSchedule:
    """logSNR uniform on [low, high]. Weight (high - low) (1 - m).

    Raises:
        ValueError: unless low < high, both finite.
    """
    low, high = as_parameter(low, "low"), as_parameter(high, "high")
    check_finite("uniform_logsnr", low=low, high=high)
    check_interval("uniform_logsnr", low, high)
    return UniformLogsnr(low, high)


MASKED_SCHEDULES: dict[str, Callable[..., MaskedSchedule]] = {
    "linear": linear,
    "loglinear": loglinear,
    "clipped": clipped,
    "cosine_md4": cosine_md4,
    "cosine_mdlm": cosine_mdlm,
    "cosine_squared": cosine_squared,
    "power": power,
    "sqrt": sqrt,
    "log": log,
    "geometric": geometric,
    "linear_sigma": linear_sigma,
    "log_uniform": log_uniform,
    "uniform_logsnr": uniform_logsnr,
}
"""Name -> factory, for configurations."""


def by_name(name: str, **parameters: ArrayLike) -> MaskedSchedule:
    """The schedule of that name; ``parameters`` are those of its factory.

    Raises:
        ValueError: for an unknown name, with the nearest known ones, or the place of the Gaussian
            schedule that has it.
        TypeError: for a parameter the factory does not have.
    """
    if name not in MASKED_SCHEDULES:
        raise unknown_name(name, MASKED_SCHEDULES, "masked schedule")
    return MASKED_SCHEDULES[name](**parameters)


def _rates(name: str, low: ArrayLike, high: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
    low, high = as_parameter(low, "low"), as_parameter(high, "high")
    if is_concrete(low, high) and not 0 <= low < high <= 1:
        raise ValueError(f"{name} needs masking rates 0 <= low < high <= 1, got {low}, {high}")
    return low, high
