"""Laws given by a curve logsnr(t), t ~ U(0, 1): what the Gaussian schedules are made of.

Time t runs from 0, clean, to 1, and the logSNR falls along it. With t uniform the probability of a
cleaner level is t itself, so a schedule needs no class of its own: it is a law whose ``above`` is
the time and whose ``below`` is 1 - t.

A law read as a schedule: the logSNR as a falling function of a uniform time.

t = 0 is clean and t = 1 noise, so the time of a level is the probability of a cleaner one. These
three work for every law; the loss never needs them.
"""

import abc
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdm_jax.schedules.coordinates import as_float
from mdm_jax.schedules.laws import Tails, TwoSidedLaw, confine, inside
from mdm_jax.schedules.masked import Instant
from mdm_jax.types import Array, ArrayLike


class CurveLaw(TwoSidedLaw, abc.ABC):
    """Base of laws written as a curve. A subclass gives three formulas, and ``support`` if bounded.

    The formulas receive t together with 1 - t and return both, so that each can be written without
    a difference of nearly equal numbers. Levels that reach them lie within the support.
    """

    @property
    def support(self) -> tuple[ArrayLike, ArrayLike]:
        return -jnp.inf, jnp.inf

    def log_pdf(self, logsnr: ArrayLike) -> Array:
        logsnr = as_float(logsnr)
        within = inside(logsnr, self.support)
        safe = jnp.where(within, jnp.clip(logsnr, *self.support), jnp.clip(0.0, *self.support))
        log_density = self.log_pdf_formula(safe.astype(logsnr.dtype))
        return jnp.where(within, log_density, -jnp.inf)

    def tails(self, logsnr: ArrayLike) -> Tails:
        time, rest = self.time_formula(jnp.clip(as_float(logsnr), *self.support))
        return Tails(below=jnp.clip(rest, 0, 1), above=jnp.clip(time, 0, 1))

    def quantile(self, below: Array, above: Array) -> Array:
        return confine(self.logsnr_formula(Instant(t=above, rest=below)), self.support)

    @abc.abstractmethod
    def logsnr_formula(self, at: Instant) -> Array:
        """The level at a time."""

    @abc.abstractmethod
    def time_formula(self, logsnr: Array) -> Instant:
        """The time of a level."""

    @abc.abstractmethod
    def log_pdf_formula(self, logsnr: Array) -> Array:
        """-log |dlogsnr/dt| at a level."""


def bisect_time(too_early: Callable[[Instant], Array], like: Array) -> Array:
    """log(t / (1 - t)) at which a monotone test of the time turns from True to False.

    Bisection runs in this coordinate because it resolves both ends. No gradient passes.

    Args:
        too_early: elementwise test of times of the shape of ``like``.
        like: array that sets shape and precision.
    """
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
    """The time at which a falling curve without closed inverse has the given level.

    Bisection, then one Newton step, which also carries the gradient with respect to the level and
    to whatever else ``logsnr_of`` depends on. Times beyond the smallest normal number are cut off.
    """
    target = jax.lax.stop_gradient(logsnr)
    logit = bisect_time(lambda at: jax.lax.stop_gradient(logsnr_of(at)) > target, target)
    level, slope = jax.jvp(
        lambda x: logsnr_of(instant_of_logit(x)), (logit,), (jnp.ones_like(logit),)
    )
    step = (logsnr - level) / jax.lax.stop_gradient(jnp.where(slope < 0, slope, -jnp.inf))
    return instant_of_logit(logit + step)


def instant_of_logit(logit: Array) -> Instant:
    """The time whose log-odds are given."""
    return Instant(jax.nn.sigmoid(logit), jax.nn.sigmoid(-logit))


def logsnr_at(law: TwoSidedLaw, time: ArrayLike, rest: ArrayLike | None = None) -> Array:
    """The level at a time.

    Args:
        law: any law with tail probabilities.
        time: in [0, 1], any shape; 0 is clean. The ends of an unbounded law are infinite.
        rest: 1 - time, where the caller knows it more exactly than the difference. In float32 the
            noisy end needs it: next to 1 times are spaced by 6e-8.
    """
    time = as_float(time)
    return law.quantile(1 - time if rest is None else as_float(rest), time)


def time_at(law: TwoSidedLaw, logsnr: ArrayLike) -> Array:
    """The time of a level; 0 above the support and 1 below it."""
    return law.tails(logsnr).above


def logsnr_rate(law: TwoSidedLaw, logsnr: ArrayLike) -> Array:
    """-dlogsnr/dt where the schedule passes a level: 1 / density. Infinite outside the support."""
    return jnp.exp(-law.log_pdf(logsnr))
