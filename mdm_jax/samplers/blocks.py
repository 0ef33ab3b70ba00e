"""Generation block by block: any sampler inside a block, the finished blocks remembered."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdm_jax.models.decoders import BlockDecoder
from mdm_jax.models.masks import check_blocks
from mdm_jax.samplers.canvas import check_canvas, check_prefix, checked_generator
from mdm_jax.samplers.sampler import Denoise, Sampler, SamplerState, StepContext, sample
from mdm_jax.types import Array, ArrayLike, PyTree


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
) -> Array:
    """Fills the masked places of a canvas from left to right; tokens [B, L] without any mask token.

    Within a block ``sample`` runs as it does on a whole row, and stops when the block is finished
    in every row; one more pass remembers the finished block. So a sampler that follows the law of
    the block (:func:`~mdm_jax.samplers.first_hitting`) follows that of the model: its product over
    blocks. Given tokens never change, wherever they stand, but a block does not see what is given
    in the blocks after it. Rows are independent, as in ``sample``.

    A sampler knows the block alone and counts steps and confidence per block; self-conditioning
    starts anew in every block. What wraps its network sees the whole row that is written so far.

    Args:
        key: typed key. Row i draws in block b from ``fold_in(fold_in(key, b), row_offset + i)``.
        decoder: e.g. ``models.cached_block_decoder(model, block_size)``.
        params: of the network.
        sampler: as in ``sample``.
        grid: levels that every block goes through, as in ``sample``.
        canvas: [B, L] integers; ``mask_id`` where a token is to be generated. L is a multiple of
            the block size, and as long as memory allows: a decoder with a window needs no more of
            it for longer rows.
        mask_id: the mask token.
        documents: [B, L] document numbers, 0 on padding; None for one whole document.
        row_offset: number of the first row, for sampling a large batch in parts.
        prefix: number of places at the beginning that are given in every row. The whole blocks
            among them go through the network in one pass instead of one by one; nothing else
            changes. Whoever traces the canvas vouches for it.
        guided: for a sampler with ``prompt_guidance``: keeps a second memory, in which the given
            tokens of finished blocks are padding. The two grow together, so that finishing a block
            takes two passes.

    Raises:
        ValueError: as ``sample``; if the block size does not divide the length; if the prefix is
            longer than the canvas or not all given; if a sampler is guided and ``guided`` not set.
    """
    canvas, documents = check_canvas(canvas, documents)
    num_rows, length = canvas.shape
    size = decoder.block_size
    num_blocks = check_blocks(length, size)
    check_prefix(canvas, prefix, mask_id)
    if documents is None:
        documents = jnp.ones_like(canvas)
    row_numbers = jnp.broadcast_to(jnp.arange(num_rows)[:, None], (num_rows, size))
    given = prefix // size * size

    def remember(memories: list[PyTree], tokens: Array, canvas: Array, known: Array):
        hidden = jnp.where(canvas == mask_id, known, 0)
        return [
            decoder.append(params, memory, tokens, seen)
            for memory, seen in zip(memories, (known, hidden))
        ]

    memories = [decoder.init(num_rows, length) for _ in range(1 + guided)]
    if given:
        start = canvas[:, :given]
        memories = remember(memories, start, start, documents[:, :given])
    # Room before the row, so that what stands before any block is a slice of one size.
    room, blank = length - size, jnp.full((num_rows, length), mask_id, jnp.int32)
    written = jnp.concatenate([blank[:, size:], canvas[:, :given], blank[:, given:]], axis=1)

    def fill(carry: tuple[list[PyTree], Array], block: tuple[Array, Array, Array]):
        memories, written = carry
        index, start, own_documents = block

        def model_fn(
            tokens: Array,
            logsnr: Array,
            rows: Array,
            without_prompt: bool = False,
            **further: Array,
        ) -> Array:
            if without_prompt and not guided:
                raise ValueError(
                    "prompt_guidance asks what the network says without the prompt, for which "
                    "generation block by block keeps a memory only with guided=True"
                )
            memory = memories[without_prompt]
            if rows is row_numbers:  # the sampler asks for all rows in order
                return decoder.logits(params, memory, tokens, logsnr, own_documents, **further)
            rows = rows[:, 0]
            known = decoder.take_rows(memory, rows)
            return decoder.logits(params, known, tokens, logsnr, own_documents[rows], **further)

        before = jax.lax.dynamic_slice_in_dim(written, index * size, room, axis=1)
        # The loop hands on to the network what it takes for documents: here, the rows' numbers.
        tokens = sample(
            *(jax.random.fold_in(key, index), model_fn, _within(sampler, before), grid, start),
            mask_id=mask_id,
            documents=row_numbers,
            row_offset=row_offset,
        )
        memories = jax.lax.cond(
            index < num_blocks - 1,
            lambda memories: remember(memories, tokens, start, own_documents),
            lambda memories: memories,
            memories,
        )
        place = room + index * size
        written = jax.lax.dynamic_update_slice_in_dim(written, tokens, place, axis=1)
        return (memories, written), tokens

    def cut(values: Array) -> Array:
        return jnp.swapaxes(values[:, given:].reshape(num_rows, -1, size), 0, 1)

    if given == length:
        return canvas
    blocks = (jnp.arange(given // size, num_blocks), cut(canvas), cut(documents))
    _, filled = jax.lax.scan(fill, (memories, written), blocks)
    filled = jnp.swapaxes(filled, 0, 1).reshape(num_rows, -1)
    return jnp.concatenate([canvas[:, :given], filled], axis=1)


def make_block_generator(
    decoder: BlockDecoder,
    sampler: Sampler,
    grid: ArrayLike | None,
    *,
    mask_id: int,
    prefix: int = 0,
    guided: bool = False,
) -> Callable[..., Array]:
    """:func:`sample_blocks` compiled once per canvas shape.

    Args:
        decoder: e.g. ``models.cached_block_decoder(model, block_size)``.
        sampler: as in :func:`sample_blocks`.
        grid: concrete values, as in :func:`sample_blocks`.
        mask_id: the mask token.
        prefix: as in :func:`sample_blocks`; checked at every call.
        guided: as in :func:`sample_blocks`.

    Returns:
        ``generate(params, key, canvas, documents=None, row_offset=0) -> tokens [B, L]``, which
        raises as :func:`sample_blocks` does.
    """

    @jax.jit
    def run(params, key, canvas, documents, row_offset):
        return sample_blocks(
            *(key, decoder, params, sampler, grid, canvas),
            mask_id=mask_id,
            documents=documents,
            row_offset=row_offset,
            prefix=prefix,
            guided=guided,
        )

    return checked_generator(run, mask_id, prefix)


def _within(sampler: Sampler, before: Array) -> Sampler:
    """The sampler in steps that are told what stands before the canvas."""

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        return sampler.step(context._replace(before=before), denoise, state)

    return sampler._replace(step=step)
