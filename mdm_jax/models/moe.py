"""A mixture of experts in place of a feed-forward layer; no token is dropped."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mdm_jax.models.layers import swiglu
from mdm_jax.models.products import product
from mdm_jax.sharding import add_shards, gather, map_shards
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


def grouped_product(x: Array, kernels: Array, sizes: Array) -> Array:
    """Float32 [N, H] of rows [N, D], of which each expert's are together, by its kernel [E, D, H].

    ``sizes`` [E] are the numbers of rows, N in all. TPUs have a kernel for this. Compilers of
    other devices multiply every row by all experts, so there rows are cut into blocks of one
    expert, the last of each filled with zeros; no block is kept for the backward pass.
    """
    sizes = sizes.astype(jnp.int32)
    blocks = jax.checkpoint(_in_blocks)
    return jax.lax.platform_dependent(x, kernels, sizes, tpu=_ragged, default=blocks)


def _ragged(x: Array, kernels: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(x, kernels, sizes, preferred_element_type=jnp.float32)


def _in_blocks(x: Array, kernels: Array, sizes: Array) -> Array:
    rows, experts = len(x), len(kernels)
    # A quarter to a half of an expert's mean share: fewer than five kernels' copies an expert, and
    # from 16 rows an expert on, no more than a third of all blocks is zeros.
    block = 1 << max(3, (rows // (2 * experts)).bit_length() - 1)
    count = min(rows, rows // block + experts)  # enough for any sizes
    used = -(-sizes // block)
    ends = jnp.cumsum(used)
    expert = jnp.searchsorted(ends, jnp.arange(count), side="right")
    of_row = jnp.repeat(jnp.arange(experts), sizes, total_repeat_length=rows)
    first_row, first_block = jnp.cumsum(sizes) - sizes, ends - used
    place = jnp.arange(rows) + (first_block * block - first_row)[of_row]
    padded = jnp.zeros((count * block, x.shape[1]), x.dtype)
    padded = padded.at[place].set(x, unique_indices=True)
    # In float32 the gradients of an expert's blocks are added; products round as ``x`` is.
    own = kernels.astype(jnp.float32).at[expert].get(mode="clip")
    y = product("mbd,mdh->mbh", padded.reshape(count, block, x.shape[1]), own)
    return y.reshape(count * block, own.shape[2]).at[place].get(unique_indices=True)


_ROWS, _INWARD, _OUTWARD = ("batch", None, None), (None, "embed", "mlp"), (None, "mlp", "embed")


class Mixture(nn.Module):
    """SwiGLU experts, ``x`` [N, L, D] to [N, L, D] float32.

    Probabilities are a float32 softmax over all experts and are not renormalised over the chosen
    ones (LLaDA-MoE). Tokens are sorted by expert, so that each expert multiplies its own. On a mesh
    every device sorts the tokens of its own rows, for which it gathers the experts' kernels.
    """

    experts: Experts
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        e, width = self.experts, x.shape[-1]
        router = self._kernel("router", (width, e.count), ("embed", None))
        bias = jnp.zeros((e.count,), jnp.float32)
        if e.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None,))
            bias = self.param("router_bias", zeros, (e.count,), jnp.float32)
        gate, up = (self._kernel(n, (e.count, width, e.hidden), _INWARD) for n in ("gate", "up"))
        down = self._kernel("down", (e.count, e.hidden, width), _OUTWARD)
        names = (_ROWS, ("embed", None), (None,), _INWARD, _INWARD, _OUTWARD)
        return map_shards(self._mix, names, x.astype(self.dtype), router, bias, gate, up, down)

    def _mix(self, x: Array, router: Array, bias: Array, *kernels: Array) -> Array:
        e, width = self.experts, x.shape[-1]
        gate, up = (gather(kernel, "embed", 1, width, self.dtype) for kernel in kernels[:2])
        down = gather(kernels[2], "embed", 2, width, self.dtype)
        rows = x.reshape(-1, width)
        logits = rows @ gather(router, "embed", 0, width, self.dtype)
        chance = jax.nn.softmax(logits.astype(jnp.float32), axis=-1) + bias[None]
        weights, chosen = jax.lax.top_k(chance, e.per_token)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        visits, sizes = rows[order // e.per_token], jnp.bincount(chosen.reshape(-1), length=e.count)

        hidden = [grouped_product(visits, kernel, sizes) for kernel in (gate, up)]
        y = grouped_product(swiglu(*(part.astype(self.dtype) for part in hidden)), down, sizes)
        weights = weights.astype(self.dtype).astype(jnp.float32).reshape(-1)[order]
        # Every token's visits, back in its own order, are summed.
        y = jnp.zeros_like(y).at[order].set(y * weights[:, None], unique_indices=True)
        y = y.reshape(*x.shape[:-1], e.per_token, width).sum(axis=-2)
        return add_shards(y, "mlp", down.shape[1], e.hidden)

    def _kernel(self, name: str, shape: tuple[int, ...], axes: tuple[Any, ...]) -> Array:
        batch = tuple(range(len(shape) - 2))
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=batch)
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype)
