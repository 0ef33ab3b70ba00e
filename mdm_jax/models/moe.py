"""A mixture of experts in place of a feed-forward layer; no token is dropped."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mdm_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Experts:
    """Sizes of a mixture.

    Attributes:
        count, per_token: E experts, of which a token visits k.
        hidden, shared_hidden: width inside an expert, and of one that all tokens visit; 0: none.
        layers: which blocks are mixtures, others have plain layers; None: all.
        bias: a vector is added to the probabilities, by which experts are chosen and weighted.
    """

    count: int
    per_token: int
    hidden: int
    shared_hidden: int = 0
    layers: tuple[int, ...] | None = None
    bias: bool = False

    def __post_init__(self):
        if not (1 <= self.per_token <= self.count and self.hidden > 0):
            raise ValueError(
                f"a mixture needs 1 <= per_token <= count and a positive hidden width, got {self}"
            )

    def at(self, layer: int) -> bool:
        """Whether a block is a mixture."""
        return self.layers is None or layer in self.layers


class Mixture(nn.Module):
    """SwiGLU experts, ``x`` [N, L, D] to [N, L, D] float32.

    Probabilities are a float32 softmax over all experts and are not renormalised over the chosen
    ones (LLaDA-MoE). Tokens are sorted by expert, so that each expert multiplies its own.
    """

    experts: Experts
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        e, width = self.experts, x.shape[-1]
        rows = x.reshape(-1, width).astype(self.dtype)
        logits = rows @ self._kernel("router", (width, e.count), ("embed", None))
        chance = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        if e.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
            chance = chance + self.param("router_bias", zeros, (e.count,), jnp.float32)[None]
        weights, chosen = jax.lax.top_k(chance, e.per_token)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        visits, sizes = rows[order // e.per_token], jnp.bincount(chosen.reshape(-1), length=e.count)

        def multiply(x: Array, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> Array:
            kernel = self._kernel(name, (e.count, *shape), (None, *axes))
            return jax.lax.ragged_dot(
                x.astype(self.dtype),
                kernel,
                sizes.astype(jnp.int32),
                preferred_element_type=jnp.float32,
            )

        inward, outward = ("embed", "mlp"), ("mlp", "embed")
        gate = multiply(visits, "gate", (width, e.hidden), inward)
        up = multiply(visits, "up", (width, e.hidden), inward)
        y = multiply(jax.nn.silu(gate) * up, "down", (e.hidden, width), outward)
        weights = weights.astype(self.dtype).astype(jnp.float32).reshape(-1)[order]
        # Every token's visits, back in its own order, are summed.
        y = jnp.zeros_like(y).at[order].set(y * weights[:, None], unique_indices=True)
        return y.reshape(*x.shape[:-1], e.per_token, width).sum(axis=-2)

    def _kernel(self, name: str, shape: tuple[int, ...], axes: tuple[Any, ...]) -> Array:
        batch = tuple(range(len(shape) - 2))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=batch)
        kernel = self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)
        return kernel.astype(self.dtype)
