"""Variance components A, B, C of a training loss and of its gradient.
For one forward pass of one row (all views, importance weights inside) the variance is A (mask
positions) + B (level) + C (row); an autoregressive loss has C alone. For gradients it is the trace
of the covariance. Dropout must be off, or it counts in A. Estimators and draws: ``nested.py``.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.estimates import Estimate, add, finite_or_none, square_norm, start
from mdm_jax.meter.nested import (
    Components,
    RowTerms,
    bootstrap_errors,
    check_design,
    components,
    eligible_rows,
    evaluate_cells,
    nested_draw,
    row_terms,
)
from mdm_jax.meter.subject import Progress, Subject
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """Variance of one forward pass and its parts, in nats squared (per squared parameter).
    Parts A, B, C (``pattern``, ``rate``, ``data``) and ``total`` have bootstrap errors over rows;
    unbiased, so B and C can be negative. ``signal``: squared mean loss, or squared norm of the mean
    gradient, unbiased. ``passes``: views. ``rows_left_out`` have no eligible tokens.
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
        """Total over signal, comparable between models; NaN if the signal is not positive."""
        return self.total.value / self.signal if self.signal > 0 else math.nan

    def to_dict(self) -> dict[str, Any]:
        record = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Estimate):
                record[field.name] = value.value
                record[f"{field.name}_standard_error"] = finite_or_none(value.standard_error)
            else:
                record[field.name] = value
        return record | {"noise_to_signal": finite_or_none(self.noise_to_signal)}


def decompose(
    subject: Subject,
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
    ``rows`` [N, L] are drawn at random from the data; those without eligible tokens are left out.
    With one key, transforms get the same base noise. ``chunk`` evaluations share a forward call.
    ValueError if no row is eligible, there are < 2 rows, levels or masks, ``chunk`` < 1, or a loss
    is not finite.
    """
    rows, left_out = _design(rows, levels_per_row, masks_per_level)
    values = evaluate_cells(
        lambda batch, draw: subject.estimator.losses(subject.params, batch, draw),
        nested_draw(key, subject),
        rows,
        (levels_per_row, masks_per_level),
        chunk,
        progress,
    )
    return _of_values(values, subject, left_out, resamples)


def decompose_by_probes(
    subject: Subject,
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
    """A, B, C of the loss and of the gradient, by forward-mode probes: (loss, gradient).
    The variance of derivatives along random directions estimates the trace of the covariance
    (Hutchinson), in about ``1 + probes`` forward passes; standard errors include the spread over
    probes. Custom reverse rules need :func:`decompose_gradients`. See :func:`decompose`.
    """
    rows, left_out = _design(rows, levels_per_row, masks_per_level)
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    directions, measure = stream(key, "probes"), subject.estimator.directional
    values, derivatives = evaluate_cells(
        lambda batch, draw: measure(subject.params, batch, draw, directions, probes),
        nested_draw(key, subject),
        rows,
        (levels_per_row, masks_per_level),
        chunk,
        progress,
    )
    return (
        _of_values(values, subject, left_out, resamples),
        _of_values(derivatives, subject, left_out, resamples),
    )


def decompose_gradients(
    subject: Subject,
    rows: Batch,
    key: Array,
    *,
    levels_per_row: int = 8,
    masks_per_level: int = 4,
    resamples: int = 500,
    progress: Progress | None = None,
) -> Decomposition:
    """A, B, C of the gradient, exactly per sample, by running means of gradients.
    One backward pass per evaluation; holds three gradients. See :func:`decompose`.
    """
    rows, left_out = _design(rows, levels_per_row, masks_per_level)
    draw_row, losses = nested_draw(key, subject), subject.estimator.losses
    gradient = jax.grad(lambda params, batch, draw: losses(params, batch, draw)[0])

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

    grand, by_row = start(subject.params), []
    for index in range(rows.tokens.shape[0]):
        row = jax.tree.map(lambda field, i=index: field[i : i + 1], rows)
        grand, terms = visit(subject.params, grand, row, np.int32(index))
        by_row.append(jax.device_get(terms))
        if progress is not None:
            progress(levels_per_row * masks_per_level)
    pattern, between, spread = np.asarray(by_row, np.float64).T
    if not np.all(np.isfinite(by_row)):
        raise ValueError("a gradient is not finite; nothing can be estimated")
    spread[0] = np.nan  # the first row has no rows before it
    square = float(square_norm(grand.mean)) - float(np.nanmean(spread)) / len(pattern)
    terms = RowTerms(pattern, between, spread, levels_per_row, masks_per_level)
    return _result(terms, square, subject, left_out, resamples)


def _design(rows: Batch, levels: int, masks: int) -> tuple[Batch, int]:
    rows, left_out = eligible_rows(rows)
    check_design(rows.tokens.shape[0], levels, masks)
    return rows, left_out


def _of_values(
    values: np.ndarray, subject: Subject, left_out: int, resamples: int
) -> Decomposition:
    """Decomposition of losses [..., rows, levels, masks], averaged over leading axes (probes)."""
    means = values.mean((-2, -1))
    square = means.mean(-1) ** 2 - means.var(-1, ddof=1) / means.shape[-1]
    return _result(row_terms(values), float(np.mean(square)), subject, left_out, resamples)


def _result(
    terms: RowTerms, signal: float, subject: Subject, left_out: int, resamples: int
) -> Decomposition:
    def mean_over_probes(index: np.ndarray) -> Components:
        return Components(*(np.mean(part) for part in components(terms.take(index))))

    rows = terms.pattern.shape[-1]
    errors = bootstrap_errors(mean_over_probes, rows, resamples)
    estimates = []
    for part, error in zip(components(terms), errors):
        if part.ndim:  # the spread over probes
            error = math.hypot(
                error, part.std(ddof=1) / part.size**0.5 if part.size > 1 else math.nan
            )
        estimates.append(Estimate(float(np.mean(part)), float(error)))
    shape = (rows, terms.levels, terms.masks)
    return Decomposition(*estimates, signal, subject.transform.views, *shape, left_out)
