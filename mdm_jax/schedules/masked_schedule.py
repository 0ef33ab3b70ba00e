"""What a masked schedule is, and the law over the logSNR that it induces.

A schedule is a masking rate m(t) that rises over t in [0, 1] (t = 0 clean). With t uniform it is
nothing but a law of the noise level, and the loss weight of its papers is

    weight(t) = m'(t) / m(t) = 1 / (m * density of m),

one over the rate times the sampling density: the bound does not depend on the schedule, only the
variance of its estimate does.
"""

import abc
from typing import NamedTuple

import jax.numpy as jnp

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import (
    MaskingLevel,
    as_float,
    level_from_logsnr,
    level_from_masking_rate,
    survival_probability,
)
from mdm_jax.schedules.laws import Tails, TwoSidedLaw, confine, inside
from mdm_jax.typing import Array, ArrayLike


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
