"""Loss and gradient by noise level: v, g, c on a grid, and the densities that follow from them.

With f the loss of one forward pass at level u (before importance weights), over rows and masks,

    v(u) = E Var(f | row)    g(u) = E f    c(u) = Var(E[f | row])    s = E f^2 = v + g^2 + c .

A level drawn with density q and weighted by 1/q has the second moment ``int s / q``, smallest for
``q ~ sqrt(s)`` (P-POTS, arXiv 2511.18159, whose scripts leave c out). Where levels are stratified,
the main effect g is removed already and ``sqrt(v + c)`` takes its place.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import GRID_BITS, Draw, DrawSpec
from mdm_jax.meter import nested
from mdm_jax.meter.nested import CrossedMoments, crossed_draw, evaluate_cells, scored_rows
from mdm_jax.meter.subject import Estimator
from mdm_jax.objectives.objective import Objective
from mdm_jax.rng import stream
from mdm_jax.schedules.coordinates import logsnr_from_masking_rate
from mdm_jax.types import Array, ArrayLike, Batch, PyTree
from mdm_jax.variance.moments import LevelMoments
from mdm_jax.variance.transform import VarianceTransform, draw_batch

_FIRST, _LAST = 2.0 ** -(GRID_BITS + 1), 1 - 2.0 ** -(GRID_BITS + 1)
_ROUNDING = 1e-6  # of float32 rates at the ends of a law's support


class Moments(NamedTuple):
    """v, g, c, s at each level with standard errors (bootstrap over rows); see ``nested.py``."""

    value: CrossedMoments
    standard_error: CrossedMoments


@dataclasses.dataclass(frozen=True)
class LevelTable:
    """Statistics at given levels.

    Attributes:
        masking_rates: [levels], increasing.
        quantiles: [levels] of the objective's law at these rates; decreasing.
        base_density: [levels] density of the masking rate under the objective's law.
        loss: of the loss, nats per row.
        gradient: of its gradient (traces; ``mean`` is the norm of the mean gradient), or None if it
            was not measured.
        nats_per_token: [levels] mean loss over mean number of scored tokens.
        rows, masks_per_level, passes, rows_left_out: size of the design.
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
        """JSON values."""
        found: dict[str, Any] = {
            "masking_rates": self.masking_rates.tolist(),
            "quantiles": self.quantiles.tolist(),
            "base_density": self.base_density.tolist(),
            "nats_per_token": self.nats_per_token.tolist(),
        }
        for name in ("loss", "gradient"):
            moments = getattr(self, name)
            if moments is not None:
                errors = moments.standard_error._asdict()
                found[name] = {k: v.tolist() for k, v in moments.value._asdict().items()} | {
                    f"{k}_standard_error": [float(e) if np.isfinite(e) else None for e in v]
                    for k, v in errors.items()
                }
        counts = ("rows", "masks_per_level", "passes", "rows_left_out")
        return found | {name: getattr(self, name) for name in counts}


