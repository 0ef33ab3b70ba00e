"""The diffusion transformer (DiT) of MDLM, BD3-LM and Duo, a second body under the same calls."""

import dataclasses
import math
from typing import Annotated, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mdm_jax.checks import Name, Plain, Whole, checked
from mdm_jax.models import attention as attentions
from mdm_jax.models import layers
from mdm_jax.models.cross_entropy import Projection, Readout
from mdm_jax.models.kv_cache import KeyValues, RowKeyValues
from mdm_jax.models.layers import Kernel, Linear, Rotary
from mdm_jax.models.masks import AnyRule
from mdm_jax.models.products import product
from mdm_jax.models.transformer import (
    ROWS,
    Attention,
    FeedForward,
    Transformer,
    check_levels,
    make_norm,
    modulation,
    stack_blocks,
)
from mdm_jax.schedules.coordinates import log_survival_probability
from mdm_jax.sharding import constrain
from mdm_jax.types import Array

LEAST_SURVIVAL = 1e-3
"""Survival probability at the end of the schedules that these models are trained with."""

NUM_FEATURES = 256
"""Of a noise level."""


@checked
@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape and arithmetic of a :class:`DiT`; settings as of ``TransformerConfig``.

    ValueError for settings out of range or unknown names, and unless 2 num_heads divide the width.
    """

    vocab_size: Annotated[int, Whole("[1, 2e9]", "tokens", "K, including the mask token")]
    width: Annotated[int, Whole("[2, 1e6]", "", "of the residual stream")] = 768
    depth: Annotated[int, Whole("[1, 1e4]", "blocks", "attention and MLP, one after another")] = 12
    num_heads: Annotated[int, Whole("[1, 1e4]", "heads", "of attention; 2 num_heads | width")] = 12
    condition_width: Annotated[int, Whole("[1, 1e6]", "", "of what drives the norms")] = 128
    condition_on_logsnr: Annotated[bool, Plain(bool, "else the level counts as clean")] = False
    scan_layers: Annotated[bool, Plain(bool, "one compiled block, scanned over depth")] = False
    attention: Annotated[str, Name(tuple(attentions.CHOICES), "auto: best of the device")] = "auto"
    remat: Annotated[str, Name(tuple(layers.POLICIES), "what the backward pass recomputes")] = (
        "none"
    )
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    # What else the layers of models.transformer read.
    mlp: ClassVar[str] = "gelu"
    norm_eps: ClassVar[float] = 1e-5
    norm_rounded: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False
    qkv_bias: ClassVar[bool] = False

    def __post_init__(self):
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"width {self.width} must be a multiple of 2 * num_heads = {2 * self.num_heads} "
                "(the rotary embedding needs an even head size)"
            )

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads


class DiTBlock(nn.Module):
    """Attention and feed-forward of 4 widths; LayerNorms are scaled, then adapted (adaLN-zero)."""

    config: DiTConfig
    layer: int

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: AnyRule | Array | None,
        rotary: Rotary,
        condition: Array,
        cached: KeyValues | RowKeyValues | None,
    ) -> tuple[Array, KeyValues]:
        c, x = self.config, layers.named_input(x)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation(c, 6, condition, x)
        h = make_norm(c, "norm_1", kind="layer")(x) * (1 + scale_1) + shift_1
        y, new = Attention(c, name="attention")(h, mask, rotary, cached)
        x = x + gate_1 * y
        h = make_norm(c, "norm_2", kind="layer")(x) * (1 + scale_2) + shift_2
        y = FeedForward(c, 4 * c.width, use_bias=True, name="mlp")(h)
        return constrain(x + gate_2 * y, *ROWS), new


class DiT(Transformer):
    """Diffusion transformer: ``apply(params, inputs, logsnr, documents) -> logits``.

    Calls are those of :class:`~mdm_jax.models.transformer.Transformer`, so objectives, samplers
    and decoders take either; there is no self-conditioning. Differences, as the original class has
    them: norms are LayerNorms that are scaled even where they are driven by the level; levels enter
    as ``sigma = -log(survival probability)``, at most ``-log(LEAST_SURVIVAL)``, through
    :func:`noise_features`; feed-forward layers and the output have biases. Without
    ``condition_on_logsnr`` sigma is 0 and the same parameters exist. The original's dropout of 0.1
    in training is not applied. References: Peebles & Xie 2022; Sahoo et al. 2024 (MDLM).
    """

    config: DiTConfig

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
        sigma: Array | None = None,
        weights: Array | None = None,
    ) -> tuple[Readout, KeyValues]:
        """As :meth:`Transformer.attend_readout`, with inputs and levels in other forms too.

        Args:
            inputs: [N, Q] tokens, [N, Q, K] probabilities of tokens, or [N, Q, k] tokens of
                ``weights``.
            sigma: [N, S] in place of ``logsnr``, any number.
            weights: [N, Q, k] of mixed tokens, for Duo; None: one token per position.

        ValueError for an estimate, and for levels as of a call.
        """
        c, length = self.config, inputs.shape[1]
        if estimate is not None:
            raise ValueError("a DiT has no self-conditioning; leave out the estimate")
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        table = self.param("embedding", init, (c.vocab_size, c.width), c.param_dtype)
        x = _embed(table, inputs, weights)
        if not c.condition_on_logsnr:
            sigma = jnp.zeros((1, 1))
        elif sigma is None:
            check_levels(logsnr, length)
            sigma = jnp.minimum(-log_survival_probability(logsnr), -math.log(LEAST_SURVIVAL))
        linear = {"use_bias": True, "param_dtype": c.param_dtype}
        h = Linear(c.condition_width, (None, "mlp"), name="level_1", **linear)(
            noise_features(sigma)
        )
        condition = Linear(c.condition_width, ("mlp", None), name="level_2", **linear)(
            jax.nn.silu(h)
        )
        rotary = layers.rotary_embedding(positions, c.head_size)
        x, key_values = stack_blocks(c, DiTBlock, x, mask, rotary, condition, cached)
        shift, scale = modulation(c, 2, condition, x)
        x = make_norm(c, "norm", kind="layer")(x) * (1 + scale) + shift
        shape, zeros = (c.width, c.vocab_size), nn.initializers.zeros
        kernel = Kernel(shape, ("embed", "vocab"), c.param_dtype, zeros, name="head")()
        init = nn.with_logical_partitioning(zeros, ("vocab",))
        bias = self.param("head_bias", init, (c.vocab_size,), c.param_dtype)
        readout = Readout(x[:, :num_outputs], kernel, Projection(False, c.dtype), bias=bias)
        return readout, key_values


def noise_features(sigma: Array) -> Array:
    """Features [..., 256] of noise levels [...]: cosines, then sines, of falling frequencies."""
    half = NUM_FEATURES // 2
    frequency = jnp.exp(-math.log(10_000) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = sigma.astype(jnp.float32)[..., None] * frequency.reshape((1,) * sigma.ndim + (-1,))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _embed(table: Array, inputs: Array, weights: Array | None) -> Array:
    if jnp.issubdtype(inputs.dtype, jnp.floating):
        return product("nlk,kd->nld", inputs, table, jnp.float32)
    if weights is None:
        return layers.look_up(table, inputs)
    rows = layers.look_up(table, inputs.reshape(len(inputs), -1)).reshape(*inputs.shape, -1)
    return jnp.sum(rows * weights[..., None], axis=-2)
