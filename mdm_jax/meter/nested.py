"""Variance components of nested and crossed designs, as plain array arithmetic.

``Y[i, j, k]`` is the loss of row i at level j under mask k. With the sampling order row, level,
mask, the law of total variance says Var(Y) = A + B + C:

    A = E Var(Y | row, level)         masking-pattern noise
    B = E Var(E[Y | row, level] | row)    masking-rate noise
    C = Var(E[Y | row])               data noise

Everything here is unbiased for every design size of at least two, so single estimates of B and C
can be negative; that sign is information and is kept. Arrays are float64 on the host. Arguments may
have leading axes (probes), over which nothing is mixed.

Reference: analysis of variance of a nested random-effects design.

The draws of a nested or crossed design, through a variance transform.

One evaluation is one forward pass of one row under the law that the transform gives to *one row of
the batch, all its views included*: the level comes from one independent batch of the transform, the
base noise from another, and a row of the batch is picked at random. Couplings between rows keep the
law of every single row, so they leave these numbers alone (what they do to a batch is measured by
``efficiency``); warps, with their importance weights, and views are all in.

Level and noise may come from different batches because no transform lets the law of the noise
depend on the level. A transform that did would have to be measured as a whole.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree
from mdm_jax.variance.transform import VarianceTransform, draw_batch


class Estimate(NamedTuple):
    """A number with its standard error, in the same unit; NaN where none can be given."""

    value: float
    standard_error: float


class Components(NamedTuple):
    """A, B, C and their sum; floats, or arrays over leading axes.

    Attributes:
        pattern: A, from the choice of the masked positions at a given level.
        rate: B, from the choice of the level for a given row.
        data: C, from the choice of the row.
        total: A + B + C, the variance of one forward pass.
    """

    pattern: np.ndarray
    rate: np.ndarray
    data: np.ndarray
    total: np.ndarray


class RowTerms(NamedTuple):
    """What each row contributes to the components.

    Attributes:
        pattern: [..., rows] unbiased estimate of A from this row alone.
        between: [..., rows] variance over levels of the means over masks, B + A / masks on average.
        spread: [..., rows] a term whose mean over rows is unbiased for the variance of row means;
            NaN where a row has none.
        levels, masks: size of the design within a row.
    """

    pattern: np.ndarray
    between: np.ndarray
    spread: np.ndarray
    levels: int
    masks: int


def components(values: np.ndarray) -> Components:
    """A, B, C from losses [..., rows, levels, masks], each axis of at least two.

    Raises:
        ValueError: if an axis is too short or a value is not finite.
    """
    return combine(row_terms(values))


def row_terms(values: np.ndarray) -> RowTerms:
    """Contribution of every row; arguments and errors as :func:`components`."""
    values = _checked(values)
    cells = values.mean(-1)
    rows = cells.mean(-1)
    count = rows.shape[-1]
    deviation = (rows - rows.mean(-1, keepdims=True)) ** 2
    return RowTerms(
        pattern=values.var(-1, ddof=1).mean(-1),
        between=cells.var(-1, ddof=1),
        spread=deviation * count / (count - 1),
        levels=values.shape[-2],
        masks=values.shape[-1],
    )


def combine(terms: RowTerms) -> Components:
    """Means of the rows' contributions, corrected for the noise of lower levels of the design."""
    pattern = terms.pattern.mean(-1)
    between = terms.between.mean(-1)
    rate = between - pattern / terms.masks
    data = np.nanmean(terms.spread, -1) - between / terms.levels
    return Components(pattern, rate, data, pattern + rate + data)


def bootstrap(values: np.ndarray, resamples: int, seed: int = 0) -> Components:
    """Components of ``resamples`` data sets of rows drawn with replacement, [resamples, ...].

    Levels and masks of a row stay together: rows are the sampling unit.
    """
    values = _checked(values)
    cells = values.mean(-1)
    rows, pattern = cells.mean(-1), values.var(-1, ddof=1).mean(-1)
    between = cells.var(-1, ddof=1)
    count, levels, masks = values.shape[-3:]
    found = []
    for index in _resampled_rows(count, resamples, seed):
        a, between_mean = pattern[..., index].mean(-1), between[..., index].mean(-1)
        b = between_mean - a / masks
        c = rows[..., index].var(-1, ddof=1) - between_mean / levels
        found.append(Components(a, b, c, a + b + c))
    return Components(*(np.stack(part) for part in zip(*found)))


def bootstrap_terms(terms: RowTerms, resamples: int, seed: int = 0) -> Components:
    """As :func:`bootstrap`, from the rows' contributions where the losses themselves are gone."""
    found = []
    for index in _resampled_rows(terms.pattern.shape[-1], resamples, seed):
        drawn = RowTerms(
            terms.pattern[..., index],
            terms.between[..., index],
            terms.spread[..., index],
            terms.levels,
            terms.masks,
        )
        found.append(combine(drawn))
    return Components(*(np.stack(part) for part in zip(*found)))


def spread_error(samples: Components) -> Components:
    """Standard deviation over the first axis: standard errors from bootstrap samples."""
    return Components(*(np.std(part, axis=0, ddof=1) for part in samples))


class CrossedMoments(NamedTuple):
    """Moments at each level of a crossed design, [..., levels].

    Attributes:
        pattern: v, variance over masks, averaged over rows.
        mean: g, mean over rows and masks.
        data: c, variance over rows of the mean over masks.
        second: s = v + g^2 + c, the second moment, which governs importance sampling.
        mean_square: unbiased g^2, that is s - v - c; the square of ``mean`` is too large by
            (c + v / masks) / rows.
    """

    pattern: np.ndarray
    mean: np.ndarray
    data: np.ndarray
    second: np.ndarray
    mean_square: np.ndarray


def level_moments(values: np.ndarray) -> CrossedMoments:
    """v, g, c of losses [..., rows, levels, masks] where all rows share the levels.

    Raises:
        ValueError: if there are fewer than two rows or masks, or a value is not finite.
    """
    values = _checked(values, need_levels=False)
    masks = values.shape[-1]
    cells = values.mean(-1)
    pattern = values.var(-1, ddof=1).mean(-2)
    data = cells.var(-2, ddof=1) - pattern / masks
    second = (values**2).mean((-3, -1))
    return CrossedMoments(pattern, cells.mean(-2), data, second, second - pattern - data)


def level_errors(values: np.ndarray, resamples: int, seed: int = 0) -> CrossedMoments:
    """Standard errors of :func:`level_moments` by bootstrap over rows."""
    values = _checked(values, need_levels=False)
    found = [
        level_moments(values[..., index, :, :])
        for index in _resampled_rows(values.shape[-3], resamples, seed)
    ]
    return CrossedMoments(*(np.std(np.stack(part), axis=0, ddof=1) for part in zip(*found)))


def _resampled_rows(count: int, resamples: int, seed: int):
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        index = generator.integers(0, count, count)
        while count > 1 and np.all(index == index[0]):
            index = generator.integers(0, count, count)  # one row has no variance
        yield index


def _checked(values: np.ndarray, need_levels: bool = True) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim < 3:
        raise ValueError(f"values must be [..., rows, levels, masks], got shape {values.shape}")
    count, levels, masks = values.shape[-3:]
    if count < 2 or masks < 2 or (need_levels and levels < 2):
        raise ValueError(
            f"a design of {count} rows, {levels} levels and {masks} masks cannot be decomposed; "
            "each must be at least 2"
        )
    bad = int(np.sum(~np.isfinite(values)))
    if bad:
        raise ValueError(f"{bad} of {values.size} losses are not finite; nothing can be estimated")
    return values


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
