"""Laws moved along the logSNR: the adjustment of a schedule to the size of the data.

More pixels of a smooth image hide more noise, so the same picture quality needs a lower logSNR.
Simple diffusion (Hoogeboom et al. 2023) shifts by ``2 log(reference / size)``, SD3's timestep
shift and a rescaled input are the same operation.

Non-uniform draws of a schedule's time: fixed densities of t, as laws of the logSNR.

The papers keep the weight of the loss as it was, so they change the objective along with the law;
pair these laws with a weighting accordingly.

Zero terminal SNR: a law whose noisy end is stretched to pure noise.

A law restricted to an interval of the logSNR.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc, betaln

from mdm_jax.checks import as_parameter, check_finite, check_interval, is_concrete
from mdm_jax.gaussian.schedules.curve_law import CurveLaw, bisect_time, instant_of_logit, solve_time
from mdm_jax.gaussian.schedules.laws import Cosine
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.coordinates import as_float
from mdm_jax.schedules.laws import Tails, TwoSidedLaw, confine, inside
from mdm_jax.schedules.masked import Instant
from mdm_jax.types import Array, ArrayLike


@pytree_dataclass
class Shifted(TwoSidedLaw):
    """``base`` with ``shift`` added to every level."""

    base: TwoSidedLaw
    shift: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        low, high = self.base.support
        return low + self.shift, high + self.shift

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        return self.base.log_pdf(as_float(logsnr) - self.shift)

    def tails(self, logsnr: ArrayLike) -> Tails:
        return self.base.tails(as_float(logsnr) - self.shift)

    def quantile(self, below: Array, above: Array) -> Array:
        return self.base.quantile(below, above) + self.shift


@pytree_dataclass
class Interpolated(CurveLaw):
    """``base`` with a shift that runs linearly in time between two values."""

    base: TwoSidedLaw
    clean_shift: ArrayLike
    noisy_shift: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        low, high = self.base.support
        return low + self.noisy_shift, high + self.clean_shift

    def logsnr_formula(self, at: Instant) -> Array:
        shift = self.clean_shift * at.rest + self.noisy_shift * at.t
        return self.base.quantile(at.rest, at.t) + shift

    def time_formula(self, logsnr: Array) -> Instant:
        return solve_time(self.logsnr_formula, logsnr)

    def log_pdf_formula(self, logsnr: Array) -> Array:
        at = self.time_formula(logsnr)
        log_density = self.base.log_pdf(self.base.quantile(at.rest, at.t))
        slope = (self.clean_shift - self.noisy_shift) * jnp.exp(log_density)
        return log_density - jnp.log1p(slope)


def shifted(base: TwoSidedLaw, shift: ArrayLike) -> Shifted:
    """``base`` with every level moved by ``shift``; negative towards noise.

    Raises:
        TypeError: if ``base`` is not a law with tail probabilities.
        ValueError: if the shift is not finite.
    """
    check_law("shifted", base)
    shift = as_parameter(shift, "shift")
    check_finite("shifted", shift=shift)
    return Shifted(base, shift)


def interpolated(base: TwoSidedLaw, clean_shift: ArrayLike, noisy_shift: ArrayLike) -> Interpolated:
    """``base`` shifted by ``clean_shift`` at t = 0, by ``noisy_shift`` at t = 1, linear in between.

    Raises:
        TypeError: if ``base`` is not a law with tail probabilities.
        ValueError: unless noisy_shift <= clean_shift, both finite, which keeps the curve falling.
    """
    check_law("interpolated", base)
    clean = as_parameter(clean_shift, "clean_shift")
    noisy = as_parameter(noisy_shift, "noisy_shift")
    check_finite("interpolated", clean_shift=clean, noisy_shift=noisy)
    if is_concrete(clean, noisy) and not noisy <= clean:
        raise ValueError(
            f"interpolated needs noisy_shift <= clean_shift, got {noisy} and {clean}; "
            "otherwise the logSNR may rise along time"
        )
    return Interpolated(base, clean, noisy)


def resolution_shift(size: float, reference: float) -> float:
    """2 log(reference / size), the shift for images of side ``size``; doubling costs log 4.

    Raises:
        ValueError: unless both are positive.
    """
    if not (size > 0 and reference > 0):
        raise ValueError(f"resolution_shift needs positive sides, got {size} and {reference}")
    return float(2 * np.log(reference / size))


def cosine_shifted(size: float, reference: float = 64) -> Shifted:
    """The cosine schedule shifted for images of side ``size``. Simple diffusion."""
    return shifted(Cosine(), resolution_shift(size, reference))


def cosine_interpolated(
    size: float, noisy_reference: float = 32, clean_reference: float = 256
) -> Interpolated:
    """The cosine schedule with a shift that runs from one reference size to another.

    Simple diffusion's "interpolated" schedule. The paper truncates the *base* to [-15, 15]:
    ``interpolated(truncated(cosine(), -15, 15), ...)`` with :func:`resolution_shift`.

    Raises:
        ValueError: unless all are positive and noisy_reference <= clean_reference.
    """
    clean = resolution_shift(size, clean_reference)
    return interpolated(Cosine(), clean, resolution_shift(size, noisy_reference))


def check_law(name: str, base: TwoSidedLaw) -> None:
    """Raises TypeError unless ``base`` gives tail probabilities."""
    if not isinstance(base, TwoSidedLaw):
        raise TypeError(
            f"{name} needs a law with tails and quantile, got {type(base).__name__}; "
            "derive the class from schedules.TwoSidedLaw"
        )


@pytree_dataclass
class BetaTime(CurveLaw):
    """Time of ``base`` drawn from Beta(alpha, beta)."""

    base: TwoSidedLaw
    alpha: ArrayLike
    beta: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return self.base.support

    def logsnr_formula(self, at: Instant) -> Array:
        time, rest = self._base_time(at)
        return self.base.quantile(rest, time)

    def time_formula(self, logsnr: Array) -> Instant:
        rest, time = self.base.tails(logsnr)
        before = betainc(self.alpha, self.beta, time)
        after = betainc(self.beta, self.alpha, rest)
        # The larger one from the smaller: an infinite density at an end magnifies rounding.
        early = before < after
        return Instant(jnp.where(early, before, 1 - after), jnp.where(early, 1 - before, after))

    def log_pdf_formula(self, logsnr: Array) -> Array:
        rest, time = self.base.tails(logsnr)
        log_density = (self.alpha - 1) * jnp.log(time) + (self.beta - 1) * jnp.log(rest)
        return self.base.log_pdf(logsnr) + log_density - betaln(self.alpha, self.beta)

    def _base_time(self, at: Instant) -> Instant:
        """Inverse of the incomplete beta function: bisection, then a Newton step."""
        low = at.t < 0.5

        def missing(instant: Instant) -> Array:
            early = at.t - betainc(self.alpha, self.beta, instant.t)
            late = betainc(self.beta, self.alpha, instant.rest) - at.rest
            return jnp.where(low, early, late)

        logit = bisect_time(lambda instant: jax.lax.stop_gradient(missing(instant)) > 0, at.t)
        found = instant_of_logit(logit)
        log_slope = self.alpha * jnp.log(found.t) + self.beta * jnp.log(found.rest)
        slope = jnp.exp(log_slope - betaln(self.alpha, self.beta))
        return instant_of_logit(logit + missing(found) / slope)


@pytree_dataclass
class TwoRates(CurveLaw):
    """Time of ``base`` drawn with one density before ``boundary`` and a lower one after it."""

    base: TwoSidedLaw
    boundary: ArrayLike
    ratio: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return self.base.support

    def logsnr_formula(self, at: Instant) -> Array:
        early = at.t < self.boundary * self._density()
        before = at.t / self._density()
        after = at.rest / self._density() * self.ratio
        return self.base.quantile(
            jnp.where(early, 1 - before, after), jnp.where(early, before, 1 - after)
        )

    def time_formula(self, logsnr: Array) -> Instant:
        rest, time = self.base.tails(logsnr)
        early = time < self.boundary
        before = time * self._density()
        after = rest * self._density() / self.ratio
        return Instant(jnp.where(early, before, 1 - after), jnp.where(early, 1 - before, after))

    def log_pdf_formula(self, logsnr: Array) -> Array:
        early = self.base.tails(logsnr).above < self.boundary
        log_density = jnp.log(self._density())
        change = jnp.where(early, log_density, log_density - jnp.log(self.ratio))
        return self.base.log_pdf(logsnr) + change.astype(logsnr.dtype)

    def _density(self) -> ArrayLike:
        """Density of the time before the boundary."""
        return 1 / (self.boundary + (1 - self.boundary) / self.ratio)


def beta_time(base: TwoSidedLaw, alpha: ArrayLike, beta: ArrayLike) -> BetaTime:
    """``base`` with its time drawn from Beta(alpha, beta); (1, 1) is ``base`` itself.

    Beta-tuned timesteps (Zheng et al. 2024): a small alpha favours the clean end, where the
    distribution changes fastest. The inverse is found by bisection. In float32 its probabilities
    are exact to 1e-6, as JAX's incomplete beta function is.

    Raises:
        TypeError: if ``base`` is not a law with tail probabilities.
        ValueError: unless alpha and beta are positive and finite.
    """
    check_law("beta_time", base)
    alpha, beta = as_parameter(alpha, "alpha"), as_parameter(beta, "beta")
    check_finite("beta_time", alpha=alpha, beta=beta)
    if is_concrete(alpha, beta) and not (alpha > 0 and beta > 0):
        raise ValueError(f"beta_time needs alpha > 0 and beta > 0, got {alpha}, {beta}")
    return BetaTime(base, alpha, beta)


def two_rates(base: TwoSidedLaw, boundary: ArrayLike, ratio: ArrayLike = 5.0) -> TwoRates:
    """``base`` with times before ``boundary`` drawn ``ratio`` times as often as those after it.

    SpeeD's asymmetric sampling (Wang et al. 2024) with a boundary of one's choice.

    Raises:
        TypeError: if ``base`` is not a law with tail probabilities.
        ValueError: unless 0 < boundary < 1 and ratio is positive and finite.
    """
    check_law("two_rates", base)
    boundary, ratio = as_parameter(boundary, "boundary"), as_parameter(ratio, "ratio")
    check_finite("two_rates", ratio=ratio)
    if is_concrete(boundary) and not 0 < boundary < 1:
        raise ValueError(f"two_rates needs a time 0 < boundary < 1, got {boundary}")
    if is_concrete(ratio) and not ratio > 0:
        raise ValueError(f"two_rates needs ratio > 0, got {ratio}")
    return TwoRates(base, boundary, ratio)


def speed(base: TwoSidedLaw, slope: float = 0.1, ratio: float = 5.0) -> TwoRates:
    """SpeeD: rarely draw the times where sigma has stopped growing.

    The boundary is where the slope of the variance-preserving sigma(t) falls below ``slope`` for
    good. The public code compares the step of sigma in a table of 1000 with 1e-4 and draws with
    weights 2.5 and 0.5. Its pairing of times is a coupling and not part of the law.

    Raises:
        TypeError: if ``base`` is not a law with tail probabilities, or is traced.
        ValueError: if the slope does not fall below ``slope`` at the noisy end, or nowhere
            exceeds it.
    """
    check_law("speed", base)
    if not is_concrete(*jax.tree.leaves(base)):
        raise TypeError("speed looks for its boundary outside of jit; pass the law in, built")
    with jax.ensure_compile_time_eval():
        time = np.arange(1, 4096) / 4096
        slow = np.asarray(_sigma_slope(base, time)) < slope
        if not slow[-1] or slow.all():
            raise ValueError(
                f"speed: the slope of sigma must fall from above {slope} to below it at the noisy "
                f"end, but it is {'always below' if slow.all() else 'above it at t = 1'}"
            )
        fast = int(np.flatnonzero(~slow)[-1])
        low, high = time[fast], time[fast + 1]
        for _ in range(30):
            middle = 0.5 * (low + high)
            low, high = (low, middle) if _sigma_slope(base, middle) < slope else (middle, high)
    return two_rates(base, 0.5 * (low + high), ratio)


def _sigma_slope(base: TwoSidedLaw, time: ArrayLike) -> Array:
    """dsigma/dt with sigma^2 = sigmoid(-logsnr)."""
    time = jnp.asarray(time, float)
    level = base.quantile(1 - time, time)
    spread = 0.5 * jax.nn.log_sigmoid(-level) + jax.nn.log_sigmoid(level)
    return 0.5 * jnp.exp(spread - base.log_pdf(level))


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
