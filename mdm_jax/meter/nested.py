"""Variance components of nested and crossed designs (analysis of variance), and their draws.

For losses Y[i, j, k] of row i, level j, mask k, sampled in this order, Var(Y) = A + B + C:

    A = E Var(Y | row, level)             masking-pattern noise
    B = E Var(E[Y | row, level] | row)    masking-rate noise
    C = Var(E[Y | row])                   data noise

Estimates are unbiased from size two on, so B and C can be negative. They are means over rows of
terms (pseudo-values of the jackknife; Tukey 1958), whose spread gives the standard errors. An
evaluation is a pass of one row with its views: a random row of one batch of the transform for the
level, of another for the noise (its law depends on no level). Couplings keep each row's law.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import Draw
from mdm_jax.meter.subject import Progress, Subject
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree
from mdm_jax.variance.transform import draw_batch


class Components(NamedTuple):
    """A, B, C and their sum, the variance of one forward pass; or terms of each, [..., rows]."""

    pattern: np.ndarray
    rate: np.ndarray
    data: np.ndarray
    total: np.ndarray


def row_terms(values: np.ndarray) -> Components:
    """Terms [..., rows] of losses [..., rows, levels, masks], whose means over rows are A, B, C.
    ValueError if an axis is shorter than 2 or a value is not finite.
    """
    values = _checked(values)
    cells = values.mean(-1)
    pattern, between = values.var(-1, ddof=1).mean(-1), cells.var(-1, ddof=1)
    spread = spread_terms(squared_deviations(cells.mean(-1)))
    return component_terms(pattern, between, spread, values.shape[-2], values.shape[-1])


def group_terms(values: np.ndarray, group: int) -> tuple[Components, np.ndarray]:
    """Terms [..., groups] of A, B, C of rows in groups of ``group``, such as answers to one prompt,
    and those of the part of C that lies within groups; the rest of C lies between them.

    Groups are the independent samples, of which rows are taken as independent samples. ValueError
    as of :func:`row_terms`, or unless there are two groups or more of two rows or more.
    """
    values = _checked(values)
    *lead, rows, levels, masks = values.shape
    if group < 2 or rows % group or rows < 2 * group:
        raise ValueError(
            f"{rows} rows are no groups of {group}: at least 2 groups of 2 rows or more are needed"
        )
    values = values.reshape(*lead, rows // group, group, levels, masks)
    cells = values.mean(-1)
    pattern, between = values.var(-1, ddof=1).mean((-1, -2)), cells.var(-1, ddof=1).mean(-1)
    means = cells.mean(-1)
    spread = means.var(-1, ddof=1)
    within = spread - between / levels
    over = spread_terms(squared_deviations(means.mean(-1))) - spread / group
    rate = between - pattern / masks
    return Components(pattern, rate, over + within, pattern + rate + over + within), within


def component_terms(
    pattern: np.ndarray, between: np.ndarray, spread: np.ndarray, levels: int, masks: int
) -> Components:
    """Components from each row's A, variance over levels of means over masks, and spread term."""
    rate = between - pattern / masks
    data = spread - between / levels
    return Components(pattern, rate, data, pattern + rate + data)


def squared_deviations(values: np.ndarray) -> np.ndarray:
    """Of values [..., rows] from their mean."""
    return (values - values.mean(-1, keepdims=True)) ** 2


def spread_terms(squares: np.ndarray) -> np.ndarray:
    """Jackknife terms [..., rows] of the variance over rows, from squared deviations.
    Their mean is the variance; two rows, which have no error, get it alike.
    """
    rows = squares.shape[-1]
    variance = squares.sum(-1, keepdims=True) / (rows - 1)
    if rows == 2:
        return np.broadcast_to(variance, squares.shape)
    return (rows * squares - variance) / (rows - 2)