def measure_levels(
    estimator: Estimator,
    params: PyTree,
    transform: VarianceTransform,
    state: PyTree,
    spec: DrawSpec,
    rows: Batch,
    key: Array,
    *,
    masking_rates: ArrayLike,
    masks_per_level: int = 4,
    probes: int = 0,
    chunk: int = 64,
    resamples: int = 200,
    progress: Callable[[int], None] | None = None,
) -> LevelTable:
    """v, g and c on a grid of levels shared by all rows (a crossed design).

    Where a row has several levels (blocks), all of them take the level of the grid.

    Args:
        estimator: network and objective, from ``make_estimator``.
        params: parameters.
        transform: its views are averaged over, all at the level of the grid;
            ``variance.identity()`` for single masks.
        state: of the transform.
        spec: of a training batch.
        rows: rows [N, L] drawn from the data.
        key: typed key.
        masking_rates: [levels], increasing, in (0, 1] and within the law's support.
        masks_per_level: at least 2.
        probes: random directions along which the gradient is measured, 0 for the loss alone.
        chunk: evaluations per forward call, at least 1.
        resamples: bootstrap samples.
        progress: called with the number of evaluations done since the last call.

    Raises:
        ValueError: if the rates are not increasing in (0, 1] or lie outside the law's support, no
            row has an eligible token, the design is too small, ``chunk`` is below 1, or a loss is
            not finite.
    """
    rates = np.asarray(masking_rates, np.float64)
    rows, left_out = scored_rows(rows)
    directions, objective = stream(key, "probes"), estimator.objective
    quantiles = quantiles_of(objective, rates)

    def score(batch: Batch, draw: Draw) -> PyTree:
        if probes:
            return estimator.slopes(params, batch, draw, directions, probes)
        return estimator.losses(params, batch, draw)

    found = evaluate_cells(
        score,
        crossed_draw(key, transform, state, spec, jnp.asarray(quantiles, jnp.float32)),
        rows,
        (len(rates), masks_per_level),
        chunk,
        progress,
    )
    values, slopes = found if probes else (found, None)
    loss = Moments(nested.level_moments(values), nested.level_errors(values, resamples))
    tokens = float(np.mean(np.sum(np.asarray(rows.eligible), axis=-1)))
    return LevelTable(
        masking_rates=rates,
        quantiles=quantiles,
        base_density=base_density(objective, rates),
        loss=loss,
        gradient=None if slopes is None else _over_probes(slopes, resamples),
        nats_per_token=loss.value.mean / tokens,
        rows=rows.tokens.shape[0],
        masks_per_level=masks_per_level,
        passes=transform.views,
        rows_left_out=left_out,
    )


def quantiles_of(objective: Objective, masking_rates: np.ndarray) -> np.ndarray:
    """Quantiles of the objective's law at masking rates, on the open interval; same shape.

    Raises:
        ValueError: if the rates are not increasing in (0, 1], any is outside the law's support, or
            two are too close for the law to tell them apart.
    """
    rates = np.asarray(masking_rates, np.float64)
    if (
        rates.ndim != 1
        or len(rates) < 2
        or not (np.all(np.diff(rates) > 0) and rates[0] > 0 and rates[-1] <= 1)
    ):
        raise ValueError(f"masking_rates must increase within (0, 1], got {rates}")
    highest, lowest = (float(jax.nn.sigmoid(-jnp.asarray(end))) for end in objective.law.support)
    given = f"masking_rates {rates[0]:g} to {rates[-1]:g}"
    if rates[0] < lowest * (1 - _ROUNDING) or rates[-1] > highest * (1 + _ROUNDING):
        raise ValueError(  # the law would clip them to its ends
            f"{given} reach beyond those of the law, which covers {lowest:g} to {highest:g}; "
            "give rates within"
        )
    logsnr = logsnr_from_masking_rate(jnp.minimum(jnp.asarray(rates, jnp.float32), _LAST))
    quantiles = np.asarray(objective.law.cdf(logsnr), np.float64)
    if np.any(np.diff(quantiles) >= 0):
        raise ValueError(
            f"{given} are not told apart by the law, which covers {lowest:g} to {highest:g}; "
            "give fewer, farther apart"
        )
    return np.clip(quantiles, _FIRST, _LAST)


def base_density(objective: Objective, masking_rates: np.ndarray) -> np.ndarray:
    """Density of the masking rate under the objective's law; 1 for a uniform rate.

    ``law(logsnr) / (m (1 - m))``; taken next to the end at m = 1.
    """

    @jax.jit
    def density(rates: Array) -> Array:
        rates = jnp.minimum(rates, _LAST)
        log_pdf = objective.law.log_pdf(logsnr_from_masking_rate(rates))
        return jnp.exp(log_pdf - jnp.log(rates) - jnp.log1p(-rates))

    return np.asarray(density(jnp.asarray(masking_rates, jnp.float32)), np.float64)


