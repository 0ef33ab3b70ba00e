"""A law restricted to an interval of the logSNR."""

import jax
import jax.numpy as jnp

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import as_float
from mdm_jax.schedules.laws import Tails, TwoSidedLaw, confine, inside
from mdm_jax.schedules.parameters import as_parameter, check_interval, is_concrete
from mdm_jax.typing import Array, ArrayLike


@pytree_dataclass
class Truncated(TwoSidedLaw):
    """``base`` given that low <= logsnr <= high.

    Training on it estimates the part of the bound that lies within the interval: with masking rates
    m0 to m1 at its ends, ``int_0^m0 g dm + int_m1^1 g dm`` is missing, g being the mean per-row
    loss at a rate. :attr:`lost_mass` is the mass of ``base`` that is never drawn.
    """

    base: TwoSidedLaw
    low: ArrayLike
    high: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        base_low, base_high = self.base.support
        return jnp.maximum(self.low, base_low), jnp.minimum(self.high, base_high)

    @property
    def lost_mass(self) -> Tails:
        """Mass of ``base`` below and above the interval."""
        return Tails(self.base.tails(self.low).below, self.base.tails(self.high).above)

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        logsnr = as_float(logsnr)
        within = inside(logsnr, self.support)
        safe = jnp.where(within, jnp.clip(logsnr, *self.support), _interior(self.support))
        log_density = self.base.log_pdf(safe) - jnp.log(self._mass()).astype(safe.dtype)
        return jnp.where(within, log_density, -jnp.inf)

    def tails(self, logsnr: ArrayLike) -> Tails:
        logsnr = jnp.clip(as_float(logsnr), *self.support)
        return Tails(
            _mass_between(self.base.tails(self.low), self.base.tails(logsnr)) / self._mass(),
            _mass_between(self.base.tails(logsnr), self.base.tails(self.high)) / self._mass(),
        )

    def quantile(self, below: Array, above: Array) -> Array:
        # Mixing the tails of the two ends leaves no difference of nearly equal numbers.
        low, high = self.base.tails(self.low), self.base.tails(self.high)
        level = self.base.quantile(
            low.below * above + high.below * below, low.above * above + high.above * below
        )
        return confine(level, self.support)

    def _mass(self) -> Array:
        return _mass_between(self.base.tails(self.low), self.base.tails(self.high))


def truncated(base: TwoSidedLaw, low: ArrayLike = -jnp.inf, high: ArrayLike = jnp.inf) -> Truncated:
    """``base`` restricted to the logSNR interval [low, high]; either end may be infinite.

    For rates in [m0, m1] the ends are ``logsnr_from_masking_rate(m1)`` and ``(m0)``, in this order.

    Raises:
        TypeError: if ``base`` does not give tail probabilities.
        ValueError: unless low < high and the interval holds some of the mass of ``base``.
    """
    if not isinstance(base, TwoSidedLaw):
        raise TypeError(
            f"truncated needs a law with tails and quantile, got {type(base).__name__}; "
            "derive the class from schedules.TwoSidedLaw"
        )
    low, high = as_parameter(low, "low"), as_parameter(high, "high")
    check_interval("truncated", low, high)
    law = Truncated(base, low, high)
    if is_concrete(*jax.tree.leaves(law)):
        with jax.ensure_compile_time_eval():
            if not law._mass() > 0:
                ends = tuple(float(end) for end in base.support)
                raise ValueError(
                    f"truncated: [{low}, {high}] holds no mass of {base}, whose support is {ends}"
                )
    return law


def _mass_between(low: Tails, high: Tails) -> Array:
    # From whichever side the numbers are small on.
    return jnp.where(low.below < 0.5, high.below - low.below, low.above - high.above)


def _interior(support: tuple[ArrayLike, ArrayLike]) -> Array:
    return jnp.clip(0.0, *support)
