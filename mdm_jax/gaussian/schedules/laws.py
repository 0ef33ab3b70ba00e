"""Gaussian schedules of the literature, each a law of the logSNR with t ~ U(0, 1), 0 clean.

On the variance-preserving path alpha^2 = sigmoid(logsnr) and Ornstein-Uhlenbeck time is
``-log(alpha^2) / 2``. Variance-exploding curves have sigma = exp(-logsnr / 2), rectified flow
x = (1 - t) data + t noise has logsnr = 2 log((1 - t) / t). As laws all serve every path.
Factories raise ValueError for parameters outside the stated range or not finite.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from mdm_jax.checks import (
    Logsnr,
    Real,
    as_parameter,
    checked,
    log_positive,
    parameters,
)
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import (
    MaskingLevel,
    as_float,
    logsnr_from_log_survival_probability,
)
from mdm_jax.schedules.laws import CurveLaw, Instant, Logistic, Tails, TwoSidedLaw, Uniform, uniform
from mdm_jax.schedules.times import solve_time
from mdm_jax.types import Array, ArrayLike

_HALF_PI = jnp.pi / 2


@pytree_dataclass
class Cosine(CurveLaw):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2); density sech(logsnr / 2) / (2 pi)."""

    def logsnr_formula(self, at: Instant) -> Array:
        return 2 * (jnp.log(jnp.sin(_HALF_PI * at.rest)) - jnp.log(jnp.sin(_HALF_PI * at.t)))

    def time_formula(self, level: MaskingLevel) -> Instant:
        angle, complement = _angles(level.logsnr)
        return Instant(angle / _HALF_PI, complement / _HALF_PI)

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return _log_cosine_density(level)


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

    def time_formula(self, level: MaskingLevel) -> Instant:
        angle, complement = _angles(level.logsnr)
        return Instant(angle / self._speed() - self.offset, complement / self._speed())

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return jnp.log1p(self.offset) + _log_cosine_density(level)

    def _speed(self) -> ArrayLike:
        return _HALF_PI / (1 + self.offset)


@pytree_dataclass
class CosinePower(CurveLaw):
    """The curve of :func:`cosine_power`; ``start`` is theta_0 / (pi/2)."""

    start: ArrayLike
    power: ArrayLike

    def logsnr_formula(self, at: Instant) -> Array:
        # Near t = 0 the ratio of cosines from its distance to 1, elsewhere from the other end.
        early = at.t < 0.5
        angle = self._span() * jnp.where(early, at.t, 0.0)
        lost = 2 * jnp.square(jnp.sin(angle / 2)) + jnp.sin(angle) * jnp.tan(_HALF_PI * self.start)
        log_sine = jnp.log(jnp.sin(self._span() * jnp.where(early, 1.0, at.rest)))
        late_ratio = log_sine - jnp.log(jnp.sin(self._span()))
        log_ratio = jnp.where(early, jnp.log1p(-lost), late_ratio)
        return logsnr_from_log_survival_probability(2 * self.power * log_ratio)

    def time_formula(self, level: MaskingLevel) -> Instant:
        sine, cosine, ratio, lost = self._angle(level)
        sine_0, cosine_0 = self._start_angle(level)
        # sin and cos of theta - theta_0, sums of positive terms
        sine_difference = cosine_0 * lost / (sine + ratio * sine_0)
        cosine_difference = cosine * cosine_0 + sine * sine_0
        time = jnp.arctan2(sine_difference, cosine_difference) / self._span()
        return Instant(time, jnp.arctan2(cosine, sine) / self._span())

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        sine, cosine, _, _ = self._angle(level)
        log_tangent = jnp.log(sine) - jnp.log(cosine)
        return level.log_rate - log_tangent - jnp.log(2 * self.power * self._span())

    def _angle(self, level: MaskingLevel) -> tuple[Array, Array, Array, Array]:
        """sin theta, cos theta, r = cos theta / cos theta_0, and 1 - r^2."""
        sine_0, cosine_0 = self._start_angle(level)
        ratio = jnp.exp(level.log_survival / (2 * self.power))
        lost = -jnp.expm1(level.log_survival / self.power)
        sine = jnp.sqrt(jnp.square(sine_0) + jnp.square(cosine_0) * lost)
        return sine, cosine_0 * ratio, ratio, lost

    def _start_angle(self, level: MaskingLevel) -> tuple[Array, Array]:
        start = jnp.asarray(self.start, level.logsnr.dtype)
        return jnp.sin(_HALF_PI * start), jnp.sin(_HALF_PI * (1 - start))

    def _span(self) -> ArrayLike:
        return _HALF_PI * (1 - self.start)


