"""Where the variance of a training loss and of its gradient comes from: A, B and C.

For one forward pass of one row (all views of the transform, importance weights inside), with row,
level and mask drawn in this order,

    total variance = A (which positions) + B (which level) + C (which row).

An autoregressive loss has C alone. For gradients each variance is the trace of a covariance. See
``nested.py`` for the estimators and ``nested_draws.py`` for what one forward pass means here.
Dropout must be off, or it would appear inside A.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import DrawSpec
from mdm_jax.estimates import add, finite_or_none, square_norm, start
from mdm_jax.meter import nested
from mdm_jax.meter.nested import (
    Components,
    Estimate,
    RowTerms,
    evaluate_cells,
    nested_draw,
    scored_rows,
)
from mdm_jax.meter.subject import Estimator
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree
from mdm_jax.variance.transform import VarianceTransform

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """Variance of one forward pass and its parts; standard errors by bootstrap over rows.

    Losses are per row, in nats, so variances are in nats squared; those of gradients are traces of
    a covariance, in the same unit per squared parameter. Parts other than A can be estimated
    negative; they are unbiased.

    Attributes:
        pattern: A, from which positions are masked.
        rate: B, from the noise level.
        data: C, from the row.
        total: their sum.
        signal: squared mean loss, or squared norm of the mean gradient, unbiased.
        passes: forward passes that one evaluation takes (views).
        rows, levels_per_row, masks_per_level: size of the design.
        rows_left_out: rows without eligible tokens, not part of the design.
    """

    pattern: Estimate
    rate: Estimate
    data: Estimate
    total: Estimate
    signal: float
    passes: int
    rows: int
    levels_per_row: int
    masks_per_level: int
    rows_left_out: int

    @property
    def shares(self) -> tuple[float, float, float]:
        """A, B, C as fractions of the total."""
        parts = (self.pattern.value, self.rate.value, self.data.value)
        return tuple(part / self.total.value if self.total.value else math.nan for part in parts)

    @property
    def noise_to_signal(self) -> float:
        """Total over signal: scale-free, comparable between models. NaN where no signal is left."""
        return self.total.value / self.signal if self.signal > 0 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        parts = {}
        for name in ("pattern", "rate", "data", "total"):
            value, error = getattr(self, name)
            parts |= {name: value, f"{name}_standard_error": finite_or_none(error)}
        counts = ("passes", "rows", "levels_per_row", "masks_per_level", "rows_left_out")
        return (
            parts
            | {"signal": self.signal, "noise_to_signal": finite_or_none(self.noise_to_signal)}
            | {name: getattr(self, name) for name in counts}
        )


def decompose(
    estimator: Estimator,
    params: PyTree,
    transform: VarianceTransform,
    state: PyTree,
    spec: DrawSpec,
    rows: Batch,
    key: Array,
    *,
    levels_per_row: int = 8,
    masks_per_level: int = 4,
    chunk: int = 64,
    resamples: int = 500,
    progress: Progress | None = None,
) -> Decomposition:
    """A, B, C of the loss.

    Args:
        estimator: network and objective, from ``make_estimator``.
        params: parameters.
        transform: variance reduction; any chain.
        state: its state, read only.
        spec: shape of a *training* batch, ``objective.spec(batch_size, length)``.
        rows: the design's rows [N, L], drawn at random from the data. Rows without eligible tokens
            are left out and counted.
        key: typed key. Two transforms measured with one key see the same base noise.
        levels_per_row: levels of each row, at least 2.
        masks_per_level: masks of each level, at least 2.
        chunk: evaluations per forward call, at least 1; bounds the memory.
        resamples: bootstrap samples.
        progress: called with the number of evaluations done since the last call, of
            ``rows * levels_per_row * masks_per_level`` in all.

    Raises:
        ValueError: if no row has an eligible token, the design is too small, ``chunk`` is below 1,
            or a loss is not finite.
    """
    rows, left_out = _design(rows, levels_per_row, masks_per_level)
    values = evaluate_cells(
        lambda batch, draw: estimator.losses(params, batch, draw),
        nested_draw(key, transform, state, spec),
        rows,
        (levels_per_row, masks_per_level),
        chunk,
        progress,
    )
    return _of_values(values, transform.views, left_out, resamples)


def decompose_by_probes(
    estimator: Estimator,
    params: PyTree,
    transform: VarianceTransform,
    state: PyTree,
    spec: DrawSpec,
    rows: Batch,
    key: Array,
    *,
    probes: int = 4,
    levels_per_row: int = 8,
    masks_per_level: int = 4,
    chunk: int = 64,
    resamples: int = 500,
    progress: Progress | None = None,
) -> tuple[Decomposition, Decomposition]:
    """A, B, C of the loss and of the gradient, by forward-mode probes.

    Each evaluation yields the loss and its slopes along ``probes`` random directions; the variance
    of a slope estimates the trace of the gradient's covariance (Hutchinson). Costs about
    ``1 + probes`` forward passes per evaluation and no memory per parameter beyond the probes.
    Standard errors of the gradient's part contain the spread over probes.

    Arguments as :func:`decompose`, and ``probes``, at least 1. Forward-mode differentiation must be
    possible; where it is not (functions with a custom reverse rule alone), use
    :func:`decompose_gradients`.

    Returns:
        (of the loss, of the gradient).

    Raises:
        ValueError: as :func:`decompose`, or if ``probes`` is below 1.
    """
    rows, left_out = _design(rows, levels_per_row, masks_per_level)
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    directions = stream(key, "probes")
    values, slopes = evaluate_cells(
        lambda batch, draw: estimator.slopes(params, batch, draw, directions, probes),
        nested_draw(key, transform, state, spec),
        rows,
        (levels_per_row, masks_per_level),
        chunk,
        progress,
    )
    return (
        _of_values(values, transform.views, left_out, resamples),
        _of_values(slopes, transform.views, left_out, resamples),
    )


def decompose_gradients(
    estimator: Estimator,
    params: PyTree,
    transform: VarianceTransform,
    state: PyTree,
    spec: DrawSpec,
    rows: Batch,
    key: Array,
    *,
    levels_per_row: int = 8,
    masks_per_level: int = 4,
    resamples: int = 500,
    progress: Progress | None = None,
) -> Decomposition:
    """A, B, C of the gradient, exactly per sample, by running means of gradients.

    Keeps three running means the size of the parameters (cell, row, grand mean) and numbers; each
    evaluation is one backward pass of one row. Rows enter the spread of row means as
    ``(i - 1) / i |G_i - mean of the rows before|^2``, which is unbiased for every i > 1, so the
    bootstrap over rows needs no second pass.

    Arguments and errors as :func:`decompose`; ``progress`` counts evaluations, row by row.
    """
    rows, left_out = _design(rows, levels_per_row, masks_per_level)
    draw_row = nested_draw(key, transform, state, spec)
    gradient = jax.grad(lambda params, batch, draw: estimator.losses(params, batch, draw)[0])

    @jax.jit
    def visit(params: PyTree, grand, row: Batch, index: Array):
        def one_level(level: Array):
            def one_mask(cell, mask: Array):
                return add(cell, gradient(params, row, draw_row(index, level, mask)))

            cell, terms = jax.lax.scan(one_mask, start(params), jnp.arange(masks_per_level))
            return cell.mean, jnp.sum(terms) / (masks_per_level - 1)

        def next_level(running, level: Array):
            mean, within = one_level(level)
            running, term = add(running, mean)
            return running, (within, term)

        running, (within, terms) = jax.lax.scan(
            next_level, start(params), jnp.arange(levels_per_row)
        )
        grand, spread = add(grand, running.mean)
        return grand, (jnp.mean(within), jnp.sum(terms) / (levels_per_row - 1), spread)

    grand, found = start(params), []
    for index in range(rows.tokens.shape[0]):
        row = jax.tree.map(lambda field, i=index: field[i : i + 1], rows)
        grand, terms = visit(params, grand, row, np.int32(index))
        found.append(jax.device_get(terms))
        if progress is not None:
            progress(levels_per_row * masks_per_level)
    pattern, between, spread = np.asarray(found, np.float64).T
    if not np.all(np.isfinite(found)):
        raise ValueError("a gradient is not finite; nothing can be estimated")
    spread[0] = np.nan  # the first row has no rows before it
    terms = RowTerms(pattern, between, spread, levels_per_row, masks_per_level)
    square = float(square_norm(grand.mean)) - float(np.nanmean(spread)) / len(pattern)
    return _result(
        nested.combine(terms),
        nested.spread_error(nested.bootstrap_terms(terms, resamples)),
        square,
        transform.views,
        (len(pattern), levels_per_row, masks_per_level),
        left_out,
    )


def _design(rows: Batch, levels: int, masks: int) -> tuple[Batch, int]:
    rows, left_out = scored_rows(rows)
    count = rows.tokens.shape[0]
    if min(count, levels, masks) < 2:
        raise ValueError(
            f"a design of {count} scored rows, {levels} levels and {masks} masks cannot be "
            "decomposed; each must be at least 2"
        )
    return rows, left_out


def _of_values(values: np.ndarray, views: int, left_out: int, resamples: int) -> Decomposition:
    """From losses [..., rows, levels, masks]; leading axes are probes and are averaged over."""
    each = nested.components(values)
    mean = Components(*(np.mean(part) for part in each))
    samples = nested.bootstrap(values, resamples)
    over_rows = nested.spread_error(
        Components(*(part.reshape(len(part), -1).mean(1) for part in samples))
    )
    errors = over_rows
    if values.ndim > 3:
        count = each.total.size
        over_probes = [part.var(ddof=1) / count if count > 1 else math.nan for part in each]
        errors = Components(*(math.sqrt(e**2 + p) for e, p in zip(over_rows, over_probes)))
    row_means = values.mean((-2, -1))
    square = row_means.mean(-1) ** 2 - row_means.var(-1, ddof=1) / row_means.shape[-1]
    return _result(mean, errors, float(np.mean(square)), views, values.shape[-3:], left_out)


def _result(
    parts: Components,
    errors: Components,
    signal: float,
    views: int,
    shape: tuple[int, int, int],
    left_out: int,
) -> Decomposition:
    estimates = [Estimate(float(value), float(error)) for value, error in zip(parts, errors)]
    return Decomposition(*estimates, signal, views, *shape, left_out)
