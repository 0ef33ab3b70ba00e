"""Variance components of nested and crossed designs (analysis of variance), and their draws.

For losses Y[i, j, k] of row i, level j, mask k, sampled in this order, Var(Y) = A + B + C:

    A = E Var(Y | row, level)             masking-pattern noise
    B = E Var(E[Y | row, level] | row)    masking-rate noise
    C = Var(E[Y | row])                   data noise

Estimates are unbiased from size two on, so B and C can be negative. Leading axes are probes. An
evaluation is a pass of one row with its views: a random row of one batch of the transform for the
level, of another for the noise (its law depends on no level). Couplings keep each row's law.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import Draw
from mdm_jax.meter.subject import Progress, Subject
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree
from mdm_jax.variance.transform import draw_batch


class Components(NamedTuple):
    """A, B, C and their sum, the variance of one forward pass; arrays over leading axes."""

    pattern: np.ndarray
    rate: np.ndarray
    data: np.ndarray
    total: np.ndarray


class RowTerms(NamedTuple):
    """Contribution of each row to the components, [..., rows], in a design of levels and masks.
    ``pattern``: unbiased A of this row. ``between``: variance over levels of the means over masks,
    B + A / masks on average. ``spread``: averages to the variance of row means; NaN for no term.
    """

    pattern: np.ndarray
    between: np.ndarray
    spread: np.ndarray
    levels: int
    masks: int

    def take(self, index: np.ndarray) -> "RowTerms":
        rows = (terms[..., index] for terms in self[:3])
        return RowTerms(*rows, self.levels, self.masks)


def row_terms(values: np.ndarray) -> RowTerms:
    """Terms of losses [..., rows, levels, masks]; ValueError if an axis < 2 or any is NaN/inf."""
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


def components(terms: RowTerms) -> Components:
    """Means of the rows' contributions, corrected for noise from lower levels of the design."""
    pattern = terms.pattern.mean(-1)
    between = terms.between.mean(-1)
    rate = between - pattern / terms.masks
    data = np.nanmean(terms.spread, -1) - between / terms.levels
    return Components(pattern, rate, data, pattern + rate + data)


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


def crossed_moments(values: np.ndarray) -> CrossedMoments:
    """v, g, c of losses [..., rows, levels, masks] if all rows share the levels.
    ValueError if there are fewer than two rows or masks, or a value is not finite.
    """
    values = _checked(values, need_levels=False)
    cells = values.mean(-1)
    pattern = values.var(-1, ddof=1).mean(-2)
    data = cells.var(-2, ddof=1) - pattern / values.shape[-1]
    second = (values**2).mean((-3, -1))
    return CrossedMoments(pattern, cells.mean(-2), data, second, second - pattern - data)


def bootstrap_errors(
    statistic: Callable[[np.ndarray], Any], rows: int, resamples: int, seed: int = 0
) -> Any:
    """Standard errors of ``statistic(index)``, a NamedTuple of arrays, by bootstrap over rows."""
    samples = [statistic(index) for index in _resampled_rows(rows, resamples, seed)]
    return type(samples[0])(*(np.std(np.stack(part), axis=0, ddof=1) for part in zip(*samples)))


def _resampled_rows(rows: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    for _ in range(resamples):
        index = generator.integers(0, rows, rows)
        while rows > 1 and np.all(index == index[0]):
            index = generator.integers(0, rows, rows)  # one row has no variance
        yield index


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


DrawRow = Callable[[Array, Array, Array], Draw]
"""``draw_row(row, level, mask) -> Draw`` with batch axis 1, for integer scalars."""


def eligible_rows(rows: Batch) -> tuple[Batch, int]:
    """Rows with eligible tokens, as NumPy arrays, and the number of others; ValueError if none."""
    kept = np.asarray(rows.eligible).any(-1)
    if not kept.any():
        raise ValueError(f"none of {len(kept)} rows has an eligible token")
    return Batch(*(np.asarray(field)[kept] for field in rows)), int(np.sum(~kept))


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
