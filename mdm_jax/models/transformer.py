"""A pre-norm transformer for discrete diffusion: bidirectional, block-causal or causal."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Name, Plain, Real, Whole, checked
from mdm_jax.models import attention as attentions
from mdm_jax.models import layers, lora, moe
from mdm_jax.models.cross_entropy import Projection, Readout
from mdm_jax.models.kv_cache import KeyValues, RowKeyValues
from mdm_jax.models.layers import Kernel, Linear, Norm, Rotary, rematerialised
from mdm_jax.models.masks import AnyRule, within_documents
from mdm_jax.models.products import product
from mdm_jax.sharding import constrain
from mdm_jax.types import Array


@checked
@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Shape and arithmetic of a :class:`Transformer`.

    ``width`` is divisible by ``num_heads`` into an even head size. ``mlp_ratio`` counts times 2/3
    for "swiglu", for equal parameter counts. ``condition_on_logsnr`` is off by default: the masked
    bound's optimum does not need the level. With ``scan_layers`` depth compiles faster and runs
    slower on CPUs, where ``remat`` needs it: their compiler merges the two passes of an unrolled
    block again. Rotary embeddings hold distances alone; fixed layouts such as grids are learnt
    sooner with ``learned_positions`` too. ``dtype`` is of operands in both passes; accumulation,
    softmax and norms are float32.

    Settings of 0 follow from others: ``num_kv_heads`` from ``num_heads``, ``head_dim`` from the
    width, ``mlp_hidden`` from ``mlp_ratio``. Query heads share a key-value head in runs (0, 0, 1,
    1). With ``experts`` a feed-forward layer is a mixture (:mod:`mdm_jax.models.moe`).
    ``norm_rounded``: norms round to ``dtype`` before they scale, as Llama's do.

    ValueError for settings out of range, widths that do not divide, or unknown names. References:
    Peebles & Xie 2022 (adaLN-zero); Henry et al. 2020 (qk_norm); Chen et al. 2022, Analog Bits
    (self_conditioning, here through the embedding table and a projection initialised to zero).
    """

    vocab_size: Annotated[int, Whole("[1, 2e9]", "tokens", "K, including the mask token")]
    width: Annotated[int, Whole("[2, 1e6]", "", "of the residual stream")] = 128
    depth: Annotated[int, Whole("[1, 1e4]", "blocks", "attention and MLP, one after another")] = 4
    num_heads: Annotated[int, Whole("[1, 1e4]", "heads", "of attention; 2 num_heads | width")] = 4
    mlp_ratio: Annotated[float, Real("(0, 1e3]", "widths", "hidden width of the MLP")] = 4.0
    norm: Annotated[str, Name(("rms", "layer"), "normalisation of blocks")] = "rms"
    mlp: Annotated[str, Name(("gelu", "swiglu"), "feed-forward layer")] = "gelu"
    condition_on_logsnr: Annotated[bool, Plain(bool, "norms driven by the noise level")] = False
    tie_embeddings: Annotated[bool, Plain(bool, "the embedding is the output projection")] = False
    scan_layers: Annotated[bool, Plain(bool, "one compiled block, scanned over depth")] = False
    qk_norm: Annotated[bool, Plain(bool, "RMS norms on queries and keys")] = False
    qk_norm_over: Annotated[
        str, Name(("head", "width"), "what they are over: each head, or all together")
    ] = "head"
    num_kv_heads: Annotated[int, Whole("[0, 1e4]", "heads", "of keys and values")] = 0
    head_dim: Annotated[int, Whole("[0, 1e5]", "", "size of a head, even")] = 0
    mlp_hidden: Annotated[int, Whole("[0, 1e7]", "", "hidden width of the MLP")] = 0
    qkv_bias: Annotated[bool, Plain(bool, "biases of queries, keys and values")] = False
    norm_eps: Annotated[float, Real("(0, 1)", "", "added to the mean square")] = 1e-6
    norm_rounded: Annotated[bool, Plain(bool, "norms round before they scale")] = False
    rope_scaling: layers.Llama3Scaling | None = None
    rope_share: Annotated[float, Real("(0, 1]", "", "part of a head that is rotated")] = 1.0
    experts: moe.Experts | None = None
    rope_base: Annotated[
        float, Real("(1, 1e9]", "positions", "wavelength base of the rotary embedding")
    ] = 10_000.0
    learned_positions: Annotated[
        int, Whole("[0, 1e7]", "tokens", "longest row with a vector per position; 0: none")
    ] = 0
    self_conditioning: Annotated[bool, Plain(bool, "an earlier estimate is an input")] = False
    attention: Annotated[str, Name(tuple(attentions.CHOICES), "auto: best of the device")] = "auto"
    remat: Annotated[str, Name(tuple(layers.POLICIES), "what the backward pass recomputes")] = (
        "none"
    )
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        if not self.head_dim and self.width % (2 * self.num_heads):
            raise ValueError(
                f"width {self.width} must be a multiple of 2 * num_heads = {2 * self.num_heads} "
                "(the rotary embedding needs an even head size)"
            )
        if self.head_dim % 2 or self.rotated % 2 or not self.rotated:
            raise ValueError(
                f"the rotary embedding turns pairs: head_dim {self.head_dim} and the part of it "
                f"that is rotated, {self.rotated}, must be even"
            )
        if self.scan_layers and self.experts and not all(map(self.experts.at, range(self.depth))):
            raise ValueError(
                f"scan_layers needs blocks that are alike, but of {self.depth} only the blocks "
                f"{self.experts.layers} have experts; leave scan_layers off"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.kv_heads}"
            )
        if self.hidden < 1:
            raise ValueError(
                f"mlp_ratio {self.mlp_ratio} of width {self.width} leaves no hidden units (they "
                "are a multiple of 8); raise mlp_ratio"
            )

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def rotated(self) -> int:
        """How many numbers of a head are rotated."""
        return round(self.head_size * self.rope_share)

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward layer: by ``mlp_ratio`` the nearest multiple of 8."""
        if self.mlp_hidden:
            return self.mlp_hidden
        share = 2 / 3 if self.mlp == "swiglu" else 1.0
        return round(self.width * self.mlp_ratio * share / 8) * 8


ROWS = ("batch", None, None)


class Attention(nn.Module):
    """Multi-head attention with rotary embedding, over the tokens and cached ones."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: AnyRule | Array | None,
        rotary: Rotary,
        cached: KeyValues | RowKeyValues | None,
    ) -> tuple[Array, KeyValues]:
        c = self.config
        heads = {"query": c.num_heads, "key": c.kv_heads, "value": c.kv_heads}
        kernels = {
            name: Kernel(
                (c.width, count * c.head_size), ("embed", "heads"), c.param_dtype, name=name
            )
            for name, count in heads.items()
        }
        # Few products: x is read less often, and its gradient is summed inside them.
        together = [list(heads)] if c.kv_heads == c.num_heads else [["query"], ["key", "value"]]
        projected = {}
        for names in together:
            stacked = jnp.stack([kernels[name]() for name in names], axis=1)
            y = product("nli,ico->nlco", x.astype(c.dtype), stacked, c.dtype, c.dtype)
            for name, each in zip(names, jnp.split(y, len(names), axis=2)):  # gradients are joined
                projected[name] = kernels[name].adapted(x, each[:, :, 0], c.dtype)
        if c.qkv_bias:
            for name in heads:
                projected[name] = layers.Bias(c.param_dtype, name=f"{name}_bias")(projected[name])
        if c.qk_norm and c.qk_norm_over == "width":
            for name in ("query", "key"):
                projected[name] = make_norm(c, f"{name}_norm", ("heads",))(projected[name])
        q, k, v = (
            projected[name].reshape(*x.shape[:2], count, c.head_size)
            for name, count in heads.items()
        )
        if c.qk_norm and c.qk_norm_over == "head":
            q, k = make_norm(c, "query_norm", (None,))(q), make_norm(c, "key_norm", (None,))(k)
        q, k = (layers.apply_rotary(a, rotary).astype(c.dtype) for a in (q, k))
        q, k, v = (layers.named_heads(a) for a in (q, k, v.astype(c.dtype)))
        new = key_values = KeyValues(k, v)
        if cached is not None:
            key_values = cached.joined(new)
        group = c.num_heads // c.kv_heads
        if group > 1:
            key_values = jax.tree.map(lambda a: jnp.repeat(a, group, axis=2), key_values)
        y = attentions.attention(q, *key_values, mask, c.attention)
        y = layers.named_heads(y).reshape(*x.shape[:2], c.num_heads * c.head_size)
        out = make_linear(c, c.width, ("heads", "embed"), "out", kernel_init=residual_init(c))
        return out(y), new


