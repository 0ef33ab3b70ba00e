"""A law read as a schedule: the logSNR as a falling function of a uniform time.

t = 0 is clean and t = 1 noise, so the time of a level is the probability of a cleaner one. These
three work for every law; the loss never needs them.
"""

import jax.numpy as jnp

from mdm_jax.schedules.coordinates import as_float
from mdm_jax.schedules.laws import TwoSidedLaw
from mdm_jax.typing import Array, ArrayLike


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
