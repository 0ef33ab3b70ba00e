"""The blocks of a transformer: attention over new and cached tokens, feed-forward, conditioning."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.models.activations import constrain
from mdm_jax.models.attention import attention
from mdm_jax.models.attention_masks import AnyRule
from mdm_jax.models.layers import (
    Kernel,
    Linear,
    Norm,
    Rotation,
    gelu,
    logsnr_features,
    rotate,
    rotation,
)
from mdm_jax.models.products import product
from mdm_jax.models.rematerialisation import rematerialised
from mdm_jax.models.transformer_config import TransformerConfig
from mdm_jax.typing import Array

_ROWS, _HEADS = ("batch", None, None), ("batch", None, "heads", None)


class KeyValues(NamedTuple):
    """Keys and values of some tokens, [N, Q, H, D], or [depth, N, Q, H, D] of all layers.

    Attributes:
        keys: rotated to their position.
        values: as they are.
    """

    keys: Array
    values: Array


class Attention(nn.Module):
    """Multi-head attention with rotary positions, over the tokens themselves and cached ones."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, mask: AnyRule | Array | None, turn: Rotation, cached: KeyValues | None
    ) -> tuple[Array, KeyValues]:
        c = self.config
        shape = (*x.shape[:2], c.num_heads, c.width // c.num_heads)
        kernel = {"axes": ("embed", "heads"), "param_dtype": c.param_dtype}
        kernels = [
            Kernel((c.width, c.width), name=name, **kernel)() for name in ("query", "key", "value")
        ]
        # One product: x is read once, and its slope is summed inside the product.
        qkv = product("nli,ico->nlco", x.astype(c.dtype), jnp.stack(kernels, axis=1), c.dtype)
        q, k, v = (qkv[:, :, i].reshape(shape) for i in range(3))
        if c.qk_norm:
            norm = {"axes": (None,), "param_dtype": c.param_dtype}
            q, k = Norm(name="query_norm", **norm)(q), Norm(name="key_norm", **norm)(k)
        q, k = (rotate(a, turn).astype(c.dtype) for a in (q, k))
        q, k, v = (constrain(a, *_HEADS) for a in (q, k, v.astype(c.dtype)))
        own = everything = KeyValues(k, v)
        if cached is not None:
            everything = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), cached, own)
        y = constrain(attention(q, *everything, mask, c.attention), *_HEADS)
        out = Linear(
            c.width,
            axes=("heads", "embed"),
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            kernel_init=_residual_init(c),
            name="out",
        )
        return out(y.reshape(x.shape)), own


