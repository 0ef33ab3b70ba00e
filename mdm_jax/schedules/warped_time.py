"""Non-uniform draws of a schedule's time: fixed densities of t, as laws of the logSNR.

The papers keep the weight of the loss as it was, so they change the objective along with the law;
pair these laws with a weighting accordingly.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc, betaln

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.schedules.curve_law import CurveLaw, bisect_time, instant_of_logit
from mdm_jax.schedules.laws import TwoSidedLaw
from mdm_jax.schedules.masked_schedule import Instant
from mdm_jax.schedules.parameters import as_parameter, check_finite, is_concrete
from mdm_jax.schedules.shifted import check_law
from mdm_jax.typing import Array, ArrayLike


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
