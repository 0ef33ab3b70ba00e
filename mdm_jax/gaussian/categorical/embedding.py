"""Token embeddings under Gaussian noise: network, score interpolation, self-conditioning.

A token v is the vector e_v of D numbers with norm sqrt(D), so that data have variance 1, and the
mask token is the zero vector. Dieleman et al. 2022 (CDCD, arXiv 2211.15089), sections 3 and 4.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.gaussian.paths import Path
from mdm_jax.models import layers
from mdm_jax.models.cross_entropy import Chunking, Projection, Readout
from mdm_jax.models.layers import Kernel
from mdm_jax.models.masks import within_documents
from mdm_jax.models.transformer import TransformerConfig, level_condition, make_linear, run_blocks
from mdm_jax.types import Array, PyTree

_LEAST_SQUARE = 1e-12


class NoisyTokens(NamedTuple):
    """Inputs of an :class:`EmbeddingTransformer`, rows of L elements.

    Attributes:
        tokens: [N, L] int32; the mask token, a zero vector, where unknown.
        noise: [N, L, D], added to ``alpha e``: ``sigma eps``, or all of x where tokens are masked.
        given: [N, L] bool; there the embedding is clean.
        estimate: [N, L, D] an earlier estimate of the clean embeddings; None: zeros.
        twice: [N] bool, rows that get their estimate from a first pass, without gradient, by
            :func:`embedding_apply`; None: no first pass.
    """

    tokens: Array
    noise: Array
    given: Array
    estimate: Array | None = None
    twice: Array | None = None


def unit_embeddings(table: Array, mask_id: int) -> Array:
    """Rows of ``table`` [K, D] scaled to the norm sqrt(D), float32; the mask token's is zero."""
    table = table.astype(jnp.float32)
    square = jnp.mean(jnp.square(table), axis=-1, keepdims=True)
    is_mask = jax.lax.broadcasted_iota(jnp.int32, square.shape, 0) == mask_id
    return jnp.where(is_mask, 0.0, table * jax.lax.rsqrt(jnp.maximum(square, _LEAST_SQUARE)))


