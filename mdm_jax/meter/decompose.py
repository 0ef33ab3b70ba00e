"""Variance components A, B, C of a training loss and of its gradient.
For one forward pass of one row (all views, importance weights inside) the variance is A (mask
positions) + B (level) + C (row); an autoregressive loss has C alone. For gradients it is the trace
of the covariance. Dropout must be off, or it counts in A. Estimators and draws: ``nested.py``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.estimates import (
    Estimate,
    RunningMean,
    add,
    finite_or_none,
    sketch,
    square_norm,
    start,
)
from mdm_jax.meter.nested import (
    Components,
    check_design,
    component_terms,
    eligible_rows,
    evaluate_cells,
    group_terms,
    mean_over_rows,
    nested_draw,
    row_terms,
    spread_terms,
)
from mdm_jax.meter.subject import Progress, Subject
from mdm_jax.pytrees import of_trained, trained
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Decomposition:
    """Variance of one forward pass and its parts, in nats squared (per squared parameter).
    Parts A, B, C (``pattern``, ``rate``, ``data``) and ``total`` are unbiased, so B and C can be
    negative. Standard errors are of the jackknife over rows (NaN for two); variances are skewed, so
    that for few rows two of them cover less than 95%. ``signal``: squared mean loss, or squared
    norm of the mean gradient, unbiased. ``passes``: views. ``rows_left_out``: without eligible
    tokens. ``within``: the part of C within groups, where rows come in groups (answers to a
    prompt); the errors are then of the jackknife over groups. ``noise``: A + B, with the error of
    the sum, whose terms depend on each other.
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
    noise: Estimate
    within: Estimate | None = None

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
    group: int = 1,
    progress: Progress | None = None,
) -> Decomposition:
    """A, B, C of the loss.
    ``rows`` [N, L] are drawn at random from the data; those without eligible tokens are left out.
    With one key, transforms get the same base noise. ``chunk`` evaluations share a forward call.
    ``group``: successive rows that answer one prompt, which splits C (``nested.group_terms``).
    ValueError if no row is eligible, there are < 2 rows, levels or masks, ``chunk`` < 1, or a loss
    is not finite.
    """
    rows, left_out = _design(rows, levels_per_row, masks_per_level, group)
    values = evaluate_cells(
        lambda batch, draw: subject.estimator.losses(subject.params, batch, draw),
        nested_draw(key, subject),
        rows,
        (levels_per_row, masks_per_level),
        chunk,
        progress,
    )
    return _of_values(values, subject, left_out, group)


def decompose_by_probes(
    subject: Subject,
    rows: Batch,
    key: Array,
    *,
    probes: int = 4,
    levels_per_row: int = 8,
    masks_per_level: int = 4,
    chunk: int = 64,
    group: int = 1,
    progress: Progress | None = None,
) -> tuple[Decomposition, Decomposition]:
    """A, B, C of the loss and of the gradient, by forward-mode probes: (loss, gradient).
    The variance of derivatives along random directions estimates the trace of the covariance
    (Hutchinson), in about ``1 + probes`` forward passes; standard errors include the spread over
    probes. Custom reverse rules need :func:`decompose_gradients`. See :func:`decompose`.
    """
    rows, left_out = _design(rows, levels_per_row, masks_per_level, group)
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
        _of_values(values, subject, left_out, group),
        _of_values(derivatives, subject, left_out, group),
    )


def decompose_gradients(
    subject: Subject,
    rows: Batch,
    key: Array,
    *,
    levels_per_row: int = 8,
    masks_per_level: int = 4,
    progress: Progress | None = None,
) -> Decomposition:
    """A, B, C of the gradient, exactly per sample, by running means of gradients.
    One backward pass per evaluation; holds four gradients, and of each row's mean a sketch for the
    standard error. See :func:`decompose`.
    """
    rows, left_out = _design(rows, levels_per_row, masks_per_level)
    visit = jax.jit(row_visit(subject, key, levels_per_row, masks_per_level))
    grand, by_row = start(trained(subject.params)), []
    for index in range(rows.tokens.shape[0]):
        row = jax.tree.map(lambda field, i=index: field[i : i + 1], rows)
        grand, seen = visit(subject.params, grand, row, np.int32(index))
        by_row.append(jax.device_get(seen))
        if progress is not None:
            progress(levels_per_row * masks_per_level)
    seen = RowGradients(*(np.asarray(part, np.float64) for part in zip(*by_row)))
    if not all(np.all(np.isfinite(part)) for part in seen):
        raise ValueError("a gradient is not finite; nothing can be estimated")
    count, shape = len(by_row), (levels_per_row, masks_per_level)
    noise = seen.change.sum() / (count - 1) / count
    signal = float(square_norm(grand.mean)) - noise
    terms, twice = gradient_terms(seen, *shape)
    return _result(terms, signal, subject, shape, left_out, twice)


