"""Block diffusion and autoregressive models from a transformer: training passes and decoders.

Both use the parameters of plain masked diffusion. A block model cuts a row into blocks of L' tokens
and models each given the *clean* blocks before it (Arriola et al. 2025, BD3-LM). An autoregressive
model reads token i - 1 at position i, and the start token (as a rule the mask token) where a
document begins. Documents are int32 of the shape of the tokens, 0 for padding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.models.cross_entropy import Chunking, Readout, shifted_apply
from mdm_jax.models.kv_cache import (
    KeyValueCache,
    KeyValues,
    RowKeyValues,
    append,
    cached_positions,
    new_cache,
    renew,
    take_rows,
)
from mdm_jax.models.masks import (
    AnyRule,
    BlockCausal,
    CachedRule,
    DenseRule,
    Full,
    Rule,
    block_training,
    causal,
    check_blocks,
    check_document_blocks,
    within_documents,
)
from mdm_jax.types import Array, PyTree

if TYPE_CHECKING:  # Flax is not needed to write a sampler
    from mdm_jax.models.transformer import Transformer


class BlockDecoder(NamedTuple):
    """Block decoding for generators: the next block given the finished ones.

    Attributes:
        init: ``init(num_rows, length) -> memory`` of empty rows.
        logits: ``logits(params, memory, tokens [N, L'], logsnr [N, 1], documents, estimate=None) ->
            [N, L', K]`` of the next, noised block; ``estimate`` [N, L', K]: self-conditioning.
        append: ``append(params, memory, tokens [N, c L'], documents) -> memory``, c blocks.
        take_rows: ``take_rows(memory, rows [N'] int32) -> memory`` of some of the rows.
    """

    block_size: int
    init: Callable[[int, int], PyTree]
    logits: Callable[..., Array]
    append: Callable[..., PyTree]
    take_rows: Callable[[PyTree, Array], PyTree]


class CausalDecoder(NamedTuple):
    """Autoregressive decoding for generators; ``init`` as of :class:`BlockDecoder`.

    Attributes:
        append: ``append(params, memory, tokens [N, P], documents [N, P]) -> memory``: the first P
            tokens of every row in one pass. Only at the beginning.
        step: ``step(params, memory, previous [N], documents [N]) -> (logits [N, K], memory)`` for
            the next position; ``previous`` is the token before it, not read at position 0.
    """

    init: Callable[[int, int], PyTree]
    append: Callable[..., PyTree]
    step: Callable[..., tuple[Array, PyTree]]


class PartialDecoder(NamedTuple):
    """A bidirectional network that runs some positions of rows; the others' results are stored.

    Attributes:
        init: ``init(num_rows, length) -> RowStore`` of rows that no pass has run.
        run: ``run(params, store, tokens [R, L], logsnr [R, 1], documents, rows [R]) -> store``: all
            positions of some rows; one whose number is beyond the store is not written.
        update: ``update(params, store, tokens [N, L], logsnr, documents, slots [N, C]) -> store``:
            the positions ``slots`` of every row; L where fewer are wanted.
        readout: ``readout(params, features [N, L, D], documents) -> Readout``.
        shift: outputs at i - 1 predict token i.
    """

    init: Callable[[int, int], RowStore]
    run: Callable[..., RowStore]
    update: Callable[..., RowStore]
    readout: Callable[..., Readout]
    shift: bool


MaskChange = Callable[[Rule, np.ndarray], AnyRule]
"""``change(rule, positions [M]) -> rule``: another mask for a pass, e.g. ``masks.annealed``."""


def _unchanged(rule: Rule, _positions: np.ndarray) -> AnyRule:
    return rule


def masked_apply(
    model: Transformer, change: MaskChange, chunking: Chunking | None = None
) -> Callable[..., Array | Readout]:
    """The ``apply_fn`` of ``objectives.masked_nelbo`` with another attention mask.

    As the model's own ``apply``, but where that attends to all of a document, this attends to what
    ``change`` leaves of it. ``chunking`` as of :func:`block_apply`.
    """

    def apply_fn(
        params: PyTree,
        inputs: Array,
        logsnr: Array | None = None,
        documents: Array | None = None,
        estimate: Array | None = None,
    ) -> Array | Readout:
        length = inputs.shape[-1]
        positions = np.arange(length)
        rule = change(Rule(Full((length, length)), documents), positions)
        options = {"estimate": estimate, "method": "attend_readout"}
        readout, _ = model.apply(params, inputs, logsnr, positions, rule, **options)
        return readout.chunked(chunking)

    return apply_fn


def block_apply(
    model: Transformer,
    block_size: int,
    window: int | None = None,
    chunking: Chunking | None = None,
    change: MaskChange = _unchanged,
) -> Callable[..., Array | Readout]:
    """The ``apply_fn`` of ``objectives.block_nelbo``: all blocks of a row in one pass.

    Args:
        block_size, window: L', and blocks that a block attends to, itself included; None for all.
        chunking: of losses; if given, ``apply_fn`` returns a readout instead of logits.
        change: of the attention mask (:func:`masked_apply`).

    Returns ``apply_fn(params, inputs [N, 2L], logsnr [N, S], documents [N, L], estimate=None)`` of
    the noised and the clean row (level +inf) side by side, giving logits [N, L, K] of the noised
    one, to which levels, documents and ``estimate`` [N, L, K] refer. ValueError if 2L is odd, L'
    does not divide L, or as ``masks.check_document_blocks``.
    """

    def apply_fn(
        params: PyTree,
        inputs: Array,
        logsnr: Array | None = None,
        documents: Array | None = None,
        estimate: Array | None = None,
    ) -> Array | Readout:
        if inputs.shape[-1] % 2:
            raise ValueError(
                "a block model takes the noised row and the clean row side by side, [N, 2L]; got "
                f"{inputs.shape}"
            )
        length = inputs.shape[-1] // 2
        check_document_blocks(documents, block_size)
        mask = block_training(length, block_size, window, documents)
        positions = np.tile(np.arange(length), 2)
        if logsnr is not None:
            logsnr = jnp.concatenate([logsnr, jnp.full_like(logsnr, jnp.inf)], axis=-1)
        if estimate is not None:
            estimate = jnp.pad(estimate, ((0, 0), (0, length), (0, 0)))
        options = {"estimate": estimate, "num_outputs": length, "method": "attend_readout"}
        rule = change(mask, positions)
        readout, _ = model.apply(params, inputs, logsnr, positions, rule, **options)
        return readout.chunked(chunking)

    return apply_fn


def causal_apply(
    model: Transformer,
    start_token: int,
    window: int | None = None,
    chunking: Chunking | None = None,
) -> Callable[..., Array | Readout]:
    """The ``apply_fn`` of ``objectives.next_token``; see :func:`block_apply` for ``chunking``.

    Args:
        start_token: input before the first token of a document, as a rule the mask token.
        window: tokens that a position attends to, its own input included; None for all.

    Returns ``apply_fn(params, tokens [N, L], logsnr, documents) -> logits [N, L, K]``; those at
    position i depend on the *clean* tokens before i alone. ``logsnr`` is not read; a network
    conditioned on it gets +inf.
    """

    def apply_fn(
        params: PyTree,
        inputs: Array,
        logsnr: Array | None = None,
        documents: Array | None = None,
    ) -> Array | Readout:
        del logsnr
        length = inputs.shape[-1]
        mask = causal(length, window, documents)
        shifted = shift_right(inputs, start_token, documents)
        readout, _ = model.apply(
            params, shifted, _clean(inputs), np.arange(length), mask, method="attend_readout"
        )
        return readout.chunked(chunking)

    return apply_fn


def shift_right(tokens: Array, start_token: int, documents: Array | None = None) -> Array:
    """[N, L] int32: the token before each position, the start token where a document begins."""
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=start_token)
    if documents is None:
        return before
    begins = documents != jnp.pad(documents[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jnp.where(begins, start_token, before)


# --- decoders with a KV cache -------------------------------------------------------------------


def cached_block_decoder(
    model: Transformer, block_size: int, window: int | None = None
) -> BlockDecoder:
    """Block decoding with a KV cache of the finished blocks: a pass runs L' tokens, not the row.

    Equals :func:`block_apply`. With a window (>= 1) the cache holds ``window - 1`` blocks, so rows
    may be longer than in training. ``init`` raises ValueError unless L' divides the length.
    """

    def init(num_rows: int, length: int) -> KeyValueCache:
        num_blocks = check_blocks(length, block_size, window)
        remembered = num_blocks if window is None else min(window, num_blocks)
        return new_cache(model.config, num_rows, max(remembered - 1, 1) * block_size)

    def logits(params, cache, tokens, logsnr, documents, estimate=None) -> Array:
        return _run_cached(
            model, params, cache, tokens, logsnr, documents, block_size, window, estimate
        )[0]

    def append_blocks(params, cache, tokens, documents) -> KeyValueCache:
        check_blocks(tokens.shape[-1], block_size)
        _, new = _run_cached(
            model, params, cache, tokens, _clean(tokens), documents, block_size, window
        )
        return append(cache, new, documents)

    return BlockDecoder(block_size, init, logits, append_blocks, take_rows)


class CausalMemory(NamedTuple):
    """State of :func:`cached_causal_decoder`; ``document`` [N] is the last one, -1 at first."""

    cache: KeyValueCache
    document: Array


def cached_causal_decoder(
    model: Transformer, start_token: int, window: int | None = None
) -> CausalDecoder:
    """Autoregressive decoding with a KV cache: a step runs one token.

    Equals :func:`causal_apply`. With a window (>= 1) the cache holds ``window - 1`` tokens.
    """

    def init(num_rows: int, length: int) -> CausalMemory:
        check_blocks(length, 1, window)
        remembered = length if window is None else min(window, length)
        cache = new_cache(model.config, num_rows, max(remembered - 1, 1))
        return CausalMemory(cache, jnp.full((num_rows,), -1, jnp.int32))

    def run(params, memory, inputs, documents) -> tuple[Array, CausalMemory]:
        cache, level = memory.cache, _clean(inputs)
        logits, new = _run_cached(model, params, cache, inputs, level, documents, 1, window)
        return logits, CausalMemory(append(cache, new, documents), documents[:, -1])

    def append_tokens(params, memory, tokens, documents) -> CausalMemory:
        return run(params, memory, shift_right(tokens, start_token, documents), documents)[1]

    def step(params, memory, previous, documents) -> tuple[Array, CausalMemory]:
        inputs = jnp.where(documents == memory.document, previous, start_token)
        logits, memory = run(params, memory, inputs[:, None], documents[:, None])
        return logits[:, 0], memory

    return CausalDecoder(init, append_tokens, step)


def _run_cached(
    model: Transformer,
    params: PyTree,
    cache: KeyValueCache,
    tokens: Array,
    logsnr: Array | None,
    documents: Array,
    block_size: int,
    window: int | None,
    estimate: Array | None = None,
) -> tuple[Array, KeyValues]:
    """Logits [N, Q, K], keys and values of the next tokens, block-causal over the cache."""
    positions = cache.written + jnp.arange(tokens.shape[-1])
    keys = jnp.concatenate([cached_positions(cache), positions])
    key_documents = jnp.concatenate([cache.documents, documents], axis=-1)
    pattern = BlockCausal(tokens.shape[-1], block_size, window)
    mask = CachedRule(pattern, positions, keys, documents, key_documents)
    options = {"cached": cache.key_values, "estimate": estimate, "method": "attend"}
    return model.apply(params, tokens, logsnr, positions, mask, **options)


def _clean(tokens: Array) -> Array:
    return jnp.full((tokens.shape[0], 1), jnp.inf)


# --- whole rows, some positions computed anew ---------------------------------------------------


class RowStore(NamedTuple):
    """What the last pass over each position gave: ``key_values`` [depth, N, L, H, D], features
    [N, L, D] before the product with the vocabulary."""

    key_values: KeyValues
    features: Array


def partial_decoder(
    model: Transformer,
    *,
    shift: bool = False,
    positions: Callable[[Array], Array] | None = None,
) -> PartialDecoder:
    """Passes over some positions of rows of a bidirectional network, for approximate KV caches.

    Tokens depend on *all* others, so stored keys and values are out of date as soon as any token
    changes: results are approximate unless every position is run after every change. ``shift``:
    outputs at i - 1 predict token i. ``positions(documents [N, L]) -> [N, L]`` are those of tokens
    in rows with padding, None: 0, 1, ....
    """

    def init(num_rows: int, length: int) -> RowStore:
        key_values = new_cache(model.config, num_rows, length).key_values
        return RowStore(key_values, jnp.zeros((num_rows, length, model.config.width)))

    def places(documents: Array | None, length: int) -> Array | np.ndarray:
        if positions is None or documents is None:
            return np.arange(length)
        return positions(documents)

    def run(params, store, tokens, logsnr, documents, rows) -> RowStore:
        mask = None if documents is None else within_documents(documents)
        where = places(documents, tokens.shape[-1])
        readout, new = model.apply(params, tokens, logsnr, where, mask, method="attend_readout")
        key_values = jax.tree.map(
            lambda old, x: old.at[:, rows].set(x.astype(old.dtype), mode="drop"),
            store.key_values,
            new,
        )
        features = store.features.at[rows].set(readout.features, mode="drop")
        return RowStore(key_values, features)

    def update(params, store, tokens, logsnr, documents, slots) -> RowStore:
        num_rows, length = tokens.shape
        picked = jnp.minimum(slots, length - 1)
        take = functools.partial(jnp.take_along_axis, indices=picked, axis=-1)
        mask, where = None, picked
        if documents is not None:
            segments = within_documents(documents).segments()
            mask = DenseRule((take(segments)[:, :, None] == segments[:, None])[:, None])
            where = take(jnp.broadcast_to(places(documents, length), tokens.shape))
        number = jnp.broadcast_to(jnp.arange(slots.shape[1], dtype=jnp.int32), slots.shape)
        source = (
            jnp.full(tokens.shape, -1)
            .at[jnp.arange(num_rows)[:, None], slots]
            .set(number, mode="drop")
        )
        depth = len(store.key_values.keys)
        cached = RowKeyValues(*store.key_values, jnp.broadcast_to(source, (depth, *source.shape)))
        readout, new = model.apply(
            params, take(tokens), logsnr, where, mask, cached=cached, method="attend_readout"
        )
        return RowStore(
            jax.vmap(RowKeyValues.joined)(cached, new),
            renew(store.features, readout.features, source),
        )

    def readout(params, features, documents) -> Readout:
        # The compiler removes this pass: of its results only the weights of the output are read.
        blank = jnp.zeros((1, 1), jnp.int32)
        with_weights, _ = model.apply(
            params, blank, jnp.zeros((1, 1)), np.arange(1), None, method="attend_readout"
        )

        def given(_, features: Array, *__) -> Readout:
            return dataclasses.replace(with_weights, features=features)

        return (shifted_apply(given) if shift else given)(params, features, None, documents)

    return PartialDecoder(init, run, update, readout, shift)


# --- decoders of any network, without a cache ---------------------------------------------------


class WrittenRow(NamedTuple):
    """State of the recomputing decoders: int32 rows [N, L], zero beyond ``written`` [] tokens."""

    tokens: Array
    documents: Array
    written: Array


def recomputing_block_decoder(apply_fn: Callable[..., Array], block_size: int) -> BlockDecoder:
    """Block decoding of an ``apply_fn`` as of :func:`block_apply`: a pass runs both whole rows."""

    def init(num_rows: int, length: int) -> WrittenRow:
        check_blocks(length, block_size)
        return _empty_row(num_rows, length)

    def logits(params, row, tokens, logsnr, documents, estimate=None) -> Array:
        noised, options = _write(row, tokens, documents), {}
        if estimate is not None:
            zeros = jnp.zeros((*row.tokens.shape, estimate.shape[-1]), estimate.dtype)
            options = {"estimate": _put(zeros, estimate, row.written)}
        inputs = jnp.concatenate([noised.tokens, row.tokens], axis=-1)
        row_logits = apply_fn(params, inputs, logsnr, noised.documents, **options)
        return jax.lax.dynamic_slice_in_dim(row_logits, row.written, block_size, axis=1)

    def append_blocks(params, row, tokens, documents) -> WrittenRow:
        del params
        check_blocks(tokens.shape[-1], block_size)
        return _write(row, tokens, documents)

    def take(row: WrittenRow, rows: Array) -> WrittenRow:
        return WrittenRow(row.tokens[rows], row.documents[rows], row.written)

    return BlockDecoder(block_size, init, logits, append_blocks, take)


def recomputing_causal_decoder(apply_fn: Callable[..., Array]) -> CausalDecoder:
    """Decoding of an ``apply_fn`` as of :func:`causal_apply`: every step runs the whole row."""

    def append_tokens(params, row, tokens, documents) -> WrittenRow:
        del params
        return _write(row, tokens, documents)

    def step(params, row, previous, documents) -> tuple[Array, WrittenRow]:
        position = row.written
        tokens = row.tokens.at[:, jnp.maximum(position - 1, 0)].set(previous)
        row = WrittenRow(tokens, row.documents.at[:, position].set(documents), position + 1)
        logits = apply_fn(params, row.tokens, None, row.documents)
        return jax.lax.dynamic_index_in_dim(logits, position, axis=1, keepdims=False), row

    return CausalDecoder(_empty_row, append_tokens, step)


def _empty_row(num_rows: int, length: int) -> WrittenRow:
    row = jnp.zeros((num_rows, length), jnp.int32)
    return WrittenRow(row, row, jnp.zeros((), jnp.int32))


def _write(row: WrittenRow, tokens: Array, documents: Array) -> WrittenRow:
    return WrittenRow(
        _put(row.tokens, tokens, row.written),
        _put(row.documents, documents, row.written),
        row.written + tokens.shape[-1],
    )


def _put(row: Array, values: Array, position: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(row, values, position, axis=1)
