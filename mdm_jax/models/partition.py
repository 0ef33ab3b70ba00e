"""Partition model: two groups of tokens predict each other in one pass; no mask token exists.

An encoder runs self-attention over clean tokens, each group for itself. A decoder of position
queries cross-attends to what the encoder made of the *other* group, so a pass of L tokens predicts
every token once, given the other group. Both groups see a start token, which stands for an empty
context. Tokens that are always visible (prompts) belong to both: the encoder reads them once with
each. Reference: Deschenaux et al. 2025 (PGM, arXiv 2505.18883); the network here is our own.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Whole
from mdm_jax.models import attention as attentions
from mdm_jax.models import layers
from mdm_jax.models.cross_entropy import Chunking, Deferred, Projection, Readout
from mdm_jax.models.kv_cache import KeyValues
from mdm_jax.models.layers import Kernel
from mdm_jax.models.transformer import (
    FeedForward,
    LearnedPositions,
    TransformerConfig,
    make_linear,
    make_norm,
    residual_init,
    run_blocks,
)
from mdm_jax.types import Array, PyTree

_ABSENT = (
    *("condition_on_logsnr", "self_conditioning", "experts", "num_kv_heads", "qkv_bias"),
    "scan_layers",
)
"""Settings of a transformer that this network does not have."""


class _Memory(nn.Module):
    """Keys and values of a decoder block, of the encoder's output [N, M, width]."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, encoded: Array, rotary: layers.Rotary) -> KeyValues:
        c = self.config
        shape = (*encoded.shape[:2], c.num_heads, c.head_size)
        k, v = (
            make_linear(c, c.num_heads * c.head_size, ("embed", "heads"), name)(encoded)
            for name in ("key", "value")
        )
        k = k.reshape(shape)
        k = make_norm(c, "key_norm", (None,))(k) if c.qk_norm else k
        return KeyValues(
            layers.apply_rotary(k, rotary).astype(c.dtype), v.reshape(shape).astype(c.dtype)
        )


class _DecoderBlock(nn.Module):
    """Cross-attention of queries [N, Q, width] to a memory, and a feed-forward layer."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, memory: KeyValues, seen: Array, rotary: layers.Rotary) -> Array:
        c = self.config
        size = c.num_heads * c.head_size
        q = make_linear(c, size, ("embed", "heads"), "query")(
            make_norm(c, "norm_1", kind=c.norm)(x)
        )
        q = q.reshape(*x.shape[:2], c.num_heads, c.head_size)
        q = make_norm(c, "query_norm", (None,))(q) if c.qk_norm else q
        q = layers.apply_rotary(q, rotary).astype(c.dtype)
        y = attentions.attention(q, *memory, seen, c.attention).reshape(*x.shape[:2], size)
        out = {"kernel_init": residual_init(c)}
        x = x + make_linear(c, c.width, ("heads", "embed"), "out", **out)(y)
        return x + FeedForward(c, c.hidden, name="mlp")(make_norm(c, "norm_2", kind=c.norm)(x))


class _Encoder(nn.Module):
    """Blocks of self-attention behind a start token: [N, M, width] to [N, M + 1, width]."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, x: Array, positions: Array | np.ndarray, same: Array) -> Array:
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None, "embed"))
        start = self.param("start", init, (1, 1, c.width), c.param_dtype).astype(jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(start, (x.shape[0], 1, c.width)), x], axis=1)
        # The start token sees itself; all see it.
        same = jnp.pad(same, ((0, 0), (0, 0), (1, 0), (0, 0)))
        same = jnp.pad(same, ((0, 0), (0, 0), (0, 0), (1, 0)), constant_values=True)
        return run_blocks(c, x, same, with_start(positions), None)[0]


class _Decoder(nn.Module):
    """Queries at positions to features [N, Q, width], over memories of every block."""

    config: TransformerConfig

    def setup(self):
        c = self.config
        self.memories = [_Memory(c) for _ in range(c.depth)]
        block = layers.rematerialised(_DecoderBlock, c.remat)
        self.blocks = [block(c) for _ in range(c.depth)]
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None, "embed"))
        self.query = self.param("query", init, (1, 1, c.width), c.param_dtype)
        self.norm = make_norm(c, "norm", kind=c.norm)

    def memory(self, encoded: Array, rotary: layers.Rotary) -> KeyValues:
        each = [memory(encoded, rotary) for memory in self.memories]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def __call__(
        self, memory: KeyValues, rotary: layers.Rotary, seen: Array, at: Array | None
    ) -> Array:
        shape = (*seen.shape[:1], seen.shape[2], self.config.width)
        query = self.query.astype(jnp.float32)
        x = jnp.broadcast_to(query if at is None else query + at, shape)
        for i, block in enumerate(self.blocks):
            x = block(x, jax.tree.map(lambda leaf, i=i: leaf[i], memory), seen, rotary)
        return self.norm(x)


