"""A pre-norm transformer for discrete diffusion: bidirectional, block-causal or causal."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.models import attention as attentions
from mdm_jax.models import layers
from mdm_jax.models.cross_entropy import Projection, Readout
from mdm_jax.models.kv_cache import KeyValues
from mdm_jax.models.layers import Kernel, Linear, Norm, Rotary, rematerialised
from mdm_jax.models.masks import AnyRule, within_documents
from mdm_jax.models.products import product
from mdm_jax.sharding import constrain
from mdm_jax.types import Array

_CHOICES = {
    "norm": ("rms", "layer"),
    "mlp": ("gelu", "swiglu"),
    "attention": attentions.CHOICES,
    "remat": tuple(layers.POLICIES),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and arithmetic of a :class:`Transformer`.

    Attributes:
        vocab_size: K, including the mask token.
        width: residual width, divisible by ``num_heads`` into an even head size.
        mlp_ratio: hidden width of the feed-forward layer over ``width`` (times 2/3 for "swiglu",
            for equal parameter counts).
        norm, mlp: "rms" or "layer"; "gelu" or "swiglu".
        condition_on_logsnr: adaptive norms and gates driven by the noise level (adaLN-zero, Peebles
            & Xie 2022). Off by default: the masked bound's optimum does not need the level.
        tie_embeddings: use the embedding matrix as the output projection.
        scan_layers: scan one compiled block over depth; compiles faster, runs slower on CPUs.
        qk_norm: RMS norms on queries and keys (Henry et al. 2020), against saturated attention at
            high learning rates.
        rope_base: wavelength base of the rotary embedding.
        learned_positions: longest row with a learned vector per position, added to the token's; 0
            for none. Rotary embeddings hold distances alone; fixed layouts such as grids are learnt
            sooner with both.
        self_conditioning: an earlier estimate of the clean tokens as a second input (Chen et al.
            2022, Analog Bits), through the embedding table and a projection initialised to zero.
        attention: an implementation (``models.attention``); "auto" for the best on this backend.
        remat: what the backward pass recomputes, by block (``models.layers.POLICIES``). On CPUs it
            needs ``scan_layers``: their compiler merges the two passes of an unrolled block again.
        dtype: of the operands of matrix products, in both passes; accumulation, softmax and norms
            are float32.

    ValueError for sizes below 1, widths that do not divide, or unknown names.
    """

    vocab_size: int
    width: int = 128
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: float = 4.0
    norm: str = "rms"
    mlp: str = "gelu"
    condition_on_logsnr: bool = False
    tie_embeddings: bool = False
    scan_layers: bool = False
    qk_norm: bool = False
    rope_base: float = 10_000.0
    learned_positions: int = 0
    self_conditioning: bool = False
    attention: str = "auto"
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        for name in ("vocab_size", "width", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learned_positions < 0:
            raise ValueError(
                f"learned_positions must not be negative, got {self.learned_positions}"
            )
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"width {self.width} must be a multiple of 2 * num_heads = {2 * self.num_heads} "
                "(the rotary embedding needs an even head size)"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward layer."""
        share = 2 / 3 if self.mlp == "swiglu" else 1.0
        return max(8, round(self.width * self.mlp_ratio * share / 8) * 8)


_ROWS, _HEADS = ("batch", None, None), ("batch", None, "heads", None)


class Attention(nn.Module):
    """Multi-head attention with rotary embedding, over the tokens and cached ones."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, mask: AnyRule | Array | None, rotary: Rotary, cached: KeyValues | None
    ) -> tuple[Array, KeyValues]:
        c = self.config
        kernel = {"axes": ("embed", "heads"), "param_dtype": c.param_dtype}
        kernels = [
            Kernel((c.width, c.width), name=name, **kernel)() for name in ("query", "key", "value")
        ]
        # One product: x is read once, and its gradient is summed inside the product.
        qkv = product("nli,ico->nlco", x.astype(c.dtype), jnp.stack(kernels, axis=1), c.dtype)
        shape = (*x.shape[:2], c.num_heads, c.head_size)
        q, k, v = (qkv[:, :, i].reshape(shape) for i in range(3))
        if c.qk_norm:
            norm = {"axes": (None,), "param_dtype": c.param_dtype}
            q, k = Norm(name="query_norm", **norm)(q), Norm(name="key_norm", **norm)(k)
        q, k = (layers.apply_rotary(a, rotary).astype(c.dtype) for a in (q, k))
        q, k, v = (constrain(a, *_HEADS) for a in (q, k, v.astype(c.dtype)))
        new = key_values = KeyValues(k, v)
        if cached is not None:
            key_values = jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), cached, new)
        y = attentions.attention(q, *key_values, mask, c.attention)
        y = constrain(y, *_HEADS).reshape(x.shape)
        out = _linear(c, c.width, ("heads", "embed"), "out", kernel_init=_residual_init(c))
        return out(y), new


