"""Block diffusion with any parameters of a transformer: all blocks at once, or one after another.

A row is cut into blocks of L' tokens. The law of block b given the *clean* blocks before it is a
masked diffusion model; with one block it is the plain model, with blocks of one token an
autoregressive one. Nothing is added to the parameters, so a network that was trained on whole rows
can go on as a block model.

Reference: Arriola et al. 2025 (BD3-LM).

The autoregressive model with the same transformer: token i from the tokens before it.

The input at place i is token i - 1; at the first place, and at the first of every document, it is
the start token, for which the mask token serves. So the parameters are those of a masked diffusion
model, and what place i sees is what a block model with blocks of one token sees.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.models.cross_entropy import Chunking, Readout, finish
from mdm_jax.models.kv_cache import KeyValueCache, append, attend_with_cache, new_cache, take_rows
from mdm_jax.models.masks import block_training, causal, check_blocks
from mdm_jax.models.transformer import Transformer
from mdm_jax.types import Array, PyTree


class BlockDecoder(NamedTuple):
    """A block model as a generator uses it: the next block given those that are finished.

    Attributes:
        block_size: L'.
        init: ``init(num_rows, length) -> memory`` of rows of which nothing is written yet.
        logits: ``logits(params, memory, tokens [N, L'], logsnr [N, 1], documents, estimate=None)
            -> [N, L', K]`` for the noised block that comes next; an ``estimate`` [N, L', K] is for
            networks with self-conditioning.
        append: ``append(params, memory, tokens [N, c L'], documents) -> memory`` once the next c
            blocks are finished.
        take_rows: ``take_rows(memory, rows [N'] int32) -> memory`` of some of the rows.

    Documents are int32 of the shape of the tokens, 0 for padding.
    """

    block_size: int
    init: Callable[[int, int], PyTree]
    logits: Callable[..., Array]
    append: Callable[..., PyTree]
    take_rows: Callable[[PyTree, Array], PyTree]


def block_apply(
    model: Transformer,
    block_size: int,
    window: int | None = None,
    chunking: Chunking | None = None,
) -> Callable[..., Array | Readout]:
    """The network as ``objectives.block_nelbo`` wants it: all blocks of a row in one pass.

    Args:
        model: the network; parameters of plain masked diffusion fit.
        block_size: L'.
        window: blocks that a block sees, itself included; None for all.
        chunking: of losses; if given, what is returned is a readout in place of the logits.

    Returns:
        ``apply_fn(params, inputs [N, 2L], logsnr [N, S], documents, estimate=None)`` with the
        noised row and the clean row side by side, and logits [N, L, K] of the noised one: those of
        a loop over blocks that feeds [clean blocks before b, noised block b]. ``logsnr`` holds a
        level per segment of the noised row (the clean one is shown +inf), ``documents`` [N, L] and
        ``estimate`` [N, L, K] belong to the noised row too.

    Raises:
        ValueError: from ``apply_fn``, if 2L is odd or L' does not divide L.
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
                "a block model reads the noised row and the clean row side by side, [N, 2L]; got "
                f"{inputs.shape}"
            )
        length = inputs.shape[-1] // 2
        mask = block_training(length, block_size, window, documents)
        positions = np.tile(np.arange(length), 2)
        if logsnr is not None:
            logsnr = jnp.concatenate([logsnr, jnp.full_like(logsnr, jnp.inf)], axis=-1)
        if estimate is not None:
            estimate = jnp.pad(estimate, ((0, 0), (0, length), (0, 0)))
        options = {"estimate": estimate, "num_outputs": length, "method": "attend_readout"}
        readout, _ = model.apply(params, inputs, logsnr, positions, mask, **options)
        return finish(readout, chunking)

    return apply_fn


def cached_block_decoder(
    model: Transformer, block_size: int, window: int | None = None
) -> BlockDecoder:
    """Decoding with a cache of the finished blocks: a forward pass runs L' tokens, not the row.

    The result equals :func:`block_apply` with the same window. With a window the cache holds
    ``window - 1`` blocks, however long the row: rows may be longer than those of training.

    Args:
        model: the network.
        block_size: L'.
        window: blocks that a block sees, itself included; None for all.

    Raises:
        ValueError: from ``init``, if L' does not divide the length or the window is below 1.
    """

    def init(num_rows: int, length: int) -> KeyValueCache:
        num_blocks = check_blocks(length, block_size, window)
        remembered = num_blocks if window is None else min(window, num_blocks)
        return new_cache(model.config, num_rows, max(remembered - 1, 1) * block_size)

    def logits(params, cache, tokens, logsnr, documents, estimate=None) -> Array:
        found, _ = attend_with_cache(
            model, params, cache, tokens, logsnr, documents, block_size, window, estimate
        )
        return found

    def append_blocks(params, cache, tokens, documents) -> KeyValueCache:
        check_blocks(tokens.shape[-1], block_size)
        clean = jnp.full((tokens.shape[0], 1), jnp.inf)
        _, new = attend_with_cache(
            model, params, cache, tokens, clean, documents, block_size, window
        )
        return append(cache, new, documents)

    return BlockDecoder(block_size, init, logits, append_blocks, take_rows)


class WrittenRow(NamedTuple):
    """What :func:`recomputing_block_decoder` remembers.

    Attributes:
        tokens: [N, L] int32, zero where nothing is written yet.
        documents: [N, L] int32, zero likewise.
        written: [] int32.
    """

    tokens: Array
    documents: Array
    written: Array


def recomputing_block_decoder(apply_fn: Callable[..., Array], block_size: int) -> BlockDecoder:
    """Decoding with any block network, without a cache: every pass runs the whole row, twice over.

    Args:
        apply_fn: as :func:`block_apply` returns it, such as a network of one's own.
        block_size: L'.

    Raises:
        ValueError: from ``init``, if L' does not divide the length.
    """

    def init(num_rows: int, length: int) -> WrittenRow:
        check_blocks(length, block_size)
        row = jnp.zeros((num_rows, length), jnp.int32)
        return WrittenRow(row, row, jnp.zeros((), jnp.int32))

    def write(row: WrittenRow, tokens: Array, documents: Array) -> WrittenRow:
        return WrittenRow(
            _put(row.tokens, tokens, row.written),
            _put(row.documents, documents, row.written),
            row.written + tokens.shape[-1],
        )

    def logits(params, row, tokens, logsnr, documents, estimate=None) -> Array:
        noised, further = write(row, tokens, documents), {}
        if estimate is not None:
            nothing = jnp.zeros((*row.tokens.shape, estimate.shape[-1]), estimate.dtype)
            further = {"estimate": _put(nothing, estimate, row.written)}
        inputs = jnp.concatenate([noised.tokens, row.tokens], axis=-1)
        every = apply_fn(params, inputs, logsnr, noised.documents, **further)
        return jax.lax.dynamic_slice_in_dim(every, row.written, block_size, axis=1)

    def append_blocks(params, row, tokens, documents) -> WrittenRow:
        del params
        check_blocks(tokens.shape[-1], block_size)
        return write(row, tokens, documents)

    def take_rows(row: WrittenRow, rows: Array) -> WrittenRow:
        return WrittenRow(row.tokens[rows], row.documents[rows], row.written)

    return BlockDecoder(block_size, init, logits, append_blocks, take_rows)


def _put(row: Array, part: Array, place: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(row, part, place, axis=1)


class CausalDecoder(NamedTuple):
    """An autoregressive model as a generator uses it.

    Attributes:
        init: ``init(num_rows, length) -> memory`` of rows of which nothing is written yet.
        append: ``append(params, memory, tokens [N, P], documents [N, P]) -> memory``: the first P
            tokens of every row, in one pass. Only at the beginning.
        step: ``step(params, memory, previous [N], documents [N]) -> (logits [N, K], memory)`` for
            the next place; ``previous`` is the token before it, of no importance at place 0.

    Documents are int32 numbers, 0 for padding.
    """

    init: Callable[[int, int], PyTree]
    append: Callable[..., PyTree]
    step: Callable[..., tuple[Array, PyTree]]


def causal_apply(
    model: Transformer,
    start_token: int,
    window: int | None = None,
    chunking: Chunking | None = None,
) -> Callable[..., Array | Readout]:
    """The network as ``objectives.next_token`` wants it.

    Args:
        model: the network; parameters of masked diffusion fit.
        start_token: what stands before the first token of a document, the mask token as a rule.
        window: tokens that a place sees, its own input included; None for all.
        chunking: of losses; if given, what is returned is a readout in place of the logits.

    Returns:
        ``apply_fn(params, tokens [N, L], logsnr, documents) -> logits [N, L, K]``. Logits at place
        i depend on the *clean* tokens before i alone. A network that is conditioned on the level is
        shown +inf; ``logsnr`` is not read.
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
        return finish(readout, chunking)

    return apply_fn


def shift_right(tokens: Array, start_token: int, documents: Array | None = None) -> Array:
    """[N, L] int32: each place's predecessor, the start token where a document begins.

    Args:
        tokens: [N, L] int32.
        start_token: see above.
        documents: [N, L] int32 document numbers; None for one whole document.
    """
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=start_token)
    if documents is None:
        return before
    begins = documents != jnp.pad(documents[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jnp.where(begins, start_token, before)


class CausalMemory(NamedTuple):
    """What :func:`cached_causal_decoder` remembers.

    Attributes:
        cache: keys and values of the places run so far.
        document: [N] int32, document of the last place; -1 before the first.
    """

    cache: KeyValueCache
    document: Array


def cached_causal_decoder(
    model: Transformer, start_token: int, window: int | None = None
) -> CausalDecoder:
    """Decoding with a cache: a step runs one token. Equals :func:`causal_apply`.

    With a window the cache holds ``window - 1`` tokens, however long the row.

    Args:
        model: the network.
        start_token: what stands before the first token of a document.
        window: tokens that a place sees, its own input included; None for all.

    Raises:
        ValueError: from ``init``, if the window is below 1.
    """

    def init(num_rows: int, length: int) -> CausalMemory:
        check_blocks(length, 1, window)
        remembered = length if window is None else min(window, length)
        cache = new_cache(model.config, num_rows, max(remembered - 1, 1))
        return CausalMemory(cache, jnp.full((num_rows,), -1, jnp.int32))

    def run(params, memory, inputs, documents) -> tuple[Array, CausalMemory]:
        logits, new = attend_with_cache(
            model, params, memory.cache, inputs, _clean(inputs), documents, 1, window
        )
        return logits, CausalMemory(append(memory.cache, new, documents), documents[:, -1])

    def append_tokens(params, memory, tokens, documents) -> CausalMemory:
        return run(params, memory, shift_right(tokens, start_token, documents), documents)[1]

    def step(params, memory, previous, documents) -> tuple[Array, CausalMemory]:
        inputs = jnp.where(documents == memory.document, previous, start_token)
        logits, memory = run(params, memory, inputs[:, None], documents[:, None])
        return logits[:, 0], memory

    return CausalDecoder(init, append_tokens, step)


def recomputing_causal_decoder(apply_fn: Callable[..., Array]) -> CausalDecoder:
    """Decoding with any autoregressive network, without a cache: every step runs the whole row.

    Args:
        apply_fn: as :func:`causal_apply` returns it, such as a network of one's own.
    """

    def init(num_rows: int, length: int) -> WrittenRow:
        row = jnp.zeros((num_rows, length), jnp.int32)
        return WrittenRow(row, row, jnp.zeros((), jnp.int32))

    def append_tokens(params, row, tokens, documents) -> WrittenRow:
        del params
        width = tokens.shape[-1]
        return WrittenRow(
            row.tokens.at[:, :width].set(tokens),
            row.documents.at[:, :width].set(documents),
            jnp.asarray(width, jnp.int32),
        )

    def step(params, row, previous, documents) -> tuple[Array, WrittenRow]:
        place = row.written
        known = row.tokens.at[:, jnp.maximum(place - 1, 0)].set(previous)
        row = WrittenRow(known, row.documents.at[:, place].set(documents), place + 1)
        every = apply_fn(params, row.tokens, None, row.documents)
        return jax.lax.dynamic_index_in_dim(every, place, axis=1, keepdims=False), row

    return CausalDecoder(init, append_tokens, step)


def _clean(tokens: Array) -> Array:
    return jnp.full((tokens.shape[0], 1), jnp.inf)