Mean = Annotated[ArrayLike, Real("[-100, 100]", "log sigma", "centre of the levels")]
Std = Annotated[ArrayLike, Real("(0, 100]", "log sigma", "spread of the levels")]
Sigma = Annotated[ArrayLike, Real("[0, 1e6]", "noise per signal", "an end of the range")]
PositiveSigma = Annotated[ArrayLike, Real("(0, 1e6]", "noise per signal", "an end of the range")]
Beta = Annotated[ArrayLike, Real("(0, 1e4]", "per unit of time", "rate of noise at an end")]


def cosine() -> Cosine:
    """logsnr = -2 log tan(pi t / 2), alpha = cos(pi t / 2); as masked law ``cosine_squared``."""
    return Cosine()


@checked
def cosine_iddpm(
    offset: Annotated[ArrayLike, Real("[0, 10]", "time", "before 0")] = 0.008,
) -> CosinePower:
    """alpha^2 = f(t) / f(0), f(t) = cos^2((pi/2) (t + offset) / (1 + offset)), offset >= 0.

    Nichol & Dhariwal (2021), eq. 17; +inf at t = 0. With clipped betas: :func:`iddpm_discrete`.
    """
    offset = as_parameter(offset, "offset")
    return CosinePower(offset / (1 + offset), 1.0)


@checked
def cosine_offset(
    offset: Annotated[ArrayLike, Real("(0, 10]", "time", "before 0")] = 0.008,
) -> CosineOffset:
    """logsnr = -2 log tan((pi/2) (t + offset) / (1 + offset)), offset > 0: not divided at t = 0.

    The density of :func:`cosine`, cut at its logSNR at t = 0 (8.77 for the default).
    """
    return CosineOffset(as_parameter(offset, "offset"))


@checked
def cosine_power(
    start: Annotated[ArrayLike, Real("[0, 1)", "time", "of the clean end")] = 0.0,
    power: Annotated[ArrayLike, Real("(0, 1e3]", "", "of alpha, tau of the paper")] = 1.0,
) -> CosinePower:
    """alpha^2 = (cos theta / cos theta_0)^(2 power), theta from theta_0 = (pi/2) start to pi/2.

    0 <= start < 1, power > 0. Chen (2023), "On the importance of noise scheduling", with end = 1
    and tau = ``power``. Start 0 and power 1 are :func:`cosine`.
    """
    return CosinePower(as_parameter(start, "start"), as_parameter(power, "power"))


def santos_lin_fisher() -> Cosine:
    """Times of density sqrt(Fisher information) along an Ornstein-Uhlenbeck process: the cosine.

    Santos & Lin (2023): at OU time tau information is SNR; ``int sqrt(SNR) dtau`` = arccos(alpha).
    """
    return Cosine()


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

    def time_formula(self, level: MaskingLevel) -> Instant:
        decay, rate = -level.log_survival, self._rate(level)
        left = 0.5 * (self.beta_start + self.beta_end) - decay
        return Instant(2 * decay / (self.beta_start + rate), 2 * left / (self.beta_end + rate))

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return level.log_rate - jnp.log(self._rate(level))

    def _rate(self, level: MaskingLevel) -> Array:
        """dB/dt at a level."""
        decay = -level.log_survival
        growth = 2 * (self.beta_end - self.beta_start) * decay
        return jnp.sqrt(jnp.square(jnp.asarray(self.beta_start, decay.dtype)) + growth)


