"""Laws made of laws: shifted along the logSNR, truncated, with warped time or zero terminal SNR.

Pair warped times (:func:`beta_time`, :func:`two_rates`) with a weighting: their papers keep the
loss weight, which changes the objective. Factories raise TypeError for a base without tail
probabilities, ValueError for parameters outside the stated range or not finite.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betaln

from mdm_jax.checks import (
    Real,
    as_parameter,
    check_interval,
    checked,
    is_concrete,
    parameters,
)
from mdm_jax.gaussian.schedules.laws import Cosine, amplitude_loss, log_amplitude_rate
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules import times
from mdm_jax.schedules.coordinates import MaskingLevel, as_float, level_from_logsnr
from mdm_jax.schedules.laws import CurveLaw, Instant, Tails, TwoSidedLaw, confine, inside
from mdm_jax.schedules.times import solve_time
from mdm_jax.types import Array, ArrayLike

Shift = Annotated[ArrayLike, Real("[-100, 100]", "logSNR", "added; below 0: towards noise")]
Shape = Annotated[ArrayLike, Real("(0, 1e3]", "", "of the Beta law of times")]
Ratio = Annotated[ArrayLike, Real("(0, 1e6]", "", "how much more often times before are drawn")]


@pytree_dataclass
class Shifted(TwoSidedLaw):
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

    def time_formula(self, level: MaskingLevel) -> Instant:
        return solve_time(self.logsnr_formula, level.logsnr)

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        at = self.time_formula(level)
        log_density = self.base.log_pdf(self.base.quantile(at.rest, at.t))
        return log_density - jnp.log1p((self.clean_shift - self.noisy_shift) * jnp.exp(log_density))


@checked
def shifted(base: TwoSidedLaw, shift: Shift = -1.386) -> Shifted:
    """``base`` with ``shift`` added to every level, by default for sides twice as long."""
    check_law("shifted", base)
    return Shifted(base, as_parameter(shift, "shift"))


@checked
def interpolated(
    base: TwoSidedLaw, clean_shift: Shift = 0.0, noisy_shift: Shift = -1.386
) -> Interpolated:
    """``base`` with a shift linear in t from ``clean_shift`` to ``noisy_shift`` <= clean_shift."""
    check_law("interpolated", base)
    shifts = {"clean_shift": clean_shift, "noisy_shift": noisy_shift}
    rule = "noisy_shift <= clean_shift, otherwise the logSNR may rise along time"
    return Interpolated(base, *parameters("interpolated", rule, lambda a, b: b <= a, **shifts))


Side = Annotated[float, Real("(0, 1e6]", "pixels", "side of a picture")]


@checked
def resolution_shift(size: Side, reference: Side) -> float:
    """2 log(reference / size), the shift of Simple diffusion (Hoogeboom et al. 2023)."""
    return float(2 * np.log(reference / size))


@checked
def cosine_shifted(size: Side = 256, reference: Side = 64) -> Shifted:
    """The cosine schedule shifted for images of side ``size``. Simple diffusion."""
    return shifted(Cosine(), resolution_shift(size, reference))


@checked
def cosine_interpolated(
    size: Side = 512, noisy_reference: Side = 32, clean_reference: Side = 256
) -> Interpolated:
    """Simple diffusion's interpolated cosine: a shift between two reference sizes, noisy < clean.

    The paper truncates the *base*: ``interpolated(truncated(cosine(), -15, 15), ...)``.
    """
    clean = resolution_shift(size, clean_reference)
    return interpolated(Cosine(), clean, resolution_shift(size, noisy_reference))


def check_law(name: str, base: TwoSidedLaw) -> None:
    """Raise TypeError unless ``base`` gives tail probabilities."""
    if not isinstance(base, TwoSidedLaw):
        raise TypeError(
            f"{name} needs a law with tails and quantile, got {type(base).__name__}; "
            "derive the class from schedules.TwoSidedLaw"
        )


class _WarpedTime(CurveLaw):
    """``base`` with another density of its time, on the same support."""

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return self.base.support


@pytree_dataclass
class BetaTime(_WarpedTime):
    base: TwoSidedLaw
    alpha: ArrayLike
    beta: ArrayLike

    def logsnr_formula(self, at: Instant) -> Array:
        time, rest = times.beta_instant(self.alpha, self.beta, at)
        return self.base.quantile(rest, time)

    def time_formula(self, level: MaskingLevel) -> Instant:
        rest, time = self.base.tails(level.logsnr)
        return times.beta_time(self.alpha, self.beta, Instant(time, rest))

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        rest, time = self.base.tails(level.logsnr)
        log_density = (self.alpha - 1) * jnp.log(time) + (self.beta - 1) * jnp.log(rest)
        return self.base.log_pdf(level.logsnr) + log_density - betaln(self.alpha, self.beta)


@pytree_dataclass
class TwoRates(_WarpedTime):
    """Time of ``base`` drawn with one density before ``boundary`` and a lower one after it."""

    base: TwoSidedLaw
    boundary: ArrayLike
    ratio: ArrayLike

    def logsnr_formula(self, at: Instant) -> Array:
        early = at.t < self.boundary * self._density()
        before = at.t / self._density()
        after = at.rest / self._density() * self.ratio
        rest = jnp.where(early, 1 - before, after)
        return self.base.quantile(rest, jnp.where(early, before, 1 - after))

    def time_formula(self, level: MaskingLevel) -> Instant:
        rest, time = self.base.tails(level.logsnr)
        early = time < self.boundary
        before = time * self._density()
        after = rest * self._density() / self.ratio
        return Instant(jnp.where(early, before, 1 - after), jnp.where(early, 1 - before, after))

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        early = self.base.tails(level.logsnr).above < self.boundary
        log_density = jnp.log(self._density())
        change = jnp.where(early, log_density, log_density - jnp.log(self.ratio))
        return self.base.log_pdf(level.logsnr) + change.astype(level.logsnr.dtype)

    def _density(self) -> ArrayLike:
        """Density of the time before the boundary."""
        return 1 / (self.boundary + (1 - self.boundary) / self.ratio)


@checked
def beta_time(base: TwoSidedLaw, alpha: Shape = 0.8, beta: Shape = 1.0) -> BetaTime:
    """``base`` with its time drawn from Beta(alpha, beta), both > 0; (1, 1) is ``base`` itself.

    Beta-tuned timesteps (Zheng et al. 2024); small alpha favours clean; to 1e-6 in float32.
    """
    check_law("beta_time", base)
    return BetaTime(base, as_parameter(alpha, "alpha"), as_parameter(beta, "beta"))


@checked
def two_rates(
    base: TwoSidedLaw,
    boundary: Annotated[ArrayLike, Real("(0, 1)", "time", "end of the favoured times")] = 0.7,
    ratio: Ratio = 5.0,
) -> TwoRates:
    """Draw times below 0 < boundary < 1 ``ratio`` > 0 times as often. SpeeD (Wang et al. 2024)."""
    check_law("two_rates", base)
    return TwoRates(base, as_parameter(boundary, "boundary"), as_parameter(ratio, "ratio"))


@checked
def speed(
    base: TwoSidedLaw,
    slope: Annotated[float, Real("(0, 1e6]", "sigma per time", "at the boundary")] = 0.1,
    ratio: Ratio = 5.0,
) -> TwoRates:
    """SpeeD: rarely draw the times where sigma has stopped growing.

    The boundary is where dsigma/dt on the variance-preserving path falls below ``slope`` for good;
    ValueError if it does not do so at the noisy end, TypeError for a traced base. The public code
    compares steps of sigma in a table of 1000 with 1e-4, with weights 2.5 and 0.5, and pairs times.
    """
    check_law("speed", base)
    if not is_concrete(*jax.tree.leaves(base)):
        raise TypeError("speed looks for its boundary outside of jit; pass the law in, built")
    low, high = 0.0, 1.0
    for refinement in range(3):
        time = np.linspace(low, high, 4097)
        with jax.ensure_compile_time_eval():
            slow = np.asarray(_sigma_slope(base, time[1:-1])) < slope
        if refinement == 0 and (not slow[-1] or slow.all()):
            raise ValueError(
                f"speed: the slope of sigma must fall from above {slope} to below it at the noisy "
                f"end, but it is {'always below' if slow.all() else 'above it at t = 1'}"
            )
        last_fast = int(np.max(np.flatnonzero(~slow), initial=-1)) + 1
        low, high = time[last_fast], time[last_fast + 1]
    return two_rates(base, 0.5 * (low + high), ratio)


def _sigma_slope(base: TwoSidedLaw, time: ArrayLike) -> Array:
    """dsigma/dt with sigma^2 = sigmoid(-logsnr)."""
    time = jnp.asarray(time, float)
    level = level_from_logsnr(base.quantile(1 - time, time))
    return 0.5 * jnp.exp(0.5 * level.log_rate + level.log_survival - base.log_pdf(level.logsnr))


@pytree_dataclass
class ZeroTerminal(CurveLaw):
    """alpha' = (alpha - alpha_T) alpha_0 / (alpha_0 - alpha_T), sigma'^2 = 1 - alpha'^2.

    alpha_T, alpha_0: noisy and clean end of ``base``. Next to alpha_T computed by the density.
    """

    base: TwoSidedLaw

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, self.base.support[1]

    def logsnr_formula(self, at: Instant) -> Array:
        level = self.base.quantile(at.rest, at.t)
        near = at.rest < _narrow(level)
        close = jnp.where(near, at.rest, 0.1)
        # midpoint rule for the integral of dlogsnr/du over [0, rest]
        middle = self.base.quantile(0.5 * close, 1 - 0.5 * close)
        distance = level - self.base.support[0]
        gap = jnp.where(near, close * jnp.exp(-self.base.log_pdf(middle)), distance)
        return _logsnr_of(*self._rescale(level, gap))

    def time_formula(self, level: MaskingLevel) -> Instant:
        base_level, gap = self._base_level(level)
        tails = self.base.tails(base_level)
        near = tails.below < _narrow(base_level)
        middle = self.base.support[0] + 0.5 * jnp.where(near, gap, 0.0)
        below = jnp.where(near, gap * jnp.exp(self.base.log_pdf(middle)), tails.below)
        return Instant(tails.above, below)

    def log_pdf_formula(self, level: MaskingLevel) -> Array:
        logsnr, _ = self._base_level(level)
        stretch = jnp.log(self._gain(logsnr)) + log_amplitude_rate(level_from_logsnr(logsnr))
        return self.base.log_pdf(logsnr) + log_amplitude_rate(level) - stretch

    def _rescale(self, logsnr: Array, gap: Array) -> tuple[Array, Array]:
        """alpha' and 1 - alpha' of a base level that lies ``gap`` above the noisy end."""
        low, high = self._ends(logsnr)
        small = gap < 1
        held = jnp.where(small, gap, 1.0)
        near = jnp.log1p(jax.nn.sigmoid(-logsnr) * jnp.expm1(held))
        decay = jnp.where(small, near, jax.nn.softplus(-low) - jax.nn.softplus(-logsnr))
        amplitude = self._gain(logsnr) * _amplitude(low) * jnp.expm1(0.5 * decay)
        return amplitude, _lost(high) + self._gain(logsnr) * (_lost(logsnr) - _lost(high))

    def _base_level(self, level: MaskingLevel) -> tuple[Array, Array]:
        """The base level that is moved to ``level``, and its distance from the noisy end."""
        low, high = self._ends(level.logsnr)
        gain = self._gain(level.logsnr)
        ratio = _amplitude(level.logsnr) / (gain * _amplitude(low))  # alpha / alpha_T - 1
        lost = _lost(high) + (_lost(level.logsnr) - _lost(high)) / gain
        logsnr = _logsnr_of(_amplitude(low) * (1 + ratio), lost)
        gap = jnp.log1p(ratio * (2 + ratio) / jax.nn.sigmoid(-logsnr))
        return jnp.clip(logsnr, low, high), gap

    def _gain(self, like: Array) -> Array:
        low, high = (_amplitude(end) for end in self._ends(like))
        return high / (high - low)

    def _ends(self, like: Array) -> tuple[Array, Array]:
        low, high = self.base.support
        return jnp.asarray(low, like.dtype), jnp.asarray(high, like.dtype)


def zero_terminal(base: TwoSidedLaw) -> ZeroTerminal:
    """``base`` with its variance-preserving alpha rescaled so that t = 1 is pure noise.

    Lin et al. (2024), "Common diffusion noise schedules and sample steps are flawed", in continuous
    time; the clean end keeps its level. To keep that of a time t_0 > 0 instead, truncate the base
    there. ValueError if ``base`` reaches pure noise. Discrete: :func:`zero_terminal_table`.
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
    return amplitude_loss(level_from_logsnr(logsnr))