def optimal_density(table: LevelTable, target: np.ndarray) -> np.ndarray:
    """Density over the masking rate proportional to ``base_density * sqrt(target)``, [levels].

    Args:
        table: whose grid the target lives on.
        target: [levels] second moment that the density is to flatten: ``second`` for independent
            levels (p*), ``pattern + data`` for stratified ones, ``pattern + mean_square`` as in the
            scripts of P-POTS; of the loss or of the gradient. Negative estimates count as zero.

    Returns:
        Density normalised by the trapezoid rule over the grid's range: what lies below the first
        rate is not in it.

    Raises:
        ValueError: if the target vanishes everywhere.
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
    """The density that a transform draws masking rates from.

    Of a transform that tells its profile it is the profile's density. One that tells none is taken
    at its weights: a warp that is exact pays ``-log density`` into ``log_weight``.

    Args:
        key: typed key.
        transform: any transform; without a warp the density is that of the objective's law. A warp
            without profile must pay its density.
        state: of the transform.
        spec: of a training batch.
        objective: whose law turns quantiles into masking rates.
        draws: batches to collect.

    Returns:
        (masking rates, density), sorted by rate; one entry per level of every view drawn.
    """
    keys = jax.random.split(stream(key, "density"), draws)

    @jax.jit
    def rates_and_log_density(keys: Array) -> tuple[Array, Array]:
        draw = jax.vmap(lambda k: draw_batch(k, transform, state, spec))(keys)
        log_density = -draw.log_weight
        if transform.profile is not None:
            log_density = transform.profile(state, draw.u).log_density
        return jax.nn.sigmoid(-objective.law.icdf(draw.u)), log_density

    found = rates_and_log_density(keys)
    rates, log_density = (np.asarray(a, np.float64).ravel() for a in found)
    order = np.argsort(rates)
    density = base_density(objective, rates) * np.exp(log_density)
    return rates[order], density[order]


def rate_grid(levels: int = 16, lowest: float = 1e-3, highest: float = 1.0) -> np.ndarray:
    """Masking rates for a table: a third of them logarithmic up to 0.1, the rest even from there.

    All are even if ``lowest`` is 0.1 or more.

    Raises:
        ValueError: if levels < 6 or not 0 < lowest < highest <= 1.
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


def _over_probes(slopes: np.ndarray, resamples: int) -> Moments:
    value = nested.level_moments(slopes)
    error = nested.level_errors(slopes, resamples)
    probes = slopes.shape[0]

    def mean(part: np.ndarray) -> np.ndarray:
        return part.mean(0)

    def spread(part: np.ndarray, each: np.ndarray) -> np.ndarray:
        over_probes = part.var(0, ddof=1) / probes if probes > 1 else np.nan
        return np.sqrt((each**2).mean(0) + over_probes)

    value, error = CrossedMoments(*map(mean, value)), CrossedMoments(*map(spread, value, error))
    # Slopes along random signs average to nothing; the norm of the mean gradient is meant.
    norm = np.sqrt(np.maximum(value.mean_square, 0.0))
    norm_error = error.mean_square / (2 * np.maximum(norm, 1e-300))
    return Moments(value._replace(mean=norm), error._replace(mean=norm_error))


def binned_moments(table: LevelTable, moments: Moments, edges: ArrayLike) -> LevelMoments:
    """Moments of a table in bins of the quantile, as ``variance.ppots_binned`` takes them.

    Interpolates over the logarithm of 1 - u, the distance from the clean end, at each bin's
    (geometric) middle; beyond the table's quantiles the outermost values are kept. Where the
    masking rate is uniform it is 1 - u.

    Args:
        table: measured levels.
        moments: ``table.loss`` or ``table.gradient``.
        edges: [J + 1] quantiles from 0 to 1.
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