class Partition(nn.Module):
    """Partition model: ``apply(params, inputs, logsnr, documents) -> logits``.

    As any masked network it takes rows with mask tokens [N, L], ignores the level, and returns
    float32 logits [N, L, K], which at masked positions are functions of the others: the groups are
    then the masked and the visible positions. :meth:`pair` takes any two groups of clean tokens.
    Of ``config.depth`` blocks the last ``decoder_depth`` are the decoder's.

    ValueError for a setting of a transformer that this network does not have, or a decoder that
    leaves no encoder.
    """

    config: TransformerConfig
    mask_id: int
    decoder_depth: Annotated[int, Whole("[1, 1e4]", "blocks", "of model.depth, the decoder's")] = 1

    def setup(self):
        c = self.config
        others = [name for name in _ABSENT if getattr(c, name)]
        others += ["qk_norm_over"] * (c.qk_norm_over != "head")
        if others:
            raise ValueError(f"a partition model has no {others[0]}; leave it at its default")
        if not 0 < self.decoder_depth < c.depth:
            raise ValueError(
                f"of depth {c.depth} the decoder has {self.decoder_depth} blocks and the encoder "
                "the rest; both need at least 1"
            )
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (c.vocab_size, c.width), c.param_dtype)
        depth = c.depth - self.decoder_depth
        self.encoder = _Encoder(dataclasses.replace(c, depth=depth))
        self.decoder = _Decoder(dataclasses.replace(c, depth=self.decoder_depth))
        if c.learned_positions:
            self.positions = LearnedPositions(c)
            self.query_positions = LearnedPositions(c)
        if not c.tie_embeddings:
            zeros, shape = nn.initializers.zeros, (c.width, c.vocab_size)
            self.head = Kernel(shape, ("embed", "vocab"), c.param_dtype, zeros)

    def __call__(
        self, inputs: Array, logsnr: Array | None = None, documents: Array | None = None
    ) -> Array:
        return self.readout(inputs, logsnr, documents).logits()

    def readout(
        self, inputs: Array, logsnr: Array | None = None, documents: Array | None = None
    ) -> Readout:
        """The call, up to the last product."""
        del logsnr
        return self.pair(inputs, inputs == self.mask_id, documents)

    def pair(
        self,
        tokens: Array,
        group: Array,
        documents: Array | None = None,
        shared: Array | None = None,
        copies: int = 0,
    ) -> Readout:
        """Every token of rows [N, L] from those of the other group; ``group`` [N, L] bool.

        Tokens at ``shared`` [N, L] are of both groups: all in the first ``copies`` positions, which
        the encoder reads once more.
        """
        documents = jnp.ones_like(tokens) if documents is None else documents
        positions = np.arange(tokens.shape[1])
        read, own, at, within = tokens, group, positions, documents
        if copies:
            group = own = group | shared
            again = jnp.where(shared, documents, 0)[:, :copies]
            read = jnp.concatenate([tokens, tokens[:, :copies]], axis=1)
            own = jnp.concatenate([group, jnp.zeros_like(again, bool)], axis=1)
            at = np.concatenate([positions, positions[:copies]])
            within = jnp.concatenate([documents, again], axis=1)
        memory = self.encode(read, at, _joined(within, within) & (own[:, :, None] == own[:, None]))
        seen = _joined(documents, within) & (group[:, :, None] != own[:, None])
        return self.decode(memory, positions, seen)

    def encode(self, tokens: Array, positions: Array | np.ndarray, same: Array) -> KeyValues:
        """Memories of the decoder's blocks, [decoder_depth, N, M + 1, H, D]; first the start.

        ``tokens`` [N, M] at ``positions`` [M] or [N, M] attend to each other where ``same`` [N, M,
        M] allows; to themselves they always do.
        """
        x = layers.look_up(self.embedding, tokens)
        x = x + self.positions(positions) if self.config.learned_positions else x
        same = same | jnp.eye(tokens.shape[1], dtype=bool)[None]
        encoded = self.encoder(x, positions, same[:, None])
        return self.decoder.memory(encoded, self._rotary(with_start(positions)))

    def decode(self, memory: KeyValues, positions: Array | np.ndarray, seen: Array) -> Readout:
        """Readout of queries at ``positions`` [Q] or [N, Q] that see ``seen`` [N, Q, M] of M tokens
        of the memory besides the start."""
        c = self.config
        seen = jnp.pad(seen, ((0, 0), (0, 0), (1, 0)), constant_values=True)[:, None]
        at = self.query_positions(positions) if c.learned_positions else None
        x = self.decoder(memory, self._rotary(positions + 1), seen, at)
        table = self.embedding if c.tie_embeddings else self.head()
        return Readout(x, table, Projection(c.tie_embeddings, c.dtype))

    def _rotary(self, positions: Array | np.ndarray) -> layers.Rotary:
        c = self.config
        return layers.rotary_embedding(positions, c.rotated, c.rope_base, c.rope_scaling)