def _logsnr_of(amplitude: Array, lost: Array) -> Array:
    return 2 * jnp.log(amplitude) - jnp.log(lost) - jnp.log1p(amplitude)


@pytree_dataclass
class Truncated(TwoSidedLaw):
    """``base`` given that low <= logsnr <= high.

    A bound estimated on it lacks ``int_0^m0 g dm + int_m1^1 g dm``, with [m0, m1] the masking rates
    of the interval and g the mean per-row loss at a rate. :attr:`lost_mass` is the mass left out.
    """

    base: TwoSidedLaw
    low: ArrayLike
    high: ArrayLike

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        base_low, base_high = self.base.support
        return jnp.maximum(self.low, base_low), jnp.minimum(self.high, base_high)

    @property
    def mass(self) -> Array:
        return _mass_between(*self._end_tails())

    @property
    def lost_mass(self) -> Tails:
        """Mass of ``base`` below and above the interval."""
        low, high = self._end_tails()
        return Tails(low.below, high.above)

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        logsnr = as_float(logsnr)
        within = inside(logsnr, self.support)
        middle = jnp.clip(0.0, *self.support)
        safe = jnp.where(within, jnp.clip(logsnr, *self.support), middle)
        log_density = self.base.log_pdf(safe) - jnp.log(self.mass).astype(safe.dtype)
        return jnp.where(within, log_density, -jnp.inf)

    def tails(self, logsnr: ArrayLike) -> Tails:
        low, high = self._end_tails()
        at = self.base.tails(jnp.clip(as_float(logsnr), *self.support))
        return Tails(_mass_between(low, at) / self.mass, _mass_between(at, high) / self.mass)

    def quantile(self, below: Array, above: Array) -> Array:
        # Mixing the tails of the two ends leaves no difference of nearly equal numbers.
        low, high = self._end_tails()
        base_below = low.below * above + high.below * below
        base_above = low.above * above + high.above * below
        return confine(self.base.quantile(base_below, base_above), self.support)

    def _end_tails(self) -> tuple[Tails, Tails]:
        return self.base.tails(self.low), self.base.tails(self.high)


def truncated(base: TwoSidedLaw, low: ArrayLike = -jnp.inf, high: ArrayLike = jnp.inf) -> Truncated:
    """``base`` restricted to the logSNR interval [low, high]; either end may be infinite.

    ValueError unless low < high and the interval holds some of the mass of ``base``.
    """
    check_law("truncated", base)
    low, high = as_parameter(low, "low"), as_parameter(high, "high")
    check_interval("truncated", low, high)
    law = Truncated(base, low, high)
    if is_concrete(*jax.tree.leaves(law)):
        with jax.ensure_compile_time_eval():
            if not law.mass > 0:
                ends = tuple(float(end) for end in base.support)
                raise ValueError(
                    f"truncated: [{low}, {high}] holds no mass of {base}, whose support is {ends}"
                )
    return law


def _mass_between(low: Tails, high: Tails) -> Array:
    # From whichever side the numbers are small on.
    return jnp.where(low.below < 0.5, high.below - low.below, low.above - high.above)
