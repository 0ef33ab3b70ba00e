"""Times of a law, t = 0 clean and t = 1 noise, and curves inverted by bisection."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import betainc, betaln

from mdm_jax.schedules.coordinates import as_float
from mdm_jax.schedules.laws import Instant, TwoSidedLaw
from mdm_jax.types import Array, ArrayLike


def logsnr_at(law: TwoSidedLaw, time: ArrayLike, rest: ArrayLike | None = None) -> Array:
    """Level at a time in [0, 1]; near 1 pass ``rest`` = 1 - time (float32 steps there are 6e-8)."""
    time = as_float(time)
    return law.quantile(1 - time if rest is None else as_float(rest), time)


def time_at(law: TwoSidedLaw, logsnr: ArrayLike) -> Array:
    """Time of a level, the probability of a cleaner one; 0 above the support and 1 below it."""
    return law.tails(logsnr).above


def logsnr_rate(law: TwoSidedLaw, logsnr: ArrayLike) -> Array:
    """-dlogsnr/dt where the schedule passes a level, 1 / density; infinite outside the support."""
    return jnp.exp(-law.log_pdf(logsnr))


def bisect_time(too_early: Callable[[Instant], Array], like: Array) -> Array:
    """log(t / (1 - t)), shaped as ``like``, where an elementwise test turns False; no gradient."""
    info = jnp.finfo(like.dtype)
    bound = -math.log(info.tiny) - 4

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = 0.5 * (low + high)
        early = too_early(instant_of_logit(middle))
        return jnp.where(early, middle, low), jnp.where(early, high, middle)

    start = jnp.full_like(like, -bound), jnp.full_like(like, bound)
    low, high = jax.lax.fori_loop(0, info.nmant + 10, halve, start)
    return jax.lax.stop_gradient(0.5 * (low + high))


def solve_time(logsnr_of: Callable[[Instant], Array], logsnr: Array) -> Instant:
    """Time at which a falling curve without closed inverse has the given level.

    Bisection, then a Newton step that carries the gradients of ``logsnr`` and ``logsnr_of``.
    """
    target = jax.lax.stop_gradient(logsnr)
    logit = bisect_time(lambda at: jax.lax.stop_gradient(logsnr_of(at)) > target, target)
    level, derivative = jax.jvp(
        lambda x: logsnr_of(instant_of_logit(x)), (logit,), (jnp.ones_like(logit),)
    )
    divisor = jax.lax.stop_gradient(jnp.where(derivative < 0, derivative, -jnp.inf))
    missing = logsnr - level  # NaN at an infinite level, whose time needs no step
    return instant_of_logit(logit + jnp.where(jnp.isnan(missing), 0.0, missing / divisor))


def beta_time(alpha: ArrayLike, beta: ArrayLike, at: Instant) -> Instant:
    """Probabilities below and above ``at.t`` under Beta(alpha, beta)."""
    before, after = betainc(alpha, beta, at.t), betainc(beta, alpha, at.rest)
    # The larger one from the smaller: an infinite density at an end magnifies rounding.
    early = before < after
    return Instant(jnp.where(early, before, 1 - after), jnp.where(early, 1 - before, after))


def beta_instant(alpha: ArrayLike, beta: ArrayLike, at: Instant) -> Instant:
    """The inverse of :func:`beta_time`: bisection, then a Newton step."""

    def missing(instant: Instant) -> Array:
        early = at.t - betainc(alpha, beta, instant.t)
        late = betainc(beta, alpha, instant.rest) - at.rest
        return jnp.where(at.t < 0.5, early, late)

    logit = bisect_time(lambda instant: jax.lax.stop_gradient(missing(instant)) > 0, at.t)
    near = instant_of_logit(logit)
    log_density = alpha * jnp.log(near.t) + beta * jnp.log(near.rest)
    density = jnp.exp(log_density - betaln(alpha, beta))  # with respect to the logit
    return instant_of_logit(logit + missing(near) / density)


def instant_of_logit(logit: Array) -> Instant:
    return Instant(jax.nn.sigmoid(logit), jax.nn.sigmoid(-logit))
