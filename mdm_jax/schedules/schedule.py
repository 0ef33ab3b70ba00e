"""Base of masked schedules: masking rates m(t) that rise over t in [0, 1], t = 0 clean."""

import abc
from typing import NamedTuple

import jax.numpy as jnp

from mdm_jax.schedules.coordinates import (
    MaskingLevel,
    as_float,
    level_from_logsnr,
    level_from_masking_rate,
    survival_probability,
)
from mdm_jax.schedules.laws import CurveLaw, Instant
from mdm_jax.types import Array, ArrayLike


class LostSupport(NamedTuple):
    """Masking rates never visited: m(0) at the clean end, 1 - m(1) at the noisy end."""

    clean: Array
    noisy: Array


class MaskedSchedule(CurveLaw):
    """Base of the masked schedules: a :class:`CurveLaw` with a formula for the rate.

    Decorate subclasses with ``pytrees.pytree_dataclass``. ``rest`` is 1 - t, where known exactly.
    ``drawn_to_the_ends``: whether float32 quantiles draw all of the support, up to rounding.
    """

    drawn_to_the_ends = True

    def masking_rate(self, t: ArrayLike, rest: ArrayLike | None = None) -> Array:
        return self.rate_formula(_instant(t, rest))

    def survival_probability(self, t: ArrayLike, rest: ArrayLike | None = None) -> Array:
        """1 - m(t), exact where m(t) is close to 1."""
        return survival_probability(self.logsnr(t, rest))

    def logsnr(self, t: ArrayLike, rest: ArrayLike | None = None) -> Array:
        """log((1 - m) / m) at time t; +inf at rate 0, -inf at rate 1."""
        return self.logsnr_formula(_instant(t, rest))

    def weight(self, t: ArrayLike, rest: ArrayLike | None = None) -> Array:
        """m'(t) / m(t), the factor of the summed masked cross-entropies; infinite at rate 0."""
        level = level_from_logsnr(self.logsnr(t, rest))
        log_weight = -self.log_rate_density(level) - level.log_rate
        return jnp.where(level.logsnr == jnp.inf, jnp.inf, jnp.exp(log_weight))

    def time(self, rate: ArrayLike) -> Array:
        """Time of a masking rate, i.e. its distribution function; 0 or 1 outside [m(0), m(1)]."""
        level = level_from_masking_rate(jnp.clip(as_float(rate), *self.rate_range))
        return jnp.clip(self.time_formula(level).t, 0, 1)

    def log_pdf_rate(self, rate: ArrayLike) -> Array:
        """Log density of the masking rate; -inf outside (m(0), m(1)) and at the rates 0 and 1."""
        rate = as_float(rate)
        low, high = self.rate_range
        slack = 8 * jnp.finfo(rate.dtype).eps
        within = (rate >= low * (1 - slack)) & (rate <= high * (1 + slack))
        within = within & (rate > 0) & (rate < 1)
        safe = level_from_masking_rate(jnp.where(within, rate, 0.5 * (low + high)))
        return jnp.where(within, self.log_rate_density(safe), -jnp.inf)

    @property
    def support(self) -> tuple[Array, Array]:
        return self.logsnr(1.0), self.logsnr(0.0)

    @property
    def rate_range(self) -> tuple[Array, Array]:
        return self.masking_rate(0.0), self.masking_rate(1.0)

    @property
    def lost_support(self) -> LostSupport:
        """Rates never visited. Unless both are 0, estimates lack this part of ``int_0^1 g dm``."""
        return LostSupport(self.masking_rate(0.0), self.survival_probability(1.0))

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return self.log_rate_density(level) + level.log_rate + level.log_survival

    @abc.abstractmethod
    def rate_formula(self, at: Instant) -> Array:
        """m(t)."""

    @abc.abstractmethod
    def log_rate_density(self, level: MaskingLevel) -> Array:
        """-log m'(t) at a level within the support."""


def law_of(schedule: MaskedSchedule) -> MaskedSchedule:
    """The schedule itself, as a law; TypeError for a bare m(t), which goes to ``tabulated``."""
    if not isinstance(schedule, MaskedSchedule):
        raise TypeError(
            f"law_of needs a MaskedSchedule, got {type(schedule).__name__}; "
            "for a function m(t) use schedules.tabulated"
        )
    return schedule


def _instant(t: ArrayLike, rest: ArrayLike | None) -> Instant:
    t = as_float(t)
    return Instant(t, 1 - t if rest is None else as_float(rest))
