"""Zero terminal SNR: a law whose noisy end is stretched to pure noise."""

import jax
import jax.numpy as jnp

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.curve_law import CurveLaw
from mdm_jax.schedules.laws import TwoSidedLaw
from mdm_jax.schedules.masked_schedule import Instant
from mdm_jax.schedules.parameters import is_concrete
from mdm_jax.schedules.shifted import check_law
from mdm_jax.typing import Array, ArrayLike


@pytree_dataclass
class ZeroTerminal(CurveLaw):
    """alpha' = (alpha - alpha_T) alpha_0 / (alpha_0 - alpha_T), sigma'^2 = 1 - alpha'^2.

    alpha_T and alpha_0 are those of ``base`` at its noisy and its clean end. The formulas work with
    the distance of the base level from its noisy end, which next to it is found from the density:
    the difference of two rounded levels would have no digits left.
    """

    base: TwoSidedLaw

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, self.base.support[1]

    def logsnr_formula(self, at: Instant) -> Array:
        low, _ = self.base.support
        level = self.base.quantile(at.rest, at.t)
        near = at.rest < _narrow(level)
        close = jnp.where(near, at.rest, 0.1)
        # midpoint rule for the integral of dlogsnr/du over [0, rest]
        middle = self.base.quantile(0.5 * close, 1 - 0.5 * close)
        gap = jnp.where(near, close * jnp.exp(-self.base.log_pdf(middle)), level - low)
        return self._logsnr(*self._rescale(level, gap))

    def time_formula(self, logsnr: Array) -> Instant:
        low, _ = self.base.support
        level, gap = self._base_level(logsnr)
        tails = self.base.tails(level)
        near = tails.below < _narrow(level)
        middle = low + 0.5 * jnp.where(near, gap, 0.0)
        below = jnp.where(near, gap * jnp.exp(self.base.log_pdf(middle)), tails.below)
        return Instant(tails.above, below)

    def log_pdf_formula(self, logsnr: Array) -> Array:
        level, _ = self._base_level(logsnr)
        change = _log_slope(logsnr) - _log_slope(level) - jnp.log(self._gain(level))
        return self.base.log_pdf(level) + change

    def _rescale(self, level: Array, gap: Array) -> tuple[Array, Array]:
        """alpha' and 1 - alpha' of a base level that lies ``gap`` above the noisy end."""
        low, high = self._ends(level)
        small = gap < 1
        held = jnp.where(small, gap, 1.0)
        decay = jnp.where(
            small,
            jnp.log1p(jax.nn.sigmoid(-level) * jnp.expm1(held)),
            jax.nn.softplus(-low) - jax.nn.softplus(-level),
        )
        amplitude = self._gain(level) * _amplitude(low) * jnp.expm1(0.5 * decay)
        lost = _lost(high) + self._gain(level) * (_lost(level) - _lost(high))
        return amplitude, lost

    def _base_level(self, logsnr: Array) -> tuple[Array, Array]:
        """The base level that is moved to ``logsnr``, and its distance from the noisy end."""
        low, high = self._ends(logsnr)
        gain = self._gain(logsnr)
        ratio = _amplitude(logsnr) / (gain * _amplitude(low))  # alpha / alpha_T - 1
        lost = _lost(high) + (_lost(logsnr) - _lost(high)) / gain
        level = self._logsnr(_amplitude(low) * (1 + ratio), lost)
        gap = jnp.log1p(ratio * (2 + ratio) / jax.nn.sigmoid(-level))
        return jnp.clip(level, low, high), gap

    def _logsnr(self, amplitude: Array, lost: Array) -> Array:
        return 2 * jnp.log(amplitude) - jnp.log(lost) - jnp.log1p(amplitude)

    def _gain(self, like: Array) -> Array:
        low, high = self._ends(like)
        return _amplitude(high) / (_amplitude(high) - _amplitude(low))

    def _ends(self, like: Array) -> tuple[Array, Array]:
        low, high = self.base.support
        return jnp.asarray(low, like.dtype), jnp.asarray(high, like.dtype)


def zero_terminal(base: TwoSidedLaw) -> ZeroTerminal:
    """``base`` with its variance-preserving alpha rescaled so that t = 1 is pure noise.

    Lin et al. (2024), "Common diffusion noise schedules and sample steps are flawed", in continuous
    time. The clean end of ``base`` keeps its level; to keep the level of some time t_0 > 0 instead,
    truncate the base there. For a discrete table see ``gaussian.zero_terminal_table``.

    Raises:
        TypeError: if ``base`` is not a law with tail probabilities.
        ValueError: if ``base`` already reaches pure noise.
    """
    check_law("zero_terminal", base)
    low = base.support[0]
    if is_concrete(low) and not jnp.isfinite(low):
        raise ValueError(
            f"zero_terminal: {type(base).__name__} reaches logSNR -inf by itself; "
            "it needs a law that stops at a finite level"
        )
    return ZeroTerminal(base)


def _narrow(like: Array) -> float:
    """Tail probability below which a midpoint rule beats a difference of rounded levels."""
    return float(jnp.finfo(like.dtype).eps) ** (1 / 3)


def _amplitude(logsnr: Array) -> Array:
    return jnp.exp(0.5 * jax.nn.log_sigmoid(logsnr))


def _lost(logsnr: Array) -> Array:
    """1 - alpha."""
    return jax.nn.sigmoid(-logsnr) / (1 + _amplitude(logsnr))


def _log_slope(logsnr: Array) -> Array:
    """log dalpha/dlogsnr."""
    log_survival, log_noise = jax.nn.log_sigmoid(logsnr), jax.nn.log_sigmoid(-logsnr)
    return 0.5 * log_survival + log_noise - jnp.log(2.0)
