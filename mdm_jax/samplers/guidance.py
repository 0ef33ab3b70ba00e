"""Classifier-free guidance, over a part of the noise levels."""

import math

import jax
import jax.numpy as jnp

from mdm_jax.schedules.parameters import check_interval
from mdm_jax.typing import Array, ArrayLike, ModelFn


def guided(
    conditional: ModelFn,
    unconditional: ModelFn,
    scale: ArrayLike,
    low: ArrayLike = -math.inf,
    high: ArrayLike = math.inf,
) -> ModelFn:
    """A network that pushes the conditional output away from the unconditional one.

    ``y = y_u + scale (y_c - y_u)`` at levels within [low, high], ``y_c`` elsewhere. Any output will
    do, as long as both networks have the same: at a given input all of them are affine in each
    other, so that guiding one guides the rest alike. Where no row is inside the interval the
    unconditional network is not run.

    Ho and Salimans 2022; the interval is that of Kynkäänniemi et al. 2024 (arXiv 2404.07724).

    Args:
        conditional: ``(x [B, ...], logsnr [B, 1], documents) -> y``.
        unconditional: likewise.
        scale: guidance scale, 1 for none.
        low: noisiest guided logSNR.
        high: cleanest guided logSNR.

    Raises:
        ValueError: unless low < high.
    """
    check_interval("guided", low, high)

    def model_fn(x: Array, logsnr: Array, documents: Array | None = None) -> Array:
        target = conditional(x, logsnr, documents)
        # One level per row decides.
        inside = (low <= logsnr[:, 0]) & (logsnr[:, 0] <= high)

        def push() -> Array:
            base = unconditional(x, logsnr, documents)
            where = inside.reshape(-1, *(1,) * (target.ndim - 1))
            return jnp.where(where, base + jnp.asarray(scale, base.dtype) * (target - base), target)

        return jax.lax.cond(jnp.any(inside), push, lambda: target)

    return model_fn