@pytree_dataclass
class AmplitudeLinear(CurveLaw):
    def logsnr_formula(self, at: Instant) -> Array:
        return 2 * jnp.log(at.rest) - jnp.log(at.t) - jnp.log(1 + at.rest)

    def time_formula(self, level: MaskingLevel) -> Instant:
        return Instant(amplitude_loss(level), jnp.exp(0.5 * level.log_survival))

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        return log_amplitude_rate(level)


@pytree_dataclass
class Sigmoid(CurveLaw):
    """alpha^2 falls from 1 to 0 like a piece of the logistic curve, from ``low`` to ``high``."""

    low: ArrayLike
    high: ArrayLike

    def logsnr_formula(self, at: Instant) -> Array:
        half = 0.5 * (self.high - self.low)
        return _log_sinh(half * at.rest) - _log_sinh(half * at.t) - self._tilt()

    def time_formula(self, level: MaskingLevel) -> Instant:
        width, log_ratio = self.high - self.low, level.logsnr + self._tilt()
        return Instant(_divide(log_ratio, width) / width, _divide(-log_ratio, width) / width)

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        width = self.high - self.low
        at = self.low + _divide(level.logsnr + self._tilt(), width)
        log_rise = jnp.log(width) + jax.nn.log_sigmoid(at) + jax.nn.log_sigmoid(-at)
        ends = _log_cosh(0.5 * self.high) + _log_cosh(0.5 * self.low) + jnp.log(2.0)
        log_span = _log_sinh(0.5 * width) - ends
        return level.log_survival + level.log_rate + log_span - log_rise

    def _tilt(self) -> Array:
        return _log_cosh(0.5 * self.high) - _log_cosh(0.5 * self.low)


@checked
def ddpm_linear(beta_start: Beta = 0.1, beta_end: Beta = 20.0) -> LinearBeta:
    """alpha^2 = exp(-B), B = beta_start t + (beta_end - beta_start) t^2 / 2; ends at logSNR -10.05.

    0 < beta_start <= beta_end. VP-SDE of Song et al. (2021), the continuous limit of DDPM's linear
    betas (Ho et al. 2020). Discrete: :func:`ddpm_discrete`.
    """
    ends = {"beta_start": beta_start, "beta_end": beta_end}
    rule = "0 < beta_start <= beta_end"
    return LinearBeta(*parameters("ddpm_linear", rule, lambda a, b: 0 < a <= b, **ends))


@checked
def ou_time(
    max_time: Annotated[ArrayLike, Real("(0, 1e3]", "OU time", "of the end")] = 5.025,
) -> LinearBeta:
    """alpha = exp(-max_time t), max_time > 0: uniform Ornstein-Uhlenbeck time; ends as DDPM's."""
    max_time = as_parameter(max_time, "max_time")
    return LinearBeta(2 * max_time, 2 * max_time)


def variance_linear() -> Logistic:
    """alpha^2 = 1 - t, the law of a uniform masking rate. Chen (2023), "gamma(t) = 1 - t"."""
    return Logistic(0.0, 1.0)


def amplitude_linear() -> AmplitudeLinear:
    """alpha = 1 - t, sigma^2 = 1 - alpha^2: uniform in the correlation with the data. Not flow."""
    return AmplitudeLinear()


@checked
def chen_sigmoid(
    start: Annotated[ArrayLike, Real("[-100, 100]", "logits", "of the clean end")] = -3.0,
    end: Annotated[ArrayLike, Real("[-100, 100]", "logits", "of the noisy end")] = 3.0,
    temperature: Annotated[ArrayLike, Real("(0, 1e3]", "logits", "divides both")] = 1.0,
) -> Sigmoid:
    """alpha^2 = (S(end) - S(z)) / (S(end) - S(start)), z from start to end, S(x) = sigmoid(x / T).

    start < end, T > 0. Sigmoid family of Jabri et al. (2022) and Chen (2023).
    """
    low, high = parameters("chen_sigmoid", "start < end", lambda a, b: a < b, start=start, end=end)
    temperature = as_parameter(temperature, "temperature")
    return Sigmoid(low / temperature, high / temperature)


