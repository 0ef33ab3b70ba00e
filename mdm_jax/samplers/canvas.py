"""Canvases [B, L] int32: the mask token at every position to fill, given tokens elsewhere."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import is_concrete
from mdm_jax.models.masks import check_document_blocks
from mdm_jax.types import Array, ArrayLike, Batch


def blank_canvas(batch_size: int, length: int, mask_id: int) -> Array:
    """All-mask canvas [batch_size, length] int32 for free sampling; ValueError on empty sizes."""
    if batch_size < 1 or length < 1:
        raise ValueError(
            f"a canvas needs at least one row and position, got {batch_size} x {length}"
        )
    return jnp.full((batch_size, length), mask_id, jnp.int32)


def prompt_canvas(prompt: ArrayLike, length: int, mask_id: int) -> Array:
    """Canvas: a prompt [P] or [B, P] of <= ``length`` non-mask tokens (ValueError), then masks."""
    tokens = _piece(prompt, "the prompt", mask_id)
    if tokens.shape[1] > length:
        raise ValueError(
            f"the prompt has {tokens.shape[1]} tokens but the canvas only {length} positions: cut "
            "the prompt, or use a longer canvas"
        )
    gap = blank_canvas(tokens.shape[0], length, mask_id)[:, tokens.shape[1] :]
    return jnp.concatenate([tokens, gap], axis=1)


def canvas_with_gaps(
    pieces: Sequence[ArrayLike], gap_lengths: Sequence[int], mask_id: int
) -> Array:
    """Canvas [B, L] int32 for infilling: piece, gap, piece, gap, ..., piece.

    ``pieces``, one more than gaps, are as in :func:`prompt_canvas`, empty where the row begins or
    ends with a gap. Raises ValueError without a gap, for one that is not positive, or if pieces do
    not fit their number or each other.
    """
    if len(gap_lengths) == 0:
        raise ValueError("canvas_with_gaps needs at least one gap length; got an empty list")
    if min(gap_lengths) < 1:
        raise ValueError(f"gap lengths must be positive, got {list(gap_lengths)}")
    if len(pieces) != len(gap_lengths) + 1:
        raise ValueError(
            f"{len(gap_lengths)} gaps need {len(gap_lengths) + 1} pieces, got {len(pieces)}; pass "
            "an empty piece where the row begins or ends with a gap"
        )
    tokens = [_piece(piece, f"piece {i}", mask_id) for i, piece in enumerate(pieces)]
    rows = max(piece.shape[0] for piece in tokens)
    if any(piece.shape[0] not in (1, rows) for piece in tokens):
        raise ValueError(
            f"pieces must have one row or as many as each other, got {[p.shape[0] for p in tokens]}"
        )
    parts = []
    for piece, gap in zip(tokens, [*gap_lengths, 0], strict=True):
        parts += [jnp.broadcast_to(piece, (rows, piece.shape[1]))]
        parts += [jnp.full((rows, gap), mask_id, jnp.int32)]
    return jnp.concatenate(parts, axis=1)


def canvas_like(rows: Batch, mask_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Canvas and documents [B, L] of rows of data, their eligible tokens masked.

    For answers to prompts, and for free samples of the data's lengths: where padding is hidden, a
    masked model is one of the tokens *given* how many there are, and a blank canvas fills up.
    """
    tokens, eligible, documents = map(np.asarray, rows[:3])
    return np.where(eligible, np.int32(mask_id), tokens), documents


def check_mask_id(mask_id: int) -> None:
    """Raises ValueError for a negative mask token."""
    if mask_id < 0:
        raise ValueError(f"mask_id must be a token id, got {mask_id}")


def check_canvas(canvas: ArrayLike, documents: ArrayLike | None) -> tuple[Array, Array | None]:
    """Canvas as int32, documents as an array, [B, L]; ValueError for other shapes or dtypes."""
    canvas = jnp.asarray(canvas)
    if canvas.ndim != 2 or 0 in canvas.shape or not jnp.issubdtype(canvas.dtype, jnp.integer):
        raise ValueError(
            "canvas must be a non-empty integer array [B, L] with mask_id at the positions to "
            f"generate (see blank_canvas), got {canvas.dtype} of shape {canvas.shape}"
        )
    if documents is None:
        return canvas.astype(jnp.int32), None
    documents = jnp.asarray(documents)
    if documents.shape != canvas.shape:
        raise ValueError(
            f"documents must have the shape of the canvas {canvas.shape}, got {documents.shape}"
        )
    return canvas.astype(jnp.int32), documents


def check_prefix(canvas: ArrayLike, prefix: int, mask_id: int) -> None:
    """Raises ValueError unless the first ``prefix`` positions hold tokens (where concrete)."""
    length = np.shape(canvas)[-1]
    if not 0 <= prefix <= length:
        raise ValueError(f"prefix must be in [0, {length}], the canvas's length, got {prefix}")
    if is_concrete(canvas) and np.any(np.asarray(canvas)[:, :prefix] == mask_id):
        raise ValueError(
            f"the first {prefix} positions of every row must be given, but some hold the mask "
            f"token {mask_id}; shorten the prefix"
        )


def checked_generator(
    run: Callable[..., Array], mask_id: int, prefix: int, block_size: int = 1
) -> Callable[..., Array]:
    """``run`` behind :func:`check_canvas`, :func:`check_prefix` and ``check_document_blocks``."""

    def generate(params, key, canvas, documents=None, row_offset=0):
        canvas, documents = check_canvas(canvas, documents)
        check_prefix(canvas, prefix, mask_id)
        check_document_blocks(documents, block_size)
        return run(params, key, canvas, documents, row_offset)

    return generate


def _piece(tokens: ArrayLike, name: str, mask_id: int) -> Array:
    tokens = np.asarray(tokens) if is_concrete(tokens) else tokens
    if tokens.size == 0:
        tokens = tokens.astype(np.int32)  # an empty list has no integer dtype
    integers = jnp.issubdtype(tokens.dtype, jnp.integer)
    if tokens.ndim not in (1, 2) or not integers or (tokens.ndim == 2 and tokens.shape[0] == 0):
        raise ValueError(
            f"{name} must be integers [P] or [B, P], got {tokens.dtype} of shape {tokens.shape}"
        )
    if is_concrete(tokens) and np.any(tokens == mask_id):
        raise ValueError(
            f"{name} holds the mask token {mask_id}, which marks positions to generate; leave it "
            "out, or write the canvas by hand"
        )
    return jnp.asarray(jnp.atleast_2d(tokens), jnp.int32)
