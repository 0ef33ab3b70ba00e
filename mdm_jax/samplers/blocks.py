"""Generation block by block: any sampler within a block, finished blocks in a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mdm_jax.models.masks import check_blocks
from mdm_jax.samplers.canvas import check_canvas, check_prefix, checked_generator
from mdm_jax.samplers.sampler import Sampler, sample_with_trace
from mdm_jax.samplers.wrappers import counted
from mdm_jax.types import Array, ArrayLike, PyTree

if TYPE_CHECKING:  # it needs Flax
    from mdm_jax.models.decoders import BlockDecoder


ENTROPY_WINDOW = 256
"""Tokens whose entropy stops a row, as in BD3-LM (Arriola et al. 2025)."""


def sample_blocks(
    key: Array,
    decoder: BlockDecoder,
    params: PyTree,
    sampler: Sampler,
    grid: ArrayLike | None,
    canvas: ArrayLike,
    *,
    mask_id: int,
    documents: ArrayLike | None = None,
    row_offset: ArrayLike = 0,
    prefix: int = 0,
    guided: bool = False,
    stop_id: int | None = None,
    stop_entropy: float | None = None,
) -> Array:
    """Fill the masked positions of a canvas from left to right; tokens [B, L] without masks.

    ``sample`` fills each block until all rows are finished; one more pass appends it to the cache.
    Given tokens never change; a block does not see later blocks. Rows are independent. Steps,
    confidence and self-conditioning restart in every block; wrappers see all tokens so far. A
    sampler that is exact within a block is exact for the product over blocks. ``sampler``, ``grid``
    (levels of every block), ``documents`` and ``row_offset`` are as in ``sample``.

    Args:
        key: typed key. Row i draws in block b from ``fold_in(fold_in(key, b), row_offset + i)``.
        decoder: e.g. ``models.cached_block_decoder(model, block_size)``.
        canvas: [B, L] integers, ``mask_id`` where to generate; L a multiple of the block size. A
            decoder with a window needs no more memory for longer rows.
        prefix: number of leading positions given in every row, whose complete blocks are run in one
            pass; changes nothing else. Not checked where the canvas is traced.
        guided: for ``prompt_guidance``: keep a second cache in which the given tokens of finished
            blocks are padding, at a second pass per finished block.
        stop_id: once every row has written this token, later blocks are filled with it unread.
        stop_entropy: with ``stop_id``, a row also stops after a block in which it wrote, where the
            tokens of its last ``ENTROPY_WINDOW`` have less empirical entropy, nats; these are
            replaced by it too.

    Raises ValueError as ``sample``; if the block size does not divide the length; if the prefix is
    longer than the canvas or not all given; if a sampler is guided and ``guided`` not set.
    """
    return sample_blocks_with_passes(
        key,
        decoder,
        params,
        sampler,
        grid,
        canvas,
        mask_id=mask_id,
        documents=documents,
        row_offset=row_offset,
        prefix=prefix,
        guided=guided,
        stop_id=stop_id,
        stop_entropy=stop_entropy,
    )[0]


def sample_blocks_with_passes(
    key: Array,
    decoder: BlockDecoder,
    params: PyTree,
    sampler: Sampler,
    grid: ArrayLike | None,
    canvas: ArrayLike,
    *,
    mask_id: int,
    documents: ArrayLike | None = None,
    row_offset: ArrayLike = 0,
    prefix: int = 0,
    guided: bool = False,
    stop_id: int | None = None,
    stop_entropy: float | None = None,
) -> tuple[Array, Array]:
    """:func:`sample_blocks`, and the forward passes of each row [B], those that only read included.

    Passes of a second cache (``guided``) are not counted.
    """
    canvas, documents = check_canvas(canvas, documents)
    num_rows, length = canvas.shape
    size = decoder.block_size
    num_blocks = check_blocks(length, size)
    check_prefix(canvas, prefix, mask_id)
    if documents is None:
        documents = jnp.ones_like(canvas)
    row_numbers = jnp.broadcast_to(jnp.arange(num_rows)[:, None], (num_rows, size))
    start = prefix // size * size  # first position after the prefix's complete blocks

    def append(caches: list[PyTree], tokens: Array, canvas: Array, documents: Array):
        without_prompt = jnp.where(canvas == mask_id, documents, 0)
        return [
            decoder.append(params, cache, tokens, visible)
            for cache, visible in zip(caches, (documents, without_prompt))
        ]

    caches = [decoder.init(num_rows, length) for _ in range(1 + guided)]
    if start:
        caches = append(caches, canvas[:, :start], canvas[:, :start], documents[:, :start])
    # Masks on the left, so that the tokens before any block are a slice of one size.
    room, blank = length - size, jnp.full((num_rows, length), mask_id, jnp.int32)
    written = jnp.concatenate([blank[:, size:], canvas[:, :start], blank[:, start:]], axis=1)

    def fill(carry: tuple[list[PyTree], Array, Array, Array], block: tuple[Array, Array, Array]):
        caches, written, stopped, cut = carry
        index, block_canvas, block_documents = block
        if stop_id is not None:
            free = block_canvas == mask_id
            block_canvas = jnp.where(free & jnp.all(stopped), stop_id, block_canvas)

        def model_fn(
            tokens: Array,
            logsnr: Array,
            rows: Array,
            without_prompt: bool = False,
            **further: Array,
        ) -> Array:
            if without_prompt and not guided:
                raise ValueError(
                    "prompt_guidance needs the network's logits without the prompt, for which "
                    "generation block by block keeps a cache only with guided=True"
                )
            cache, row_documents = caches[without_prompt], block_documents
            if rows is not row_numbers:  # the sampler runs a selection of rows
                cache, row_documents = (
                    decoder.take_rows(cache, rows[:, 0]),
                    row_documents[rows[:, 0]],
                )
            return decoder.logits(params, cache, tokens, logsnr, row_documents, **further)

        before = jax.lax.dynamic_slice_in_dim(written, index * size, room, axis=1)
        tokens, steps = sample_with_trace(
            jax.random.fold_in(key, index),
            model_fn,
            counted(_with_context(sampler, before, index * size)),
            grid,
            block_canvas,
            lambda state: state.memory[1],
            mask_id=mask_id,
            documents=row_numbers,  # `sample` passes its documents on: here, the rows' numbers
            row_offset=row_offset,
        )
        caches = jax.lax.cond(
            index < num_blocks - 1,
            lambda caches: append(caches, tokens, block_canvas, block_documents),
            lambda caches: caches,
            caches,
        )
        offset = room + index * size
        written = jax.lax.dynamic_update_slice_in_dim(written, tokens, offset, axis=1)
        if stop_id is not None:
            stopped |= jnp.any(free & (tokens == stop_id), axis=-1)
        if stop_id is not None and stop_entropy is not None and length > ENTROPY_WINDOW:
            begin = (index + 1) * size - ENTROPY_WINDOW
            last = jax.lax.dynamic_slice_in_dim(written, room + begin, ENTROPY_WINDOW, axis=1)
            low = (empirical_entropy(last) < stop_entropy) & jnp.any(free, axis=-1)
            low &= (begin > 0) & ~stopped
            stopped, cut = stopped | low, jnp.where(low, begin, cut)
        return (caches, written, stopped, cut), (tokens, steps[-1])

    def split(values: Array) -> Array:
        return jnp.swapaxes(values[:, start:].reshape(num_rows, -1, size), 0, 1)

    if start == length:
        return canvas, jnp.ones(num_rows, jnp.int32)
    blocks = (jnp.arange(start // size, num_blocks), split(canvas), split(documents))
    state = (caches, written, jnp.zeros(num_rows, bool), jnp.full(num_rows, length))
    (*_, cut), (filled, steps) = jax.lax.scan(fill, state, blocks)
    passes = jnp.sum(steps, axis=0) + bool(start) + len(steps) - 1
    filled = jnp.swapaxes(filled, 0, 1).reshape(num_rows, -1)
    tokens = jnp.concatenate([canvas[:, :start], filled], axis=1)
    if stop_id is None:
        return tokens, passes
    beyond = jnp.arange(length)[None] >= cut[:, None]
    return jnp.where((canvas == mask_id) & beyond, stop_id, tokens), passes


def empirical_entropy(tokens: Array) -> Array:
    """[B] nats of the frequencies of tokens [B, L]."""
    shares = jnp.mean(tokens[:, :, None] == tokens[:, None], axis=-1, dtype=jnp.float32)
    return -jnp.mean(jnp.log(shares), axis=-1)


def make_block_generator(
    decoder: BlockDecoder,
    sampler: Sampler,
    grid: ArrayLike | None,
    *,
    mask_id: int,
    prefix: int = 0,
    guided: bool = False,
    with_passes: bool = False,
) -> Callable[..., Any]:
    """Compiled :func:`sample_blocks`, as ``make_generator``; each call checks prefix, documents.

    ``with_passes``: as :func:`sample_blocks_with_passes`.
    """

    options = {"mask_id": mask_id, "prefix": prefix, "guided": guided}
    draw = sample_blocks_with_passes if with_passes else sample_blocks

    @jax.jit
    def run(params, key, canvas, documents, row_offset):
        given = {"documents": documents, "row_offset": row_offset}
        return draw(key, decoder, params, sampler, grid, canvas, **given, **options)

    return checked_generator(run, mask_id, prefix, decoder.block_size)


def _with_context(sampler: Sampler, before: Array, start: Array) -> Sampler:
    """The sampler with the tokens before the canvas, and its place, in the context."""

    def step(context, denoise, state):
        return sampler.step(context._replace(before=before, start=start), denoise, state)

    return sampler._replace(step=step)
