"""Losses of the adaptive mechanisms' tests, and ways to feed them in.

The Gaussian toy is N(0.3, 0.5^2) with its ideal denoiser: the mean error of eps is
``sigmoid(lambda + 2 log 0.5)`` per element and its mean square three times the square of that.
"""

import jax
import numpy as np
import zoo

from mdm_jax import schedules
from mdm_jax.draws import Draw, DrawSpec, LossStats

SHIFT = 2 * np.log(0.5)
LAW = schedules.uniform(-10.0, 10.0)
FINE = (np.arange(20_000) + 0.5) / 20_000


def one_batch(u, raw, eligible=1.0, targets=None):
    """Draw and statistics with the given levels and losses [V, B] or [V, B, S]."""
    u, raw = (np.asarray(a, np.float32) for a in (u, raw))
    u, raw = (a[..., None] if a.ndim == 2 else a for a in (u, raw))
    draw = Draw(u, np.zeros_like(u), np.full((*u.shape[:2], 1), 0.5, np.float32))
    eligible = np.full_like(u, eligible)
    targets = eligible if targets is None else np.asarray(targets, np.float32).reshape(u.shape)
    return draw, LossStats(raw, np.ones_like(u), eligible, targets, gradient_norms=np.square(raw))


def fresh(transform, levels=1):
    return transform.init(DrawSpec(1, levels, (1,)))


def learn(transform, batch, levels=1):
    """State after one batch."""
    return zoo.quick(transform.update)(fresh(transform, levels), *batch)


def density(transform, state, u):
    """Density of the levels at quantiles [N]; of level 0 where there are several."""
    u = np.asarray(u, np.float32)[:, None]
    found = zoo.quick(transform.profile)(state, u).log_density
    return np.exp(np.asarray(found, np.float64)[:, 0])


def logsnr_of(u):
    return 20.0 * u - 10.0


def eps_error(u):
    return jax.nn.sigmoid(logsnr_of(u) + SHIFT)


def x0_error(u):
    return 0.25 * jax.nn.sigmoid(-logsnr_of(u) - SHIFT)