class EmbeddingTransformer(nn.Module):
    """Transformer over noisy embeddings: ``apply(params, inputs, logsnr, documents) -> logits``.

    ``inputs`` are :class:`NoisyTokens`, or clean int tokens [N, L]; ``logsnr`` [N, S] drives the
    norms (adaLN-zero). The noisy embeddings are scaled to unit variance (EDM's c_in, data of
    variance 1). Given positions are marked by a learned vector; the estimate enters through a
    projection that begins at zero. :meth:`readout` stops before the logits [N, L, K];
    :meth:`embeddings` is the table [K, D] of :func:`unit_embeddings`. ``size`` is D and
    ``noising`` the path.
    """

    config: TransformerConfig
    size: int
    mask_id: int
    noising: Path

    def setup(self) -> None:
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        self.table = self.param("embedding", init, (c.vocab_size, self.size), c.param_dtype)

    def embeddings(self) -> Array:
        return unit_embeddings(self.table, self.mask_id)

    def __call__(
        self,
        inputs: NoisyTokens | Array,
        logsnr: Array | None = None,
        documents: Array | None = None,
    ) -> Array:
        return self.readout(inputs, logsnr, documents).logits()

    @nn.compact
    def readout(
        self,
        inputs: NoisyTokens | Array,
        logsnr: Array | None = None,
        documents: Array | None = None,
    ) -> Readout:
        """The call, up to the last product."""
        c = self.config
        if not isinstance(inputs, NoisyTokens):
            shape = (*inputs.shape, self.size)
            given = jnp.ones(inputs.shape, bool)
            inputs = NoisyTokens(inputs, jnp.zeros(shape, jnp.float32), given)
        length = inputs.tokens.shape[-1]
        condition = level_condition(c, logsnr, length)
        level = jnp.repeat(logsnr, length // logsnr.shape[-1], axis=-1)[..., None]
        clean = layers.look_up(self.embeddings(), inputs.tokens)
        noisy = self.noising.alpha(level) * clean + inputs.noise
        # 1 / sqrt(alpha^2 + sigma^2), for data of variance 1.
        scale = jnp.exp(0.5 * jax.nn.log_sigmoid(level) - self.noising.log_alpha(level))
        given = inputs.given[..., None]
        x = make_linear(c, c.width, (None, "embed"), "embed")(
            jnp.where(given, clean, scale * noisy)
        )
        init = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
        marker = self.param("given", init, (c.width,), c.param_dtype)
        x = x + jnp.where(given, marker[None, None], 0.0)
        if c.self_conditioning:
            estimate = jnp.zeros_like(clean) if inputs.estimate is None else inputs.estimate
            zeros = {"kernel_init": nn.initializers.zeros}
            x = x + make_linear(c, c.width, (None, "embed"), "estimate", **zeros)(estimate)
        mask = None if documents is None else within_documents(documents)
        x, _ = run_blocks(c, x, mask, np.arange(length), condition)
        shape = (c.width, c.vocab_size)
        head = Kernel(shape, ("embed", "vocab"), c.param_dtype, nn.initializers.zeros, name="head")
        return Readout(x, head(), Projection(False, c.dtype, (self.mask_id,)))


def embedding_apply(
    model: EmbeddingTransformer, chunking: Chunking | None = None
) -> Callable[..., Readout]:
    """``apply_fn(params, inputs, logsnr, documents) -> Readout``, two passes where asked.

    The rows ``inputs.twice`` get the :func:`posterior_mean` of a first pass, without gradient, as
    their estimate (Chen et al. 2022, Analog Bits); the others ``inputs.estimate``.
    """
    chunking = Chunking() if chunking is None else chunking

    def apply_fn(
        params: PyTree, inputs: Any, logsnr: Array | None = None, documents: Array | None = None
    ) -> Readout:
        def run(inputs: Any) -> Readout:
            return model.apply(params, inputs, logsnr, documents, method="readout")

        if isinstance(inputs, NoisyTokens) and inputs.twice is not None:
            table = model.apply(params, method="embeddings")
            first = run(inputs._replace(twice=None)).chunked(chunking)
            mean = jax.lax.stop_gradient(posterior_mean(first, table))
            mean = jnp.where(inputs.given[..., None], table[inputs.tokens], mean)
            old = jnp.zeros_like(mean) if inputs.estimate is None else inputs.estimate
            estimate = jnp.where(inputs.twice[:, None, None], mean, old)
            inputs = inputs._replace(estimate=jax.lax.stop_gradient(estimate), twice=None)
        return run(inputs).chunked(chunking)

    return apply_fn


def posterior_mean(
    outputs: Readout, table: Array, adjust: Callable[[Array], Array] = lambda logits: logits
) -> Array:
    """Score interpolation: E[embedding | noisy row] = ``sum_v p(v) e_v`` [N, L, D], float32.

    ``p`` is the softmax of the readout's logits, which ``adjust`` may change first, and ``table``
    [K, D] holds the embeddings. A chunk of positions has logits at a time. Dieleman et al. 2022
    (CDCD), section 3.1.
    """

    def mean(features: Array) -> Array:
        logits = outputs.projection(features, outputs.weights, outputs.bias)
        return jax.nn.softmax(adjust(logits), axis=-1) @ table

    return _by_positions(mean, outputs.features, outputs.chunking, outputs.num_tokens)


def nearest_tokens(vectors: Array, table: Array, excluded: tuple[int, ...] = ()) -> Array:
    """[N, L] int32 tokens whose embeddings have the largest product with ``vectors`` [N, L, D].

    With rows of ``table`` [K, D] of one norm they are the nearest; ``excluded`` ids are left out.
    """
    projection = Projection(True, jnp.float32, excluded)

    def nearest(vectors: Array) -> Array:
        return jnp.argmax(projection(vectors, table, None), axis=-1).astype(jnp.int32)

    return _by_positions(nearest, vectors, Chunking(), table.shape[0])


def _by_positions(
    function: Callable[[Array], Array], rows: Array, chunking: Chunking, num_tokens: int
) -> Array:
    """``function`` of [N, L, ...] rows, whose result has K numbers per position at some time."""
    flat = rows.reshape(-1, *rows.shape[2:])
    size = dataclasses.replace(chunking, groups=1).size(flat.shape[0], num_tokens)
    found = jax.lax.map(function, flat, batch_size=size)
    return found.reshape(*rows.shape[:2], *found.shape[1:])