class FeedForward(nn.Module):
    """GeLU or SwiGLU feed-forward layer."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        h = _linear(c, c.hidden, ("embed", "mlp"), "up")(x)
        if c.mlp == "swiglu":
            h = jax.nn.silu(_linear(c, c.hidden, ("embed", "mlp"), "gate")(x)) * h
        else:
            h = layers.gelu(h)
        h = constrain(h, "batch", None, "mlp")
        return _linear(c, c.width, ("mlp", "embed"), "down", kernel_init=_residual_init(c))(h)


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residuals; adaLN-zero if conditioned."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: AnyRule | Array | None,
        rotary: Rotary,
        condition: Array | None,
        cached: KeyValues | None,
    ) -> tuple[Array, KeyValues]:
        c = self.config
        norm = {"kind": c.norm, "learned": condition is None, "param_dtype": c.param_dtype}
        attention, mlp = Attention(c, name="attention"), FeedForward(c, name="mlp")
        if condition is None:
            y, new = attention(Norm(name="norm_1", **norm)(x), mask, rotary, cached)
            x = x + y
            return constrain(x + mlp(Norm(name="norm_2", **norm)(x)), *_ROWS), new
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = _modulation(c, 6, condition, x)
        h = Norm(name="norm_1", **norm)(x) * (1 + scale_1) + shift_1
        y, new = attention(h, mask, rotary, cached)
        x = x + gate_1 * y
        h = Norm(name="norm_2", **norm)(x) * (1 + scale_2) + shift_2
        return constrain(x + gate_2 * mlp(h), *_ROWS), new


class _ScanBlock(nn.Module):
    config: TransformerConfig

    @nn.compact
    def __call__(self, x, mask, rotary, condition, cached):
        return Block(self.config, name="block")(x, mask, rotary, condition, cached)


def run_blocks(
    c: TransformerConfig,
    x: Array,
    mask: AnyRule | Array | None,
    positions: Array | np.ndarray,
    condition: Array | None,
    cached: KeyValues | None = None,
) -> tuple[Array, KeyValues]:
    """All blocks and the final norm, inside a compact module: outputs and [depth, ...] keys.

    Arguments as of :meth:`Transformer.attend_readout`, ``condition`` as of :func:`level_condition`.
    """
    x = constrain(x, *_ROWS)
    rotary = layers.rotary_embedding(positions, c.head_size, c.rope_base)
    if c.scan_layers:
        scanned = nn.scan(
            rematerialised(_ScanBlock, c.remat, scanned=True),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, key_values = scanned(c, name="blocks")(x, mask, rotary, condition, cached)
    else:
        new, block = [], rematerialised(Block, c.remat)
        for i in range(c.depth):
            layer_cache = jax.tree.map(lambda leaf, i=i: leaf[i], cached)
            x, kv = block(c, name=f"block_{i}")(x, mask, rotary, condition, layer_cache)
            new.append(kv)
        key_values = jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)
    learned = condition is None
    x = Norm(c.norm, learned=learned, param_dtype=c.param_dtype, name="norm")(x)
    if learned:
        return x, key_values
    scale, shift = _modulation(c, 2, condition, x)
    return x * (1 + scale) + shift, key_values


def level_condition(c: TransformerConfig, logsnr: Array | None, length: int) -> Array:
    """Level features [N, S, width] for adaptive norms; ValueError unless S divides ``length``."""
    if logsnr is None or logsnr.ndim != 2 or length % logsnr.shape[-1]:
        shape = None if logsnr is None else logsnr.shape
        raise ValueError(
            "a model with condition_on_logsnr needs one noise level per row, logsnr [N, 1], or "
            f"one per segment, logsnr [N, S] with S a divisor of {length}; got {shape}"
        )
    h = layers.logsnr_features(logsnr, c.width)
    h = jax.nn.silu(_linear(c, c.width, ("embed", "mlp"), "level_1", use_bias=True)(h))
    return _linear(c, c.width, ("mlp", "embed"), "level_2", use_bias=True)(h)


def _linear(
    c: TransformerConfig, features: int, axes: tuple[str, str], name: str, **options: Any
) -> Linear:
    return Linear(
        features, axes=axes, dtype=c.dtype, param_dtype=c.param_dtype, name=name, **options
    )


def _modulation(c: TransformerConfig, parts: int, condition: Array, x: Array) -> list[Array]:
    # Zero initialisation makes every conditioned block start as the identity.
    options = {"use_bias": True, "kernel_init": nn.initializers.zeros}
    linear = _linear(c, parts * c.width, ("embed", "mlp"), "modulation", **options)
    modulation, levels = linear(jax.nn.silu(condition)), condition.shape[1]
    if levels > 1:
        modulation = jnp.repeat(modulation, x.shape[1] // levels, axis=1)
    return jnp.split(modulation, parts, axis=-1)


def _residual_init(c: TransformerConfig) -> Callable[..., Array]:
    # Each of the 2 * depth residual branches adds the same share of the final variance.
    return nn.initializers.variance_scaling(1 / (2 * c.depth), "fan_in", "truncated_normal")


class Transformer(nn.Module):
    """Bidirectional transformer: ``apply(params, inputs, logsnr, documents) -> logits``.

    :meth:`attend` runs the same parameters under any attention mask and with a KV cache (block and
    autoregressive models, ``models.decoders``). :meth:`readout` and :meth:`attend_readout` stop
    before the logits, for losses that need few of them (``models.readout_apply``).

    Args of the call:
        inputs: [N, L] int32 tokens, mask token included.
        logsnr: [N, S] noise levels of S contiguous segments of equal length (1 for the whole row);
            read only if the config conditions on them.
        documents: [N, L] int32 document numbers, 0 for padding; None for a single document.
        estimate: [N, L, K] probabilities of an earlier estimate of the clean tokens, for
            self_conditioning; None (or zeros) for none. Parameters are the same.

    Returns [N, L, K] float32 logits; a softmax must exclude the mask token
    (``models.exclude_token``). ValueError for an estimate of another shape or without
    self_conditioning; for levels missing or not dividing the row, if conditioned on; for rows
    longer than the learned positions.
    """

    config: TransformerConfig

    def __call__(
        self,
        inputs: Array,
        logsnr: Array | None = None,
        documents: Array | None = None,
        estimate: Array | None = None,
    ) -> Array:
        return self.readout(inputs, logsnr, documents, estimate).logits()

    def readout(
        self,
        inputs: Array,
        logsnr: Array | None = None,
        documents: Array | None = None,
        estimate: Array | None = None,
    ) -> Readout:
        """The call, up to the last product."""
        mask = None if documents is None else within_documents(documents)
        positions = np.arange(inputs.shape[-1])
        return self.attend_readout(inputs, logsnr, positions, mask, estimate=estimate)[0]

    def attend(self, *args: Array | None, **options) -> tuple[Array, KeyValues]:
        """:meth:`attend_readout` with logits [N, num_outputs, K] float32 instead of the readout."""
        readout, key_values = self.attend_readout(*args, **options)
        return readout.logits(), key_values

    @nn.compact
    def attend_readout(
        self,
        inputs: Array,
        logsnr: Array | None,
        positions: Array,
        mask: AnyRule | Array | None,
        cached: KeyValues | None = None,
        estimate: Array | None = None,
        num_outputs: int | None = None,
    ) -> tuple[Readout, KeyValues]:
        """Run tokens at given positions, which may attend to each other and to cached ones.

        Inputs [N, Q], ``logsnr``, ``estimate`` [N, Q, K] and errors are as in a call.

        Args:
            positions: [Q] or [N, Q] integer positions in the row; in NumPy where known.
            mask: a rule of ``models.masks`` or a boolean array [N or 1, 1, Q, M + Q] over M cached
                tokens, then the Q new ones; None for none.
            cached: keys and values [depth, N, M, H, D] of earlier tokens, or None.
            num_outputs: number of leading positions whose readout is returned; None for all.

        Returns the readout, and keys and values of the new tokens [depth, N, Q, H, D].
        """
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        table = self.param("embedding", init, (c.vocab_size, c.width), c.param_dtype)
        x = jnp.take(table, inputs, axis=0).astype(jnp.float32)
        if c.learned_positions:
            x = x + _LearnedPositions(c, name="positions")(positions)
        x = _add_estimate(c, x, table, estimate)
        condition = None
        if c.condition_on_logsnr:
            condition = level_condition(c, logsnr, inputs.shape[-1])
        x, key_values = run_blocks(c, x, mask, positions, condition, cached)
        x = x[:, :num_outputs]
        if not c.tie_embeddings:
            shape, zeros = (c.width, c.vocab_size), nn.initializers.zeros
            table = Kernel(shape, ("embed", "vocab"), c.param_dtype, zeros, name="head")()
        return Readout(x, table, Projection(c.tie_embeddings, c.dtype)), key_values


def _add_estimate(c: TransformerConfig, x: Array, table: Array, estimate: Array | None) -> Array:
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
    zeros = nn.initializers.zeros
    return x + _linear(c, c.width, ("embed", "mlp"), "estimate", kernel_init=zeros)(embedded)


class _LearnedPositions(nn.Module):
    """A vector for each position of a row: [Q] or [N, Q] positions to [1 or N, Q, width]."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, positions: Array) -> Array:
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
        table = self.param("table", init, (c.learned_positions, c.width), c.param_dtype)
        if isinstance(positions, np.ndarray) and positions.max() >= c.learned_positions:
            raise ValueError(
                f"a row of {positions.max() + 1} tokens is longer than learned_positions="
                f"{c.learned_positions}; raise that, or set it to 0 for the rotary embedding alone"
            )
        # Traced positions beyond the table give NaN, which the loss shows at once.
        vectors = jnp.take(table, positions, axis=0).astype(jnp.float32)
        return vectors if positions.ndim == 2 else vectors[None]
