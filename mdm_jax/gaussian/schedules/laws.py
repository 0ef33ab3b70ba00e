"""Gaussian schedules of the cosine family.

Four curves are called "cosine" in papers and code. :func:`cosine` is the plain one. Nichol &
Dhariwal shift time by an offset and divide by the value at t = 0 (:func:`cosine_iddpm`); leaving
out the division gives :func:`cosine_offset`, which begins at a finite logSNR. Chen's family with a
start and a power is :func:`cosine_power`.

Gaussian schedules written for variance-preserving diffusion: a rule for alpha or for its decay.

With ``a = sigmoid(logsnr)`` the kept fraction of the power, alpha = sqrt(a) and the time of the
Ornstein-Uhlenbeck process that has decayed this far is ``-log(a) / 2``.

Gaussian schedules written for sigma: the noise-to-signal ratio ``exp(-logsnr / 2)``.

These are the curves of variance-exploding diffusion (EDM and its relatives); as laws of the logSNR
they serve every path.

Gaussian schedules written for the straight path x = (1 - t) data + t noise (rectified flow).

On that path sigma / alpha = t / (1 - t), hence logsnr = 2 log((1 - t) / t). The densities of t
used by Stable Diffusion 3 (Esser et al. 2024) become laws of the logSNR.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

from mdm_jax.checks import as_parameter, check_finite, check_interval, is_concrete
from mdm_jax.gaussian.schedules.curve_law import CurveLaw, solve_time
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import (
    as_float,
    log_survival_probability,
    logsnr_from_log_survival_probability,
)
from mdm_jax.schedules.laws import Logistic, Tails, TwoSidedLaw, Uniform, uniform
from mdm_jax.schedules.masked import Instant
from mdm_jax.types import Array, ArrayLike

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


@pytree_dataclass
class Normal(TwoSidedLaw):
    """Normal law of the logSNR."""

    loc: ArrayLike
    scale: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, jnp.inf

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        z = (as_float(logsnr) - self.loc) / self.scale
        normaliser = jnp.log(self.scale) + 0.5 * jnp.log(2 * jnp.pi)
        return -0.5 * jnp.square(z) - normaliser.astype(z.dtype)

    def tails(self, logsnr: ArrayLike) -> Tails:
        z = (as_float(logsnr) - self.loc) / self.scale
        return Tails(ndtr(z), ndtr(-z))

    def quantile(self, below: Array, above: Array) -> Array:
        # Each half from its own small probability.
        low = below < 0.5
        z = ndtri(jnp.where(low, below, above))
        return self.loc + self.scale * jnp.where(low, z, -z)


@pytree_dataclass
class PowerSigma(CurveLaw):
    """sigma = (sigma_min^(1/rho) (1 - t) + sigma_max^(1/rho) t)^rho."""

    sigma_min: ArrayLike
    sigma_max: ArrayLike
    rho: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -2 * jnp.log(self.sigma_max), -2 * jnp.log(self.sigma_min)

    def logsnr_formula(self, at: Instant) -> Array:
        low, high = self._roots()
        return -2 * self.rho * jnp.log(low * at.rest + high * at.t)

    def time_formula(self, logsnr: Array) -> Instant:
        low, high = self._roots()
        root = jnp.exp(-0.5 * logsnr / self.rho)
        return Instant((root - low) / (high - low), (high - root) / (high - low))

    def log_pdf_formula(self, logsnr: Array) -> Array:
        low, high = self._roots()
        speed = jnp.log(2 * self.rho * (high - low)).astype(logsnr.dtype)
        return -0.5 * logsnr / self.rho - speed

    def _roots(self) -> tuple[Array, Array]:
        return jnp.power(self.sigma_min, 1 / self.rho), jnp.power(self.sigma_max, 1 / self.rho)


def lognormal(mean: ArrayLike, std: ArrayLike) -> Normal:
    """log sigma ~ N(mean, std^2), so logsnr ~ N(-2 mean, 4 std^2). EDM (Karras et al. 2022).

    Raises:
        ValueError: unless std > 0, both finite.
    """
    mean, std = as_parameter(mean, "mean"), as_parameter(std, "std")
    check_finite("lognormal", mean=mean, std=std)
    if is_concrete(std) and not std > 0:
        raise ValueError(f"lognormal needs std > 0, got {std}")
    return Normal(-2 * mean, 2 * std)


def edm_lognormal() -> Normal:
    """:func:`lognormal` with mean -1.2 and standard deviation 1.2, the training noise of EDM."""
    return lognormal(-1.2, 1.2)


def edm2_lognormal() -> Normal:
    """:func:`lognormal` with mean -0.4 and standard deviation 1, that of EDM2's latent models."""
    return lognormal(-0.4, 1.0)


def edm_sigma(sigma_min: ArrayLike = 0.002, sigma_max: ArrayLike = 80.0) -> PowerSigma:
    """sigma uniform on [sigma_min, sigma_max]: EDM's sigma(t) = t under a uniform time.

    ``edm_sigma(0, 1)`` is logsnr = -2 log t.

    Raises:
        ValueError: unless 0 <= sigma_min < sigma_max, both finite.
    """
    low, high = _sigmas("edm_sigma", sigma_min, sigma_max, least=0.0)
    return PowerSigma(low, high, 1.0)


def edm_rho(
    sigma_min: ArrayLike = 0.002, sigma_max: ArrayLike = 80.0, rho: ArrayLike = 7.0
) -> PowerSigma:
    """sigma^(1/rho) uniform: EDM's step spacing (Karras et al. 2022, eq. 5) as a law.

    Its density is proportional to exp(-logsnr / (2 rho)). The grid of N steps that ends at sigma 0
    is ``spacings.edm``.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and rho > 0, all finite.
    """
    low, high = _sigmas("edm_rho", sigma_min, sigma_max)
    rho = as_parameter(rho, "rho")
    check_finite("edm_rho", rho=rho)
    if is_concrete(rho) and not rho > 0:
        raise ValueError(f"edm_rho needs rho > 0, got {rho}")
    return PowerSigma(low, high, rho)


def ve_geometric(sigma_min: ArrayLike = 0.01, sigma_max: ArrayLike = 50.0) -> Uniform:
    """sigma = sigma_min^(1 - t) sigma_max^t, the VE-SDE of Song et al. (2021): uniform logSNR.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max, both finite.
    """
    low, high = _sigmas("ve_geometric", sigma_min, sigma_max)
    return Uniform(-2 * jnp.log(high), -2 * jnp.log(low))


def uniform_logsnr(low: ArrayLike = -5.0, high: ArrayLike = 13.3) -> Uniform:
    """logsnr = high - (high - low) t. The defaults are VDM's initial gamma, with its sign turned.

    Raises:
        ValueError: unless low < high, both finite.
    """
    return uniform(low, high)


def _sigmas(
    name: str, sigma_min: ArrayLike, sigma_max: ArrayLike, least: float | None = None
) -> tuple[ArrayLike, ArrayLike]:
    low, high = as_parameter(sigma_min, "sigma_min"), as_parameter(sigma_max, "sigma_max")
    check_finite(name, sigma_min=low, sigma_max=high)
    if is_concrete(low, high) and not ((low > 0 or low == least) and low < high):
        sign = "<" if least is None else "<="
        raise ValueError(f"{name} needs 0 {sign} sigma_min < sigma_max, got {low}, {high}")
    return low, high


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
