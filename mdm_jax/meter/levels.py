"""Loss and gradient by noise level: v, g, c on a grid, and the densities that follow from them.

With f the loss of one forward pass at level u (no importance weight), over rows and masks,

    v(u) = E Var(f | row)    g(u) = E f    c(u) = Var(E[f | row])    s = E f^2 = v + g^2 + c .
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import GRID_BITS, Draw, DrawSpec
from mdm_jax.estimates import finite_or_none
from mdm_jax.meter.nested import (
    CrossedMoments,
    crossed_draw,
    crossed_terms,
    eligible_rows,
    evaluate_cells,
    mean_over_rows,
)
from mdm_jax.meter.subject import Progress, Subject
from mdm_jax.objectives.objective import Objective
from mdm_jax.rng import stream
from mdm_jax.schedules.coordinates import logsnr_from_masking_rate
from mdm_jax.types import Array, ArrayLike, Batch, PyTree
from mdm_jax.variance.densities import LevelMoments
from mdm_jax.variance.transform import VarianceTransform, draw_batch

_FIRST, _LAST = 2.0 ** -(GRID_BITS + 1), 1 - 2.0 ** -(GRID_BITS + 1)
_ROUNDING = 1e-6  # of float32 rates at the ends of a law's support


class Moments(NamedTuple):
    """v, g, c, s at each level, with standard errors from the spread over rows and probes."""

    value: CrossedMoments
    standard_error: CrossedMoments


@dataclasses.dataclass(frozen=True)
class LevelTable:
    """Statistics at increasing masking rates [levels].
    ``quantiles`` [levels] are the law's (decreasing), ``base_density`` [levels] its density of the
    masking rate. ``loss`` is in nats per row; ``gradient``, or None, holds traces, with the norm of
    the mean gradient as ``mean``. ``nats_per_token`` [levels] is mean loss / mean eligible tokens.
    """

    masking_rates: np.ndarray
    quantiles: np.ndarray
    base_density: np.ndarray
    loss: Moments
    gradient: Moments | None
    nats_per_token: np.ndarray
    rows: int
    masks_per_level: int
    passes: int
    rows_left_out: int

    def to_dict(self) -> dict[str, Any]:
        record: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Moments):
                record[field.name] = {
                    f"{name}{suffix}": [finite_or_none(x) for x in numbers]
                    for suffix, moments in zip(("", "_standard_error"), value)
                    for name, numbers in moments._asdict().items()
                }
            elif value is not None:
                record[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
        return record


def measure_levels(
    subject: Subject,
    rows: Batch,
    key: Array,
    *,
    masking_rates: ArrayLike,
    masks_per_level: int = 4,
    probes: int = 0,
    chunk: int = 64,
    progress: Progress | None = None,
) -> LevelTable:
    """v, g and c on a grid of levels shared by all rows and their blocks (a crossed design).
    Averages the transform's views. ``rows`` [N, L] are data, ``masking_rates`` increase within (0,
    1] and the law's support, ``probes`` counts random directions for the gradient (0: loss only),
    ``chunk`` evaluations per forward call. ValueError if rates do not fit, no row is eligible,
    there are < 2 rows or masks, ``chunk`` < 1, or a loss is not finite.
    """
    rates = np.asarray(masking_rates, np.float64)
    rows, left_out = eligible_rows(rows)
    directions, estimator = stream(key, "probes"), subject.estimator
    quantiles = quantiles_of(estimator.objective, rates)

    def score(batch: Batch, draw: Draw) -> tuple[Array, ...]:
        if probes:
            return estimator.directional(subject.params, batch, draw, directions, probes)
        return (estimator.losses(subject.params, batch, draw),)

    values, *derivatives = evaluate_cells(
        score,
        crossed_draw(key, subject, jnp.asarray(quantiles, jnp.float32)),
        rows,
        (len(rates), masks_per_level),
        chunk,
        progress,
    )
    loss = _moments(values)
    tokens = float(np.mean(np.sum(np.asarray(rows.eligible), axis=-1)))
    return LevelTable(
        masking_rates=rates,
        quantiles=quantiles,
        base_density=base_density(estimator.objective, rates),
        loss=loss,
        gradient=_norms(_moments(derivatives[0], probes=True)) if probes else None,
        nats_per_token=loss.value.mean / tokens,
        rows=rows.tokens.shape[0],
        masks_per_level=masks_per_level,
        passes=subject.transform.views,
        rows_left_out=left_out,
    )


def quantiles_of(objective: Objective, masking_rates: np.ndarray) -> np.ndarray:
    """Quantiles of the objective's law at masking rates, in (0, 1); same shape.
    ValueError unless rates increase in (0, 1] and the law's support, far enough apart for the law.
    """
    rates = np.asarray(masking_rates, np.float64)
    if (
        rates.ndim != 1
        or len(rates) < 2
        or not (np.all(np.diff(rates) > 0) and rates[0] > 0 and rates[-1] <= 1)
    ):
        raise ValueError(f"masking_rates must increase within (0, 1], got {rates}")
    highest, lowest = (float(jax.nn.sigmoid(-jnp.asarray(end))) for end in objective.law.support)
    named = f"masking_rates {rates[0]:g} to {rates[-1]:g}"
    if rates[0] < lowest * (1 - _ROUNDING) or rates[-1] > highest * (1 + _ROUNDING):
        raise ValueError(  # the law would clip them to its ends
            f"{named} reach beyond those of the law, which covers {lowest:g} to {highest:g}; "
            "give rates within"
        )
    logsnr = logsnr_from_masking_rate(jnp.minimum(jnp.asarray(rates, jnp.float32), _LAST))
    quantiles = np.asarray(objective.law.cdf(logsnr), np.float64)
    if np.any(np.diff(quantiles) >= 0):
        raise ValueError(
            f"{named} are not told apart by the law, which covers {lowest:g} to {highest:g}; "
            "give fewer, farther apart"
        )
    return np.clip(quantiles, _FIRST, _LAST)


def base_density(objective: Objective, masking_rates: np.ndarray) -> np.ndarray:
    """Density of the masking rate, ``law(logsnr) / (m (1 - m))``: 1 for a uniform rate."""

    @jax.jit
    def density(rates: Array) -> Array:
        rates = jnp.minimum(rates, _LAST)
        log_pdf = objective.law.log_pdf(logsnr_from_masking_rate(rates))
        return jnp.exp(log_pdf - jnp.log(rates) - jnp.log1p(-rates))

    return np.asarray(density(jnp.asarray(masking_rates, jnp.float32)), np.float64)


def optimal_density(table: LevelTable, target: np.ndarray) -> np.ndarray:
    """Density over the masking rate proportional to ``base_density * sqrt(target)``, [levels].
    ``target``, of loss or gradient: ``second`` for independent levels (p*, arXiv 2511.18159),
    ``pattern + data`` for stratified ones, ``pattern + mean_square`` in the scripts of P-POTS.
    Negative values count as 0. Normalised by the trapezoid rule. ValueError if all are 0.
    """
    shape = table.base_density * np.sqrt(np.maximum(target, 0.0))
    mass = np.trapezoid(shape, table.masking_rates)
    if not mass > 0:
        raise ValueError("the target is zero everywhere; there is nothing to be optimal for")
    return shape / mass


def warp_density(
    key: Array,
    transform: VarianceTransform,
    state: PyTree,
    spec: DrawSpec,
    objective: Objective,
    draws: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """Density of the masking rates that a transform draws: (rates, density), sorted by rate.
    One entry per level of every view of ``draws`` batches. From the transform's profile, or else
    its weights (``-log density`` if exact); the objective's law maps quantiles to masking rates.
    """
    keys = jax.random.split(stream(key, "density"), draws)

    @jax.jit
    def rates_and_log_density(keys: Array) -> tuple[Array, Array]:
        draw = jax.vmap(lambda k: draw_batch(k, transform, state, spec))(keys)
        log_density = -draw.log_weight
        if transform.profile is not None:
            log_density = transform.profile(state, draw.u).log_density
        return jax.nn.sigmoid(-objective.law.icdf(draw.u)), log_density

    collected = rates_and_log_density(keys)
    rates, log_density = (np.asarray(a, np.float64).ravel() for a in collected)
    order = np.argsort(rates)
    density = base_density(objective, rates) * np.exp(log_density)
    return rates[order], density[order]


class LevelWeighting(NamedTuple):
    """Densities over the logSNR [N]: of the levels drawn, and of what the expected loss weighs."""

    drawn: Array
    weighting: Array


def effective_weighting(
    objective: Objective,
    transform: VarianceTransform,
    state: PyTree,
    logsnr: ArrayLike,
    num_levels: int = 1,
) -> LevelWeighting:
    """What is minimised, by level: ``loss = int weighting(lambda) E[l | lambda] dlambda``.

    l is the mean loss of target elements before all weights: for Gaussian diffusion the error of
    eps, for masked the cross-entropy, which the bound weighs by ``m (1 - m)``, m the masking rate.
    ``drawn = law q``, with q the density of ``state`` over quantiles, and ``weighting = drawn w
    w_objective``: not changed by exact transforms (w = 1 / q), ``law q`` without weights.
    Elementwise in ``logsnr`` [N], a mean over ``num_levels`` of a row; can be jitted. ValueError
    for an objective or transform that does not say its weight by level.
    """
    if objective.log_level_weight is None:
        raise ValueError(
            f"{objective.name} states no weight by level (Objective.log_level_weight); masked, "
            "block, partition, uniform and Gaussian diffusion do"
        )
    if transform.profile is None:
        raise ValueError(
            f"{transform.name} states no density of its levels (VarianceTransform.profile)"
        )
    logsnr = jnp.asarray(logsnr, float)
    u = jnp.clip(objective.law.cdf(logsnr), _FIRST, _LAST)
    profile = transform.profile(state, jnp.broadcast_to(u[:, None], (u.size, num_levels)))
    log_law = objective.law.log_pdf(logsnr)[:, None]
    log_drawn = log_law + profile.log_density
    own = jnp.where(log_law > -jnp.inf, objective.log_level_weight(logsnr)[:, None], 0.0)
    # The terms that cancel are added first.
    weighting = jnp.exp((profile.log_density + profile.log_weight) + (log_law + own))
    return LevelWeighting(jnp.exp(log_drawn).mean(-1), weighting.mean(-1))


def rate_grid(levels: int = 16, lowest: float = 1e-3, highest: float = 1.0) -> np.ndarray:
    """Masking rates for a table: a third logarithmic up to 0.1, the rest evenly spaced above.
    All even if ``lowest >= 0.1``. ValueError if levels < 6 or not 0 < lowest < highest <= 1.
    """
    if levels < 6 or not 0 < lowest < highest <= 1:
        raise ValueError(
            "rate_grid needs levels >= 6 and 0 < lowest < highest <= 1, got "
            f"{levels}, {lowest}, {highest}"
        )
    turn = min(max(0.1, lowest), (lowest + highest) / 2)
    small = levels // 3 if turn > lowest else 0
    low = np.geomspace(lowest, turn, small, endpoint=False) if small else np.zeros(0)
    return np.concatenate([low, np.linspace(turn, highest, levels - small)])


def binned_moments(table: LevelTable, moments: Moments, edges: ArrayLike) -> LevelMoments:
    """Moments (``table.loss`` or ``.gradient``) in bins of the quantile, for ``ppots_binned``.
    Linear in log(1 - u) at the geometric middle of each bin; constant beyond the table.
    """
    noise = np.maximum(1.0 - np.asarray(edges, np.float64), _FIRST)
    middle = np.log(noise[1:] * noise[:-1]) / 2
    grid = np.log1p(-table.quantiles)

    def at(values: np.ndarray) -> Array:
        return jnp.asarray(np.interp(middle, grid, np.maximum(values, 0.0)), jnp.float32)

    value = moments.value
    return LevelMoments(
        second=at(value.second), mean=jnp.sqrt(at(value.mean_square)), data=at(value.data)
    )


def _moments(values: np.ndarray, probes: bool = False) -> Moments:
    """Moments of losses [rows, levels, masks], or of derivatives [probes, rows, levels, masks]."""
    parts = [mean_over_rows(terms, probes) for terms in crossed_terms(values)]
    return Moments(*(CrossedMoments(*part) for part in zip(*parts)))


def _norms(moments: Moments) -> Moments:
    # Derivatives along random signs average to nothing; the norm of the mean gradient is meant.
    value, error = moments
    norm = np.sqrt(np.maximum(value.mean_square, 0.0))
    norm_error = error.mean_square / (2 * np.maximum(norm, 1e-300))
    return Moments(value._replace(mean=norm), error._replace(mean=norm_error))