class FeedForward(nn.Module):
    """GeLU or SwiGLU feed-forward layer."""

    config: TransformerConfig
    hidden: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, bias = self.config, {"use_bias": self.use_bias}
        inward = functools.partial(
            make_linear, c, self.hidden, ("embed", "mlp"), rounded=True, **bias
        )
        h = inward("up")(x)
        h = layers.swiglu(inward("gate")(x), h) if c.mlp == "swiglu" else layers.gelu(h)
        h = constrain(h, "batch", None, "mlp")
        bias["kernel_init"] = residual_init(c)
        return make_linear(c, c.width, ("mlp", "embed"), "down", **bias)(h)


class MixedFeedForward(nn.Module):
    """A mixture of experts, and the expert that all tokens visit."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, e = self.config, self.config.experts
        y = moe.Mixture(e, c.dtype, c.param_dtype, name="experts")(x)
        return y + FeedForward(c, e.shared_hidden, name="shared")(x) if e.shared_hidden else y


class Block(nn.Module):
    """Pre-norm attention and feed-forward with residuals; adaLN-zero if conditioned."""

    config: TransformerConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: AnyRule | Array | None,
        rotary: Rotary,
        condition: Array | None,
        cached: KeyValues | RowKeyValues | None,
    ) -> tuple[Array, KeyValues]:
        c, x = self.config, layers.named_input(x)
        norm = {"kind": c.norm, "learned": condition is None}
        attention = Attention(c, name="attention")
        if c.experts is not None and c.experts.at(self.layer):
            mlp = MixedFeedForward(c, name="mlp")
        else:
            mlp = FeedForward(c, c.hidden, name="mlp")
        if condition is None:
            y, new = attention(make_norm(c, "norm_1", **norm)(x), mask, rotary, cached)
            x = x + y
            return constrain(x + mlp(make_norm(c, "norm_2", **norm)(x)), *ROWS), new
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = modulation(c, 6, condition, x)
        h = make_norm(c, "norm_1", **norm)(x) * (1 + scale_1) + shift_1
        y, new = attention(h, mask, rotary, cached)
        x = x + gate_1 * y
        h = make_norm(c, "norm_2", **norm)(x) * (1 + scale_2) + shift_2
        return constrain(x + gate_2 * mlp(h), *ROWS), new


class _ScanBlock(nn.Module):
    config: Any
    block: type[nn.Module]

    @nn.compact
    def __call__(self, x, mask, rotary, condition, cached):
        return self.block(self.config, 0, name="block")(x, mask, rotary, condition, cached)


def stack_blocks(
    c: Any,
    block: type[nn.Module],
    x: Array,
    mask: AnyRule | Array | None,
    rotary: Rotary,
    condition: Array | None,
    cached: KeyValues | RowKeyValues | None,
) -> tuple[Array, KeyValues]:
    """Blocks of a config ``c``, ``block(c, layer)`` in order, inside a compact module."""
    x = constrain(x, *ROWS)
    if c.scan_layers:
        scanned = nn.scan(
            rematerialised(_ScanBlock, c.remat, scanned=True),
            variable_axes=dict.fromkeys(("params", *lora.COLLECTIONS), 0),
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(c, block, name="blocks")(x, mask, rotary, condition, cached)
    new, block = [], rematerialised(block, c.remat)
    for i in range(c.depth):
        layer_cache = jax.tree.map(lambda leaf, i=i: leaf[i], cached)
        x, kv = block(c, i, name=f"block_{i}")(x, mask, rotary, condition, layer_cache)
        new.append(kv)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *new)


def run_blocks(
    c: TransformerConfig,
    x: Array,
    mask: AnyRule | Array | None,
    positions: Array | np.ndarray,
    condition: Array | None,
    cached: KeyValues | RowKeyValues | None = None,
) -> tuple[Array, KeyValues]:
    """All blocks and the final norm, inside a compact module: outputs and [depth, ...] keys.

    Arguments as of :meth:`Transformer.attend_readout`, ``condition`` as of :func:`level_condition`.
    """
    rotary = layers.rotary_embedding(positions, c.rotated, c.rope_base, c.rope_scaling)
    x, key_values = stack_blocks(c, Block, x, mask, rotary, condition, cached)
    learned = condition is None
    x = make_norm(c, "norm", kind=c.norm, learned=learned)(x)
    if learned:
        return x, key_values
    scale, shift = modulation(c, 2, condition, x)
    return x * (1 + scale) + shift, key_values


def level_condition(c: TransformerConfig, logsnr: Array | None, length: int) -> Array:
    """Level features [N, S, width] for adaptive norms; ValueError unless S divides ``length``."""
    check_levels(logsnr, length)
    h = layers.logsnr_features(logsnr, c.width)
    h = jax.nn.silu(make_linear(c, c.width, ("embed", "mlp"), "level_1", use_bias=True)(h))
    return make_linear(c, c.width, ("mlp", "embed"), "level_2", use_bias=True)(h)


def check_levels(logsnr: Array | None, length: int) -> None:
    """ValueError unless levels are [N, S] with S a divisor of ``length``."""
    if logsnr is None or logsnr.ndim != 2 or length % logsnr.shape[-1]:
        shape = None if logsnr is None else logsnr.shape
        raise ValueError(
            "a model with condition_on_logsnr needs one noise level per row, logsnr [N, 1], or "
            f"one per segment, logsnr [N, S] with S a divisor of {length}; got {shape}"
        )


def make_norm(
    c: TransformerConfig, name: str, axes: tuple[str | None, ...] = ("embed",), **options: Any
) -> Norm:
    """A norm of the config's arithmetic."""
    rounded = c.dtype if c.norm_rounded else jnp.float32
    dtypes = {"param_dtype": c.param_dtype, "rounded": rounded}
    return Norm(axes=axes, eps=c.norm_eps, name=name, **dtypes, **options)