@pytree_dataclass
class Normal(TwoSidedLaw):
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

    def time_formula(self, level: MaskingLevel) -> Instant:
        low, high = self._roots()
        root = jnp.exp(-0.5 * level.logsnr / self.rho)
        return Instant((root - low) / (high - low), (high - root) / (high - low))

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        low, high = self._roots()
        return -0.5 * level.logsnr / self.rho - jnp.log(2 * self.rho * (high - low))

    def _roots(self) -> tuple[Array, Array]:
        return jnp.power(self.sigma_min, 1 / self.rho), jnp.power(self.sigma_max, 1 / self.rho)


@checked
def lognormal(mean: Mean = -1.2, std: Std = 1.2) -> Normal:
    """log sigma ~ N(mean, std^2), so logsnr ~ N(-2 mean, 4 std^2). EDM's by default (2022)."""
    return Normal(-2 * as_parameter(mean, "mean"), 2 * as_parameter(std, "std"))


def edm_lognormal() -> Normal:
    """:func:`lognormal` with mean -1.2 and standard deviation 1.2, the training noise of EDM."""
    return lognormal()


def edm2_lognormal() -> Normal:
    """:func:`lognormal` with mean -0.4 and standard deviation 1, that of EDM2's latent models."""
    return lognormal(-0.4, 1.0)


@checked
def edm_sigma(sigma_min: Sigma = 0.002, sigma_max: Sigma = 80.0) -> PowerSigma:
    """EDM's sigma(t) = t: sigma uniform, 0 <= sigma_min < sigma_max; (0, 1): logsnr = -2 log t."""
    return PowerSigma(*_sigmas("edm_sigma", sigma_min, sigma_max), 1.0)


@checked
def edm_rho(
    sigma_min: PositiveSigma = 0.002,
    sigma_max: PositiveSigma = 80.0,
    rho: Annotated[ArrayLike, Real("(0, 1e3]", "", "large: more steps at small sigma")] = 7.0,
) -> PowerSigma:
    """EDM's spacing (``spacings.edm``) as a law: density ~ exp(-logsnr / (2 rho)), rho > 0."""
    low, high = _sigmas("edm_rho", sigma_min, sigma_max)
    return PowerSigma(low, high, as_parameter(rho, "rho"))


@checked
def ve_geometric(sigma_min: PositiveSigma = 0.01, sigma_max: PositiveSigma = 50.0) -> Uniform:
    """sigma = sigma_min^(1 - t) sigma_max^t, the VE-SDE of Song et al. (2021): uniform logSNR."""
    low, high = _sigmas("ve_geometric", sigma_min, sigma_max)
    logs = (log_positive("ve_geometric", "sigma", sigma) for sigma in (high, low))
    return Uniform(*(-2 * log for log in logs))


@checked
def uniform_logsnr(low: Logsnr = -5.0, high: Logsnr = 13.3) -> Uniform:
    """logsnr = high - (high - low) t. The defaults are VDM's initial gamma, negated."""
    return uniform(low, high)


@pytree_dataclass
class FlowMode(CurveLaw):
    """Flow time q + scale (q - sin^2(pi q / 2)) for a uniform q."""

    scale: ArrayLike

    def logsnr_formula(self, at: Instant) -> Array:
        # The same map gives 1 - flow time from 1 - q.
        return 2 * (jnp.log(self._flow_time(at.rest)) - jnp.log(self._flow_time(at.t)))

    def time_formula(self, level: MaskingLevel) -> Instant:
        return solve_time(self.logsnr_formula, level.logsnr)

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        at = self.time_formula(level)
        # sin(pi q) from the nearer end
        swing = self.scale * _HALF_PI * jnp.sin(jnp.pi * jnp.minimum(at.t, at.rest))
        half = 0.5 * level.logsnr
        log_flow = jax.nn.log_sigmoid(half) + jax.nn.log_sigmoid(-half)
        return log_flow - jnp.log(2 * (1 + self.scale - swing))

    def _flow_time(self, q: Array) -> Array:
        return (1 + self.scale) * q - self.scale * jnp.square(jnp.sin(_HALF_PI * q))