class RowGradients(NamedTuple):
    """Of the gradients of one row: A, the variance over levels of means over masks, the term of the
    row's mean in :func:`~mdm_jax.estimates.add`, and the sketch of that mean.
    """

    pattern: Array
    between: Array
    change: Array
    sketch: Array


def row_visit(subject: Subject, key: Array, levels: int, masks: int) -> Callable[..., Any]:
    """``visit(params, grand, row, index) -> (grand, RowGradients)``: adds a row to the mean."""
    draw_row, losses = nested_draw(key, subject), subject.estimator.losses

    def visit(params: PyTree, grand: RunningMean, row: Batch, index: Array):
        part = trained(params)
        gradient = jax.grad(of_trained(lambda *cell: losses(*cell)[0], params))

        def next_mask(cell: RunningMean, at: tuple[Array, Array]):
            return add(cell, gradient(part, row, draw_row(index, *at)))

        def next_level(running: RunningMean, level: Array):
            at = jnp.broadcast_to(level, masks), jnp.arange(masks)
            cell, terms = jax.lax.scan(next_mask, start(part), at)
            running, term = add(running, cell.mean)
            return running, (jnp.sum(terms) / (masks - 1), term)

        running, (within, terms) = jax.lax.scan(next_level, start(part), jnp.arange(levels))
        grand, change = add(grand, running.mean)
        between, sketched = (
            jnp.sum(terms) / (levels - 1),
            sketch(running.mean, stream(key, "sketch")),
        )
        return grand, RowGradients(jnp.mean(within), between, change, sketched)

    return visit


def gradient_terms(seen: RowGradients, levels: int, masks: int) -> tuple[Components, float]:
    """Terms of the components from the rows' gradients, fields [rows, ...]; and what the jackknife
    counts twice. C is exact: sketches only share its sum of squared deviations out among the rows.

    Of the variance of a variance over n rows with covariance S, the jackknife counts the part of
    pairs of rows, ``2 tr(S^2) / (n (n - 1))``, twice (Efron and Stein 1981). It matters where rows
    are about equally far from their mean in many directions.
    """
    deviations = seen.sketch - seen.sketch.mean(0)
    squares = (deviations**2).sum(1)
    scale = seen.change.sum() / max(squares.sum(), np.finfo(np.float64).tiny)
    terms = component_terms(
        seen.pattern, seen.between, spread_terms(scale * squares), levels, masks
    )
    pairs = np.sum((deviations.T @ deviations) ** 2) - np.sum(squares**2)
    number = len(squares) * (len(squares) - 1)
    return terms, 2 * scale**2 * pairs / number**2


def _design(rows: Batch, levels: int, masks: int, group: int = 1) -> tuple[Batch, int]:
    rows, left_out = eligible_rows(rows)
    if left_out and group > 1:
        raise ValueError(
            f"{left_out} rows have no eligible token, and groups of {group} rows cannot be taken "
            "apart; leave their whole groups out"
        )
    check_design(rows.tokens.shape[0], levels, masks)
    return rows, left_out


def _of_values(values: np.ndarray, subject: Subject, left_out: int, group: int) -> Decomposition:
    """Decomposition of losses [..., rows, levels, masks], averaged over leading axes (probes)."""
    means = values.mean((-2, -1))
    if group == 1:
        terms, within = row_terms(values), None
    else:
        terms, within = group_terms(values, group)
        means = means.reshape(*means.shape[:-1], -1, group).mean(-1)
    square = means.mean(-1) ** 2 - means.var(-1, ddof=1) / means.shape[-1]
    made = _result(terms, float(np.mean(square)), subject, values.shape[-2:], left_out)
    if within is None:
        return made
    part = Estimate(*map(float, mean_over_rows(within, probes=within.ndim > 1)))
    return dataclasses.replace(made, rows=values.shape[-3], within=part)


def _result(
    terms: Components,
    signal: float,
    subject: Subject,
    shape: tuple[int, int],
    left_out: int,
    twice: float = 0.0,
) -> Decomposition:
    """``twice`` is what the jackknife counts twice in the variance of C, and of the total."""
    estimates = (
        Estimate(*map(float, mean_over_rows(part, probes=part.ndim > 1, twice=each)))
        for part, each in zip(terms, (0.0, 0.0, twice, twice))
    )
    rows, views = terms.pattern.shape[-1], subject.transform.views
    both = terms.pattern + terms.rate
    noise = Estimate(*map(float, mean_over_rows(both, probes=both.ndim > 1)))
    return Decomposition(*estimates, signal, views, rows, *shape, left_out, noise)
