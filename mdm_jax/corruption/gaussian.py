"""Gaussian corruption: data plus noise, on any path."""

import jax
import jax.numpy as jnp

from mdm_jax.corruption.process import Corrupted, Corruption, spread_levels
from mdm_jax.schedules.paths import Path
from mdm_jax.typing import Array, ArrayLike


def gaussian(path: Path) -> Corruption:
    """``alpha x + sigma eps`` with ``eps`` the normal quantiles of the base noise.

    The base noise is uniform, as for masks, so that every coupling of draws works here too:
    reflecting it turns eps into -eps exactly (:func:`normal_noise`).

    ``corrupt`` takes float data; elements that are not eligible stay clean, carry no loss and see
    no noise. There is no mask token and no weight.

    Args:
        path: such as ``schedules.paths.vp()``.
    """

    def corrupt(
        x: Array,
        logsnr: Array,
        noise: Array,
        eligible: Array,
        level_ids: Array | None = None,
    ) -> Corrupted:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"gaussian corruption needs float data, got {x.dtype}; map tokens to numbers, "
                "for example with objectives.scaled_integers(num_values)"
            )
        length = x.shape[-1]
        alpha = spread_levels(path.alpha(logsnr), length, level_ids)
        sigma = spread_levels(path.sigma(logsnr), length, level_ids)
        noisy = alpha * x + sigma * normal_noise(noise)
        mask = jnp.broadcast_to(eligible, noisy.shape)
        return Corrupted(jnp.where(mask, noisy, x), mask, jnp.zeros_like(logsnr))

    return Corruption(f"gaussian_{path.name}", corrupt, lambda length: (length,), None)


def normal_noise(noise: ArrayLike) -> Array:
    """Standard normal numbers with the given quantiles: the eps of :func:`gaussian`.

    On the grid of ``draws.open_uniform`` they are finite, within 5.3, and exactly antisymmetric:
    ``normal_noise(1 - v) == -normal_noise(v)``.

    Args:
        noise: base noise in (0, 1), any shape.
    """
    return jax.scipy.special.ndtri(noise)
