"""Building blocks of the networks: products with float32 accumulation, norms, rotary positions.

Every parameter carries logical axis names, which ``mdm_jax.training.sharding`` maps to mesh axes:
``vocab``, ``embed`` (the residual width), ``heads`` (heads times head size), ``mlp``, ``layers``.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from mdm_jax.models.products import product
from mdm_jax.typing import Array

Initializer = Callable[..., Array]


class Linear(nn.Module):
    """``x W (+ b)`` with operands in ``dtype`` and a float32 result, as are the gradients' sums.

    Asking for float32 accumulation is both the accurate and the fast choice for bfloat16: units
    that multiply it accumulate in float32 anyway.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            (x.shape[-1], self.features),
            self.param_dtype,
        )
        # What the backward pass keeps is x in the operands' dtype, and no copy of the kernel.
        y = product("...i,io->...o", x.astype(self.dtype), kernel, self.dtype)
        if not self.use_bias:
            return y
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
        bias = self.param("bias", zeros, (self.features,), self.param_dtype)
        return y + _last_axis(bias, y)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis, computed in float32, with a learned scale.

    ``kind`` is "rms" or "layer"; ``learned`` False leaves the scale to a conditioning network;
    ``axes`` names the scale's logical axis.
    """

    kind: str = "rms"
    learned: bool = True
    axes: tuple[str | None, ...] = ("embed",)
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        if not self.learned:
            return x
        ones = nn.with_logical_partitioning(nn.initializers.ones, self.axes)
        scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
        return x * _last_axis(scale, x)


def rotary(x: Array, positions: Array, base: float = 10_000.0) -> Array:
    """Rotary position embedding (Su et al. 2021).

    Args:
        x: [N, L, H, D] queries or keys, D even.
        positions: [L] or [N, L] integer positions.
        base: wavelength base.
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency.reshape(
        (1,) * positions.ndim + (-1,)
    )
    angle = angle.reshape((-1, angle.shape[-2], 1, half))  # [1 or N, L, 1, half]
    sin, cos = jnp.sin(angle).astype(x.dtype), jnp.cos(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def logsnr_features(logsnr: Array, width: int) -> Array:
    """Sinusoidal features of a log signal-to-noise ratio, [..., width] from [...].

    The input is clipped to [-20, 20], where both rates are within 2e-9 of 0 and 1; so the ends
    of a sampling grid, which are infinite, are as good as any other level.
    """
    half = width // 2
    frequency = jnp.exp(jnp.linspace(jnp.log(0.05), jnp.log(8.0), half))
    level = jnp.clip(logsnr.astype(jnp.float32), -20.0, 20.0)[..., None]
    angle = level * frequency.reshape((1,) * logsnr.ndim + (-1,))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _last_axis(vector: Array, like: Array) -> Array:
    return vector.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + (-1,))
