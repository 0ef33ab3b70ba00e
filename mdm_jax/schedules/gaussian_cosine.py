"""Gaussian schedules of the cosine family.

Four curves are called "cosine" in papers and code. :func:`cosine` is the plain one. Nichol &
Dhariwal shift time by an offset and divide by the value at t = 0 (:func:`cosine_iddpm`); leaving
out the division gives :func:`cosine_offset`, which begins at a finite logSNR. Chen's family with a
start and a power is :func:`cosine_power`.
"""

import jax
import jax.numpy as jnp

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import logsnr_from_log_survival_probability
from mdm_jax.schedules.curve_law import CurveLaw
from mdm_jax.schedules.masked_schedule import Instant
from mdm_jax.schedules.parameters import as_parameter, check_finite, is_concrete
from mdm_jax.typing import Array, ArrayLike

_HALF_PI = jnp.pi / 2


@pytree_dataclass
class Cosine(CurveLaw):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2); density sech(logsnr / 2) / (2 pi)."""

    def logsnr_formula(self, at: Instant) -> Array:
        return 2 * (jnp.log(jnp.sin(_HALF_PI * at.rest)) - jnp.log(jnp.sin(_HALF_PI * at.t)))

    def time_formula(self, logsnr: Array) -> Instant:
        return Instant(
            jnp.arctan(jnp.exp(-0.5 * logsnr)) / _HALF_PI,
            jnp.arctan(jnp.exp(0.5 * logsnr)) / _HALF_PI,
        )

    def log_pdf_formula(self, logsnr: Array) -> Array:
        return _log_cosine_density(logsnr)


@pytree_dataclass
class CosineOffset(CurveLaw):
    """tan(theta) = exp(-logsnr / 2) with theta linear from offset * speed to pi/2."""

    offset: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, -2 * jnp.log(jnp.tan(self.offset * self._speed()))

    def logsnr_formula(self, at: Instant) -> Array:
        sine = jnp.sin(self._speed() * (at.t + self.offset))
        return 2 * (jnp.log(jnp.sin(self._speed() * at.rest)) - jnp.log(sine))

    def time_formula(self, logsnr: Array) -> Instant:
        return Instant(
            jnp.arctan(jnp.exp(-0.5 * logsnr)) / self._speed() - self.offset,
            jnp.arctan(jnp.exp(0.5 * logsnr)) / self._speed(),
        )

    def log_pdf_formula(self, logsnr: Array) -> Array:
        return jnp.log1p(self.offset).astype(logsnr.dtype) + _log_cosine_density(logsnr)

    def _speed(self) -> ArrayLike:
        return _HALF_PI / (1 + self.offset)


@pytree_dataclass
class CosinePower(CurveLaw):
    """sigmoid(logsnr) = (cos theta / cos theta_0)^(2 power), theta linear from theta_0 to pi/2.

    ``start`` is theta_0 as a fraction of the right angle.
    """

    start: ArrayLike
    power: ArrayLike

    def logsnr_formula(self, at: Instant) -> Array:
        # Near t = 0 the ratio of cosines from its distance to 1, elsewhere from the other end.
        early = at.t < 0.5
        turn = self._span() * jnp.where(early, at.t, 0.0)
        lost = 2 * jnp.square(jnp.sin(turn / 2)) + jnp.sin(turn) * jnp.tan(_HALF_PI * self.start)
        sine = jnp.sin(self._span() * jnp.where(early, 1.0, at.rest))
        log_ratio = jnp.where(
            early, jnp.log1p(-lost), jnp.log(sine) - jnp.log(jnp.sin(self._span()))
        )
        return logsnr_from_log_survival_probability(2 * self.power * log_ratio)

    def time_formula(self, logsnr: Array) -> Instant:
        sine, cosine, ratio, lost = self._angle(logsnr)
        sine_0, cosine_0 = self._start_angle(logsnr)
        # sin and cos of theta - theta_0, sums of positive terms
        sine_turn = cosine_0 * lost / (sine + ratio * sine_0)
        cosine_turn = cosine * cosine_0 + sine * sine_0
        return Instant(
            jnp.arctan2(sine_turn, cosine_turn) / self._span(),
            jnp.arctan2(cosine, sine) / self._span(),
        )

    def log_pdf_formula(self, logsnr: Array) -> Array:
        sine, cosine, _, _ = self._angle(logsnr)
        log_noise = jax.nn.log_sigmoid(-logsnr)
        slope = 2 * self.power * self._span()
        return log_noise + jnp.log(cosine) - jnp.log(sine) - jnp.log(slope).astype(logsnr.dtype)

    def _angle(self, logsnr: Array) -> tuple[Array, Array, Array, Array]:
        """sin theta, cos theta, r = cos theta / cos theta_0, and 1 - r^2."""
        sine_0, cosine_0 = self._start_angle(logsnr)
        log_survival = jax.nn.log_sigmoid(logsnr)
        ratio = jnp.exp(log_survival / (2 * self.power))
        lost = -jnp.expm1(log_survival / self.power)
        return (
            jnp.sqrt(jnp.square(sine_0) + jnp.square(cosine_0) * lost),
            cosine_0 * ratio,
            ratio,
            lost,
        )

    def _start_angle(self, like: Array) -> tuple[Array, Array]:
        start = jnp.asarray(self.start, like.dtype)
        return jnp.sin(_HALF_PI * start), jnp.sin(_HALF_PI * (1 - start))

    def _span(self) -> ArrayLike:
        return _HALF_PI * (1 - self.start)


def cosine() -> Cosine:
    """logsnr = -2 log tan(pi t / 2): alpha = cos(pi t / 2) on the variance-preserving path.

    The same law as the masked ``cosine_squared``; no masked schedule is called plain "cosine".
    """
    return Cosine()


def cosine_iddpm(offset: ArrayLike = 0.008) -> CosinePower:
    """alpha^2 = f(t) / f(0), f(t) = cos^2((pi/2) (t + offset) / (1 + offset)).

    The continuous form of Nichol & Dhariwal (2021), eq. 17; logsnr(0) = +inf because of the
    division. The table with its clipped betas is ``gaussian.iddpm_discrete``.

    Raises:
        ValueError: unless offset >= 0 and finite.
    """
    offset = _offset("cosine_iddpm", offset, least=0)
    return CosinePower(offset / (1 + offset), 1.0)


def cosine_offset(offset: ArrayLike = 0.008) -> CosineOffset:
    """logsnr = -2 log tan((pi/2) (t + offset) / (1 + offset)), without division by the value at 0.

    Begins at the finite logSNR -2 log tan((pi/2) offset / (1 + offset)), 8.77 for the default. Its
    density is that of :func:`cosine`, cut there.

    Raises:
        ValueError: unless offset > 0 and finite.
    """
    return CosineOffset(_offset("cosine_offset", offset))


def cosine_power(start: ArrayLike = 0.0, power: ArrayLike = 1.0) -> CosinePower:
    """alpha^2 = (cos theta / cos theta_0)^(2 power), theta from theta_0 = (pi/2) start to pi/2.

    The cosine family of Chen (2023), "On the importance of noise scheduling", with end = 1; his tau
    is ``power``. Start 0 and power 1 are :func:`cosine`.

    Raises:
        ValueError: unless 0 <= start < 1, power > 0 and finite.
    """
    start, power = as_parameter(start, "start"), as_parameter(power, "power")
    check_finite("cosine_power", power=power)
    if is_concrete(start) and not 0 <= start < 1:
        raise ValueError(f"cosine_power needs 0 <= start < 1, got {start}")
    if is_concrete(power) and not power > 0:
        raise ValueError(f"cosine_power needs power > 0, got {power}")
    return CosinePower(start, power)


def santos_lin_fisher() -> Cosine:
    """Times placed with density sqrt(Fisher information) along an Ornstein-Uhlenbeck process.

    One observation at OU time tau carries the information SNR about the data, and
    ``int sqrt(SNR) dtau`` is the angle arccos(alpha): uniform in it is exactly :func:`cosine`.
    After Santos & Lin (2023), whose other three placements are ``ou_time``, ``variance_linear`` and
    ``amplitude_linear``.
    """
    return Cosine()


def _log_cosine_density(logsnr: Array) -> Array:
    spread = jax.nn.log_sigmoid(logsnr) + jax.nn.log_sigmoid(-logsnr)
    return 0.5 * spread - jnp.log(jnp.pi).astype(logsnr.dtype)


def _offset(name: str, offset: ArrayLike, least: float | None = None) -> ArrayLike:
    offset = as_parameter(offset, "offset")
    check_finite(name, offset=offset)
    if is_concrete(offset) and not (offset > 0 or offset == least):
        raise ValueError(f"{name} needs offset {'>' if least is None else '>='} 0, got {offset}")
    return offset