def make_linear(
    c: TransformerConfig, features: int, axes: tuple[str, str], name: str, **options: Any
) -> Linear:
    """A linear layer of the config's arithmetic."""
    return Linear(
        features, axes=axes, dtype=c.dtype, param_dtype=c.param_dtype, name=name, **options
    )


def modulation(c: TransformerConfig, parts: int, condition: Array, x: Array) -> list[Array]:
    """Vectors of adaptive norms at ``x`` [N, L, width] from level features [N or 1, S, D].

    Zero initialisation makes every conditioned block start as the identity.
    """
    options = {"use_bias": True, "kernel_init": nn.initializers.zeros}
    linear = make_linear(c, parts * c.width, ("embed", "mlp"), "modulation", **options)
    vectors, levels = linear(jax.nn.silu(condition)), condition.shape[1]
    if levels > 1:
        vectors = jnp.repeat(vectors, x.shape[1] // levels, axis=1)
    return jnp.split(vectors, parts, axis=-1)


def residual_init(c: TransformerConfig) -> Callable[..., Array]:
    """Initialiser of the last layer of a residual branch."""
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
        cached: KeyValues | RowKeyValues | None = None,
        estimate: Array | None = None,
        num_outputs: int | None = None,
    ) -> tuple[Readout, KeyValues]:
        """Run tokens at given positions, which may attend to each other and to cached ones.

        Inputs [N, Q], ``logsnr``, ``estimate`` [N, Q, K] and errors are as in a call.

        Args:
            positions: [Q] or [N, Q] integer positions in the row; in NumPy where known.
            mask: a rule of ``models.masks`` or a boolean array [N or 1, 1, Q, M + Q] over M cached
                tokens, then the Q new ones; None for none.
            cached: keys and values [depth, N, M, H, D] of earlier tokens, or None. Of whole rows,
                in which the new tokens have their places: the mask is then [N or 1, 1, Q, L].
            num_outputs: number of leading positions whose readout is returned; None for all.

        Returns the readout, and keys and values of the new tokens [depth, N, Q, H, D].
        """
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        table = self.param("embedding", init, (c.vocab_size, c.width), c.param_dtype)
        x = layers.look_up(table, inputs)
        if c.learned_positions:
            x = x + LearnedPositions(c, name="positions")(positions)
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
    return x + make_linear(c, c.width, ("embed", "mlp"), "estimate", kernel_init=zeros)(embedded)


class LearnedPositions(nn.Module):
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