def with_start(positions: Array | np.ndarray) -> Array | np.ndarray:
    """Positions [..., M] behind a start token, [..., M + 1]: those of tokens count from 1."""
    xp = np if isinstance(positions, np.ndarray) else jnp
    return xp.pad(positions + 1, ((0, 0),) * (positions.ndim - 1) + ((1, 0),))


def _joined(queries: Array, keys: Array) -> Array:
    """[N, Q, M]: whether two positions are of one document, and the key is no padding."""
    return (queries[:, :, None] == keys[:, None, :]) & (keys > 0)[:, None, :]


def pair_apply(
    model: Partition, chunking: Chunking | None = None, prompt_length: int = 0
) -> Callable[..., Readout]:
    """``apply`` for ``objectives.partition_nelbo``: rows [N, 2 L] whose halves mask a group each.

    Tokens that neither half masks are of both groups; of those that a document attends to, all must
    be among the first ``prompt_length`` (of L), which cost as many tokens of the encoder more.
    """

    def apply(
        params: PyTree, inputs: Array, logsnr: Array | None, documents: Array | None = None
    ) -> Array | Readout:
        del logsnr
        masked, other = jnp.split(inputs, 2, axis=-1)
        group = masked == model.mask_id
        tokens, shared = jnp.where(group, other, masked), masked == other
        given = (params, tokens, group, documents, shared, prompt_length)
        return model.apply(*given, method="pair").chunked(chunking)

    return apply


def revealed_apply(model: Partition, sizes: int = 8) -> Callable[..., Deferred]:
    """``apply`` for samplers: the encoder runs on revealed tokens, the decoder where it is read.

    Shapes are static, so the encoder has ``sizes`` of them, multiples of L / sizes tokens; a batch
    takes the least that holds the revealed tokens of each row. Logits are as of the whole network.
    """

    def apply(
        params: PyTree, inputs: Array, logsnr: Array | None = None, documents: Array | None = None
    ) -> Deferred:
        del logsnr
        length = inputs.shape[1]
        documents = jnp.ones_like(inputs) if documents is None else documents
        visible = (inputs != model.mask_id) & (documents > 0)
        count = jnp.sum(visible, axis=1)
        order = jnp.argsort(~visible, axis=1, stable=True)
        tokens, groups = (jnp.take_along_axis(a, order, 1) for a in (inputs, documents))
        groups = jnp.where(jnp.arange(length)[None] < count[:, None], groups, 0)  # 0: not seen

        def encoded(size: int) -> KeyValues:
            part = groups[:, :size]
            memory = model.apply(
                params, tokens[:, :size], order[:, :size], _joined(part, part), method="encode"
            )
            rest = ((0, 0), (0, 0), (0, length - size), (0, 0), (0, 0))
            return jax.tree.map(lambda leaf: jnp.pad(leaf, rest), memory)

        steps = sorted({-(-length * i // sizes) for i in range(1, sizes + 1)})
        index = jnp.searchsorted(jnp.array(steps), jnp.max(count))
        branches = [lambda size=size: encoded(size) for size in steps]
        memory = jax.lax.switch(index, branches)

        def read(positions: Array | None) -> Readout:
            if positions is None:
                positions, own = jnp.arange(length), documents
            else:
                own = jnp.take_along_axis(documents, positions, 1)
            seen = _joined(own, groups)
            return model.apply(params, memory, positions, seen, method="decode")

        return Deferred(read)

    return apply
