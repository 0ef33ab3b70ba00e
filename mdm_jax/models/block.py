"""Block diffusion with any parameters of a transformer: all blocks at once, or one after another.

A row is cut into blocks of L' tokens. The law of block b given the *clean* blocks before it is a
masked diffusion model; with one block it is the plain model, with blocks of one token an
autoregressive one. Nothing is added to the parameters, so a network that was trained on whole rows
can go on as a block model.

Reference: Arriola et al. 2025 (BD3-LM).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.models.attention_masks import block_training, check_blocks
from mdm_jax.models.cache import (
    KeyValueCache,
    append,
    attend_with_cache,
    new_cache,
    take_rows,
)
from mdm_jax.models.readout import Chunking, Readout, finish
from mdm_jax.models.transformer import Transformer
from mdm_jax.typing import Array, PyTree


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