class FeedForward(nn.Module):
    """GeLU or SwiGLU feed-forward layer."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        enter = {"axes": ("embed", "mlp"), "dtype": c.dtype, "param_dtype": c.param_dtype}
        h = Linear(c.hidden, name="up", **enter)(x)
        if c.mlp == "swiglu":
            h = jax.nn.silu(Linear(c.hidden, name="gate", **enter)(x)) * h
        else:
            h = gelu(h)
        h = constrain(h, "batch", None, "mlp")
        return Linear(
            c.width,
            axes=("mlp", "embed"),
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            kernel_init=_residual_init(c),
            name="down",
        )(h)


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residuals; adaLN-zero if conditioned."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: AnyRule | Array | None,
        turn: Rotation,
        condition: Array | None,
        cached: KeyValues | None,
    ) -> tuple[Array, KeyValues]:
        c = self.config
        norm = {"kind": c.norm, "learned": condition is None, "param_dtype": c.param_dtype}
        attention, mlp = Attention(c, name="attention"), FeedForward(c, name="mlp")
        if condition is None:
            y, own = attention(Norm(name="norm_1", **norm)(x), mask, turn, cached)
            x = x + y
            return constrain(x + mlp(Norm(name="norm_2", **norm)(x)), *_ROWS), own
        parts = _modulation(c, 6, condition, x.shape[1])
        h = Norm(name="norm_1", **norm)(x) * (1 + parts[0]) + parts[1]
        y, own = attention(h, mask, turn, cached)
        x = x + parts[2] * y
        h = Norm(name="norm_2", **norm)(x) * (1 + parts[3]) + parts[4]
        return constrain(x + parts[5] * mlp(h), *_ROWS), own


def add_estimate(c: TransformerConfig, x: Array, table: Array, estimate: Array | None) -> Array:
    """Embedded tokens [N, L, width] plus the projected embedding of an estimate [N, L, K]."""
    shape = (*x.shape[:-1], c.vocab_size)
    if estimate is not None and not (c.self_conditioning and estimate.shape == shape):
        raise ValueError(
            f"an estimate of the clean tokens needs a config with self_conditioning (here "
            f"{c.self_conditioning}) and the shape {shape}, got {estimate.shape}"
        )
    if not c.self_conditioning:
        return x
    if estimate is None:
        embedded = jnp.zeros_like(x)
    else:
        embedded = product("nlk,kd->nld", estimate.astype(c.dtype), table, c.dtype)
    return x + Linear(
        c.width,
        axes=("embed", "mlp"),
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        kernel_init=nn.initializers.zeros,
        name="estimate",
    )(embedded)


def run_blocks(
    c: TransformerConfig,
    x: Array,
    mask: AnyRule | Array | None,
    positions: Array | np.ndarray,
    condition: Array | None,
    cached: KeyValues | None = None,
) -> tuple[Array, KeyValues]:
    """All blocks and the final norm, inside a compact module: outputs and [depth, ...] keys.

    Args:
        c: shape and arithmetic.
        x: [N, Q, width] embedded inputs.
        mask: a rule (:mod:`mdm_jax.models.attention_masks`) or a boolean array [N or 1, 1, Q,
            M + Q], where attention may look; None for everywhere.
        positions: [Q] or [N, Q] for the rotary positions; in NumPy where they are known.
        condition: [N, S, width] from :func:`level_condition`, or None.
        cached: keys and values [depth, N, M, H, D] of tokens that went before, or None.
    """
    x = constrain(x, *_ROWS)
    turn = rotation(positions, c.width // c.num_heads, c.rope_base)
    if c.scan_layers:
        scanned = nn.scan(
            rematerialised(_ScanBlock, c.remat, scanned=True),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, key_values = scanned(c, name="blocks")(x, mask, turn, condition, cached)
    else:
        layers, block = [], rematerialised(Block, c.remat)
        for i in range(c.depth):
            before = jax.tree.map(lambda leaf, i=i: leaf[i], cached)
            x, own = block(c, name=f"block_{i}")(x, mask, turn, condition, before)
            layers.append(own)
        key_values = jax.tree.map(lambda *each: jnp.stack(each), *layers)
    norm = Norm(c.norm, learned=condition is None, param_dtype=c.param_dtype, name="norm")
    x = norm(x)
    if condition is None:
        return x, key_values
    scale, shift = _modulation(c, 2, condition, x.shape[1])
    return x * (1 + scale) + shift, key_values


def level_condition(c: TransformerConfig, logsnr: Array | None, length: int) -> Array:
    """Features of the noise levels for the adaptive norms, [N, S, width]; in a compact module.

    Raises:
        ValueError: unless the number S of levels per row divides ``length``.
    """
    if logsnr is None or logsnr.ndim != 2 or length % logsnr.shape[-1]:
        shape = None if logsnr is None else logsnr.shape
        raise ValueError(
            "a model with condition_on_logsnr needs one noise level per row, logsnr [N, 1], or "
            f"one per segment, logsnr [N, S] with S a divisor of {length}; got {shape}"
        )
    project = {"dtype": c.dtype, "param_dtype": c.param_dtype, "use_bias": True}
    h = logsnr_features(logsnr, c.width)
    h = jax.nn.silu(Linear(c.width, axes=("embed", "mlp"), name="level_1", **project)(h))
    return Linear(c.width, axes=("mlp", "embed"), name="level_2", **project)(h)


class _ScanBlock(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x, mask, turn, condition, cached):
        return Block(self.config, name="block")(x, mask, turn, condition, cached)


def _modulation(c: TransformerConfig, parts: int, condition: Array, length: int) -> list[Array]:
    # Zero initialisation makes every conditioned block start as the identity.
    modulation = Linear(
        parts * c.width,
        axes=("embed", "mlp"),
        use_bias=True,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        kernel_init=nn.initializers.zeros,
        name="modulation",
    )(jax.nn.silu(condition))
    levels = condition.shape[1]
    if levels > 1:
        modulation = jnp.repeat(modulation, length // levels, axis=1)
    return jnp.split(modulation, parts, axis=-1)


def _residual_init(c: TransformerConfig):
    # Each of the 2 * depth residual branches adds the same share of the final variance.
    scale = 1.0 / (2 * c.depth)
    return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")
