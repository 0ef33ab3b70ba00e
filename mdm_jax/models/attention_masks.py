"""Who may attend to whom, as boolean arrays that any attention implementation can use.

Every mask is [N or 1, 1, queries, keys], True where a query may look. Whatever else it demands, a
place always sees itself, so that no softmax runs over an empty set. Document numbers are combined
by "and": attention stays within one document, and padding (document 0) sees itself alone and is
seen by nobody else.

A window counts blocks: block b sees blocks b - window + 1 to b. It bounds what a generator has to
remember, and rows of any length are treated alike (Child et al. 2019, banded attention).
"""

import jax.numpy as jnp

from mdm_jax.typing import Array


def within_documents(documents: Array) -> Array:
    """[N, 1, L, L]: everything in the same document, in both directions.

    Args:
        documents: [N, L] int32 document numbers, 0 for padding.
    """
    return same_document(documents, documents, jnp.eye(documents.shape[-1], dtype=bool))


def causal(length: int, window: int | None = None, documents: Array | None = None) -> Array:
    """Every place sees itself and what stands before it: :func:`block_causal` for single tokens."""
    return block_causal(length, 1, window, documents)


def block_causal(
    length: int, block_size: int, window: int | None = None, documents: Array | None = None
) -> Array:
    """[N or 1, 1, L, L]: every place sees its own block and the blocks before it.

    Args:
        length: L.
        block_size: L', which divides L.
        window: number of blocks to look at, the own one included; None for all.
        documents: [N, L] int32 document numbers, 0 for padding; None for one whole document.

    Raises:
        ValueError: if the block size does not divide the length or the window is below 1.
    """
    check_blocks(length, block_size, window)
    places = jnp.arange(length)
    mask = block_causal_between(places, places, block_size, window)[None, None]
    return mask if documents is None else mask & within_documents(documents)


def block_training(
    length: int, block_size: int, window: int | None = None, documents: Array | None = None
) -> Array:
    """[N or 1, 1, 2L, 2L]: all blocks of a block diffusion model in one pass.

    The first L places are the noised row, the other L the clean one. Noised block b sees itself and
    the clean blocks before b; clean block b sees the clean blocks up to b. So the noised outputs
    are those of a loop over blocks that feeds [clean blocks before b, noised block b].

    Arguments and errors as :func:`block_causal`; with N = L / L' blocks and no window or documents
    ``L'^2 (N + N^2)`` pairs are allowed.

    Reference: Arriola et al. 2025 (BD3-LM), vectorised training.
    """
    check_blocks(length, block_size, window)
    place = jnp.arange(2 * length)
    clean, block = place >= length, place % length // block_size
    distance = block[:, None] - block[None]
    near = distance < (length if window is None else window)
    itself = ~clean[:, None] & ~clean[None] & (distance == 0)
    earlier = ~clean[:, None] & clean[None] & (distance > 0) & near
    history = clean[:, None] & clean[None] & (distance >= 0) & near
    mask = (itself | earlier | history)[None, None]
    if documents is None:
        return mask
    return mask & within_documents(jnp.concatenate([documents, documents], axis=-1))


def block_causal_between(
    query_positions: Array, key_positions: Array, block_size: int, window: int | None = None
) -> Array:
    """[Q, M] bool: the rule of :func:`block_causal` for places anywhere in a row.

    Args:
        query_positions: [Q] positions in the row.
        key_positions: [M] positions in the row; a negative one is seen by nobody.
        block_size: L'.
        window: number of blocks to look at, the own one included; None for all.
    """
    query_block, key_block = query_positions // block_size, key_positions // block_size
    distance = query_block[:, None] - key_block[None]
    seen = (distance >= 0) & (key_positions >= 0)[None]
    return seen if window is None else seen & (distance < window)


def same_document(query_documents: Array, key_documents: Array, itself: Array) -> Array:
    """[N, 1, Q, M]: queries and keys of one document; padding sees ``itself`` [Q, M] alone."""
    same = query_documents[:, :, None] == key_documents[:, None]
    padding = (query_documents == 0)[:, :, None]
    return jnp.where(padding, itself[None], same)[:, None]


def check_blocks(length: int, block_size: int, window: int | None = None) -> int:
    """The number of blocks in a row.

    Raises:
        ValueError: if the block size does not divide the length or the window is below 1.
    """
    if block_size < 1 or length < 1 or length % block_size:
        raise ValueError(
            f"blocks of {block_size} tokens do not divide a row of {length} evenly; choose a "
            "divisor of the length, or pad the row to a multiple of the block size"
        )
    if window is not None and window < 1:
        raise ValueError(f"a window must hold at least 1 block (its own), got {window}")
    return length // block_size
