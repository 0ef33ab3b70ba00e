"""A, B, C of the gradient while a network trains: small nested designs, averaged over time.

A measurement takes ``rows x levels x masks`` gradients of single rows at the parameters, the batch
and the chain of the moment, in one compiled program, of which only sketches are kept. They are
averaged over measurements, whose spread gives the standard errors.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Real, Whole, checked
from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.estimates import Estimate, sketch, standard_error_of_ratio
from mdm_jax.meter.nested import nested_draw, row_terms
from mdm_jax.meter.subject import ApplyFn, Subject, make_estimator
from mdm_jax.objectives.objective import Objective, accumulate_gradient, summed_loss
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree
from mdm_jax.variance.transform import VarianceTransform

PARTS = ("pattern", "rate", "data")
"""A, B and C in the records of a measurement."""


@checked
@dataclasses.dataclass(frozen=True)
class PanelSettings:
    """How often, and how much, the gradient's noise is measured during training."""

    cost: Annotated[float, Real("[0, 0.5]", "of training time", "at most; 0: not measured")] = 0.01
    rows: Annotated[int, Whole("[2, 1e4]", "rows", "of the batch, in a measurement")] = 4
    levels_per_row: Annotated[int, Whole("[2, 1e4]", "", "noise levels of a row")] = 2
    masks_per_level: Annotated[int, Whole("[2, 1e4]", "", "masks of a row at a level")] = 2
    window: Annotated[int, Whole("[2, 1e6]", "measurements", "averaged in the figures shown")] = 20

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.rows, self.levels_per_row, self.masks_per_level

    def passes(self, group: int = 1) -> int:
        """Rows that are taken through the network, forward and back, in a measurement."""
        return math.prod(self.shape) * group


def make_measurement(
    apply_fn: ApplyFn,
    objective: Objective,
    transform: VarianceTransform,
    spec: DrawSpec,
    settings: PanelSettings,
    *,
    group: int = 1,
    place: Callable[[PyTree], PyTree] = lambda rows: rows,
) -> Callable[[PyTree, PyTree, Batch, Array], tuple[Array, Array]]:
    """``measure(params, variance_state, batch, key) -> (sketches, eligible)``, to be jitted.

    Sketches [rows, levels, masks, 1024] are of the gradients, nats, of groups of ``group`` rows, a
    mean over each (:func:`~mdm_jax.estimates.sketch`), with their draws as in
    :mod:`mdm_jax.meter.nested`; ``eligible`` [] counts the groups, which come first, of rows with
    eligible tokens. One gradient is in memory at a time, as in a training step.

    ``spec`` is of the training batch; ``batch`` [B, L] has at least ``rows * group`` rows, of which
    random ones are taken: in a mixture the same slots hold the same source in every batch.
    ``place`` lays the rows of a group out over devices, which compute a row each if there are as
    many as data-parallel devices.
    """
    loss = summed_loss(apply_fn, objective)
    rows, levels, masks = settings.shape

    def measure(
        params: PyTree, variance_state: PyTree, batch: Batch, key: Array
    ) -> tuple[Array, Array]:
        estimator = make_estimator(apply_fn, objective)
        draw_row = nested_draw(key, Subject(estimator, params, transform, variance_state, spec))
        eligible = jnp.any(batch.eligible, axis=-1)
        order = random_rows(eligible, rows * group, stream(key, "rows"))
        chosen = jax.tree.map(lambda f: f[order].reshape(rows, group, *f.shape[1:]), batch)

        def cell(at: tuple[Array, Array, Array]) -> Array:
            row, level, mask = at
            members = row * group + jnp.arange(group)
            drawn: Draw = jax.vmap(draw_row, (0, None, None), 1)(members, level, mask)
            drawn = jax.tree.map(lambda leaf: leaf[:, :, 0], drawn)
            one = place(jax.tree.map(lambda field: field[row], chosen))
            gradients = accumulate_gradient(loss, params, one, drawn)[0]
            return sketch(gradients, stream(key, "sketch")) / group

        grid = jnp.meshgrid(*(jnp.arange(n) for n in settings.shape), indexing="ij")
        sketches = jax.lax.map(cell, tuple(axis.ravel() for axis in grid))
        count = jnp.sum(eligible[order].reshape(rows, group).all(-1))
        return sketches.reshape(*settings.shape, -1), count

    return measure


def random_rows(eligible: Array, count: int, key: Array) -> Array:
    """Numbers [count] of random distinct rows, those that are ``eligible`` [B] first."""
    return jnp.lexsort((jax.random.uniform(key, eligible.shape), ~eligible))[:count]


def measured(sketches: np.ndarray, eligible: int, group: int = 1) -> dict[str, float] | None:
    """A, B, C, their total and the signal of one measurement, unbiased, or None.

    Of :func:`make_measurement`'s results: traces of covariances of one row's gradient, nats squared
    per squared parameter, and the squared norm of the mean gradient. None if fewer than two groups
    have eligible tokens or a gradient is not finite.
    """
    values = np.asarray(sketches, np.float64)[: int(eligible)]
    if len(values) < 2 or not np.all(np.isfinite(values)):
        return None
    # A mean over a group of independent rows has a group's share of a row's variance.
    terms = row_terms(np.moveaxis(values, -1, 0))
    parts = {name: group * float(part.mean(-1).sum()) for name, part in terms._asdict().items()}
    means = values.mean((1, 2))
    signal = np.sum(means.mean(0) ** 2 - means.var(0, ddof=1) / len(means))
    return {**parts, "signal": float(signal)}


def shares(records: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """A, B and C as shares of the total over measurements; standard errors NaN for fewer than 3.

    Ratios of sums, with errors from the spread over measurements, to first order.
    """
    total = np.array([record["total"] for record in records], np.float64)
    found = {}
    for name in PARTS:
        part = np.array([record[name] for record in records], np.float64)
        error = standard_error_of_ratio(part, total) if len(records) > 2 else math.nan
        found[name] = Estimate(float(part.sum() / total.sum()), error)
    return found
