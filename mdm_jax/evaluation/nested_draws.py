"""The draws of a nested or crossed design, through a variance transform.

One evaluation is one forward pass of one row under the law that the transform gives to *one row of
the batch, all its views included*: the level comes from one independent batch of the transform, the
base noise from another, and a row of the batch is picked at random. Couplings between rows keep the
law of every single row, so they leave these numbers alone (what they do to a batch is measured by
``efficiency``); warps, with their importance weights, and views are all in.

Level and noise may come from different batches because no transform lets the law of the noise
depend on the level. A transform that did would have to be measured as a whole.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.batches import Batch
from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.streams import stream
from mdm_jax.typing import Array, PyTree
from mdm_jax.variance import VarianceTransform, draw_batch

DrawRow = Callable[[Array, Array, Array], Draw]
"""``draw_row(row, level, mask) -> Draw`` with batch axis 1, for integer scalars."""


def scored_rows(rows: Batch) -> tuple[Batch, int]:
    """The rows that have eligible tokens, as NumPy arrays, and how many have none.

    Raises:
        ValueError: if no row has any.
    """
    scored = np.asarray(rows.eligible).any(-1)
    if not scored.any():
        raise ValueError(f"none of {len(scored)} rows has an eligible token")
    return Batch(*(np.asarray(field)[scored] for field in rows)), int(np.sum(~scored))


def nested_draw(key: Array, transform: VarianceTransform, state: PyTree, spec: DrawSpec) -> DrawRow:
    """Draws of a nested design: levels independent per row, masks independent per level."""
    levels, masks = stream(key, "levels"), stream(key, "masks")

    def draw_row(row: Array, level: Array, mask: Array) -> Draw:
        level_key = jax.random.fold_in(jax.random.fold_in(levels, row), level)
        mask_key = jax.random.fold_in(jax.random.fold_in(masks, row), level)
        mask_key = jax.random.fold_in(mask_key, mask)
        one = _random_row(level_key, transform, state, spec)
        return one._replace(noise=_random_row(mask_key, transform, state, spec).noise)

    return draw_row


def crossed_draw(
    key: Array, transform: VarianceTransform, state: PyTree, spec: DrawSpec, quantiles: Array
) -> DrawRow:
    """Draws at given levels, the same for all rows and views, without importance weights.

    Args:
        key: typed key.
        transform: its views share the level here; only its noise is used.
        state: of the transform.
        spec: of a training batch.
        quantiles: [levels] of the objective's law, in (0, 1).
    """
    masks = stream(key, "masks")

    def draw_row(row: Array, level: Array, mask: Array) -> Draw:
        mask_key = jax.random.fold_in(jax.random.fold_in(masks, row), level)
        one = _random_row(jax.random.fold_in(mask_key, mask), transform, state, spec)
        return one._replace(
            u=jnp.full_like(one.u, quantiles[level]), log_weight=jnp.zeros_like(one.log_weight)
        )

    return draw_row


def evaluate_cells(
    score: Callable[[Batch, Draw], PyTree],
    draw_row: DrawRow,
    rows: Batch,
    shape: tuple[int, int],
    chunk: int,
    progress: Callable[[int], None] | None,
) -> PyTree:
    """Evaluates every (row, level, mask) of a design, ``chunk`` at a time.

    Args:
        score: ``score(batch, draw) -> arrays [..., chunk]``.
        draw_row: see :data:`DrawRow`.
        rows: [rows, L] clean rows.
        shape: levels per row and masks per level.
        chunk: evaluations per call; a forward pass holds ``chunk`` times the views.
        progress: called with the number of evaluations done since the last call.

    Returns:
        Arrays [..., rows, levels, masks], float64.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    count, (levels, masks) = rows.tokens.shape[0], shape
    total = count * levels * masks
    chunk = min(chunk, total)

    @jax.jit
    def draw_chunk(row: Array, level: Array, mask: Array) -> Draw:
        # One batch of the transform at a time: only its own row is kept.
        found = jax.lax.map(lambda index: draw_row(*index), (row, level, mask))
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf[:, :, 0], 0, 1), found)

    parts = []
    for begin in range(0, total, chunk):
        # The last chunk is filled up with the last evaluation, so that all have one shape.
        flat = np.minimum(np.arange(begin, begin + chunk), total - 1).astype(np.int32)
        row, level, mask = flat // (levels * masks), flat // masks % levels, flat % masks
        batch = jax.tree.map(lambda field, row=row: jnp.asarray(field[row]), rows)
        values = score(batch, draw_chunk(row, level, mask))
        done = min(chunk, total - begin)
        parts.append(jax.tree.map(lambda a, n=done: np.asarray(a, np.float64)[..., :n], values))
        if progress is not None:
            progress(done)
    return jax.tree.map(
        lambda *a: np.concatenate(a, -1).reshape(*a[0].shape[:-1], count, levels, masks), *parts
    )


def _random_row(key: Array, transform: VarianceTransform, state: PyTree, spec: DrawSpec) -> Draw:
    draw = draw_batch(stream(key, "draw"), transform, state, spec)
    index = jax.random.randint(stream(key, "row"), (), 0, spec.batch_size)
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1, axis=1), draw)