def mean_over_rows(
    terms: np.ndarray, probes: bool, twice: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error of terms [rows, ...], or with ``probes`` [probes, rows, ...].
    Rows and probes are both samples: their variances add, less the interaction in both. ``twice``,
    at most half the variance over rows, is counted once. NaN below three rows or two probes.
    """
    by_row = terms.mean(0) if probes else terms
    rows = len(by_row)
    variance = by_row.var(0, ddof=1) / rows
    variance = np.maximum(variance - twice, variance / 2)
    if probes:
        by_probe = terms.mean(1)
        number = max(len(by_probe), 2)
        over_probes = ((by_probe - by_probe.mean(0)) ** 2).sum(0) / (number - 1) / number
        rest = terms - by_row - by_probe[:, None] + by_row.mean(0)
        both = (rest**2).sum((0, 1)) / (number - 1) / (rows - 1) / (number * rows)
        variance = np.maximum(variance + over_probes - both, np.maximum(variance, over_probes))
    known = rows > 2 and not (probes and len(terms) < 2)
    return by_row.mean(0), np.where(known, np.sqrt(variance), np.nan)


class CrossedMoments(NamedTuple):
    """Moments at each level of a crossed design, [..., levels].
    ``pattern``: v, variance over masks, averaged over rows. ``mean``: g. ``data``: c, variance over
    rows of the mean over masks. ``second``: s = v + g^2 + c. ``mean_square``: unbiased g^2 = s - v
    - c (the square of ``mean`` is too large by (c + v / masks) / rows).
    """

    pattern: np.ndarray
    mean: np.ndarray
    data: np.ndarray
    second: np.ndarray
    mean_square: np.ndarray


def crossed_terms(values: np.ndarray) -> CrossedMoments:
    """Terms [..., rows, levels], whose means over rows are v, g, c of losses [..., rows, levels,
    masks] if all rows share the levels.
    ValueError if there are fewer than two rows or masks, or a value is not finite.
    """
    values = _checked(values, need_levels=False)
    cells = values.mean(-1)
    pattern = values.var(-1, ddof=1)
    spread = spread_terms(squared_deviations(np.moveaxis(cells, -2, -1)))
    data = np.moveaxis(spread, -1, -2) - pattern / values.shape[-1]
    second = (values**2).mean(-1)
    return CrossedMoments(pattern, cells, data, second, second - pattern - data)


def check_design(rows: int, levels: int, masks: int) -> None:
    """Raises ValueError unless each size is at least 2."""
    if min(rows, levels, masks) < 2:
        raise ValueError(
            f"a design of {rows} rows, {levels} levels and {masks} masks cannot be decomposed; "
            "each must be at least 2"
        )


def _checked(values: np.ndarray, need_levels: bool = True) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim < 3:
        raise ValueError(f"values must be [..., rows, levels, masks], got shape {values.shape}")
    rows, levels, masks = values.shape[-3:]
    check_design(rows, levels if need_levels else 2, masks)
    bad = int(np.sum(~np.isfinite(values)))
    if bad:
        raise ValueError(f"{bad} of {values.size} losses are not finite; nothing can be estimated")
    return values


Rows = TypeVar("Rows", bound=Batch)
"""A batch, or what has further fields of each row."""

DrawRow = Callable[[Array, Array, Array], Draw]
"""``draw_row(row, level, mask) -> Draw`` with batch axis 1, for integer scalars."""


def eligible_rows(rows: Rows) -> tuple[Rows, int]:
    """Rows with eligible tokens, as NumPy arrays, and the number of others; ValueError if none."""
    kept = np.asarray(rows.eligible).any(-1)
    if not kept.any():
        raise ValueError(f"none of {len(kept)} rows has an eligible token")
    return jax.tree.map(lambda field: np.asarray(field)[kept], rows), int(np.sum(~kept))


def nested_draw(key: Array, subject: Subject) -> DrawRow:
    """Draws of a nested design: levels independent per row, masks independent per level."""
    levels, masks = stream(key, "levels"), stream(key, "masks")

    def draw_row(row: Array, level: Array, mask: Array) -> Draw:
        level_key, mask_key = (
            jax.random.fold_in(jax.random.fold_in(k, row), level) for k in (levels, masks)
        )
        mask_key = jax.random.fold_in(mask_key, mask)
        one = _random_row(level_key, subject)
        return one._replace(noise=_random_row(mask_key, subject).noise)

    return draw_row


def crossed_draw(key: Array, subject: Subject, quantiles: Array) -> DrawRow:
    """Unweighted draws at ``quantiles`` [levels]; only the noise is from the transform's views."""
    masks = stream(key, "masks")

    def draw_row(row: Array, level: Array, mask: Array) -> Draw:
        mask_key = jax.random.fold_in(jax.random.fold_in(masks, row), level)
        one = _random_row(jax.random.fold_in(mask_key, mask), subject)
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
    progress: Progress | None,
) -> PyTree:
    """Evaluates every (row, level, mask) of a design: float64 arrays [..., rows, levels, masks].
    ``score(batch, draw) -> [..., chunk]``, with ``chunk`` times the views in a forward pass;
    ``shape`` is (levels per row, masks per level).
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    count, (levels, masks) = rows.tokens.shape[0], shape
    total = count * levels * masks
    chunk = min(chunk, total)

    @jax.jit
    def draw_chunk(row: Array, level: Array, mask: Array) -> Draw:
        # One batch of the transform at a time: only its own row is kept.
        drawn = jax.lax.map(lambda index: draw_row(*index), (row, level, mask))
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf[:, :, 0], 0, 1), drawn)

    chunks = []
    for begin in range(0, total, chunk):
        # The last chunk is filled up with the last evaluation, so that all have one shape.
        flat = np.minimum(np.arange(begin, begin + chunk), total - 1).astype(np.int32)
        row, level, mask = flat // (levels * masks), flat // masks % levels, flat % masks
        batch = jax.tree.map(lambda field, row=row: jnp.asarray(field[row]), rows)
        values = score(batch, draw_chunk(row, level, mask))
        done = min(chunk, total - begin)
        chunks.append(jax.tree.map(lambda a, n=done: np.asarray(a, np.float64)[..., :n], values))
        if progress is not None:
            progress(done)
    return jax.tree.map(
        lambda *a: np.concatenate(a, -1).reshape(*a[0].shape[:-1], count, levels, masks), *chunks
    )


def _random_row(key: Array, subject: Subject) -> Draw:
    spec = subject.spec
    draw = draw_batch(stream(key, "draw"), subject.transform, subject.state, spec)
    index = jax.random.randint(stream(key, "row"), (), 0, spec.batch_size)
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1, axis=1), draw)