def flow() -> Logistic:
    """Rectified flow, flow matching: logsnr = 2 log((1 - t) / t), Logistic(0, 2)."""
    return Logistic(0.0, 2.0)


def indi() -> Logistic:
    """InDI (Delbracio & Milanfar 2023), x_t = (1 - t) x + t y with noise for y: as :func:`flow`."""
    return flow()


@checked
def flow_shifted(
    ratio: Annotated[ArrayLike, Real("(0, 1e6]", "", "root of the ratio of pixel counts")] = 3.0,
) -> Logistic:
    """SD3's timestep shift of :func:`flow`: time ratio t / (1 + (ratio - 1) t), ratio > 0.

    Moves the logSNR by -2 log ratio, the square root of the ratio of pixel counts.
    """
    return Logistic(-2 * log_positive("flow_shifted", "ratio", ratio), 2.0)


@checked
def sd3_logit_normal(mean: Mean = 0.0, std: Std = 1.0) -> Normal:
    """logit of the flow time ~ N(mean, std^2), the law ``lognormal(mean, std)``. Esser et al. 2024.

    A positive mean favours noise (t = 1); code indexing a descending table flips its sign.
    """
    return lognormal(mean, std)


@checked
def sd3_mode(
    scale: Annotated[ArrayLike, Real("[-1, 1.7519383]", "", "above 0: more middle times")] = 1.29,
) -> FlowMode:
    """Flow time q + scale (q - sin^2(pi q / 2)), q uniform; scale > 0 favours the middle. SD3."""
    return FlowMode(as_parameter(scale, "scale"))


def sd3_cosmap() -> Cosine:
    """Flow time 1 - 1 / (1 + tan(pi q / 2)), q uniform (Esser et al. 2024): the cosine."""
    return Cosine()


def amplitude_loss(level: MaskingLevel) -> Array:
    """1 - alpha."""
    return level.rate / (1 + jnp.exp(0.5 * level.log_survival))


def log_amplitude_rate(level: MaskingLevel) -> Array:
    """log dalpha/dlogsnr."""
    return 0.5 * level.log_survival + level.log_rate - jnp.log(2.0)


def _angles(logsnr: Array) -> tuple[Array, Array]:
    return jnp.arctan(jnp.exp(-0.5 * logsnr)), jnp.arctan(jnp.exp(0.5 * logsnr))


def _log_cosine_density(level: MaskingLevel) -> Array:
    return 0.5 * (level.log_survival + level.log_rate) - jnp.log(jnp.pi)


def _divide(log_ratio: Array, width: ArrayLike) -> Array:
    """x in [0, width] with log(sinh((width - x) / 2) / sinh(x / 2)) = log_ratio."""
    numerator = -jnp.expm1(-jnp.asarray(width, log_ratio.dtype))
    return jnp.log1p(numerator / (jnp.exp(log_ratio - 0.5 * width) + jnp.exp(-width)))


def _log_sinh(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return x + jax.nn.log1mexp(2 * x) - jnp.log(2.0)


def _log_cosh(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    return jnp.logaddexp(x, -x) - jnp.log(2.0)


def _sigmas(name: str, low: ArrayLike, high: ArrayLike) -> tuple[ArrayLike, ArrayLike]:
    ends = {"sigma_min": low, "sigma_max": high}
    return parameters(name, "sigma_min < sigma_max", lambda a, b: a < b, **ends)
