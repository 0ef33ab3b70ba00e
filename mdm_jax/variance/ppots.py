"""P-POTS: importance sampling of the masking rate by moments of the loss or gradient per level."""

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Decay, Real, checked
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.types import Array, ArrayLike
from mdm_jax.variance.densities import (
    Floor,
    LevelLosses,
    LevelMoments,
    LogBins,
    PiecewiseDensity,
    SmallestRate,
    Target,
    WarmupSteps,
    bin_of,
    gradient_stats,
    integrand,
    log_spaced_edges,
    moment_density,
    piecewise_density,
    second_moment,
)
from mdm_jax.variance.transform import VarianceTransform
from mdm_jax.variance.warps import counters, importance, learned_warp, unweighted

_START = (-0.3, 0.4, -1.0, 0.3, 0.2, -0.2, 0.2)
_SPREAD = 0.6


class EprParameters(NamedTuple):
    """Parameters of the curve ``sqrt(g(m)^2 + v(m))`` over the masking rate m, with

        g(m) = mean_scale * exp(mean_growth * m ** mean_power)
        v(m) = high_scale * m ** high_power + low_scale * (1 - m) ** low_power

    for the mean and variance of the loss (published letters a, b, A, r, q, k, m). Scales and growth
    are positive, powers at least 1. A common factor (c on the mean's scale, c^2 on the other two)
    leaves the density unchanged. v is finite at m = 0, so it cannot follow Bernoulli's 1/m.
    """

    high_scale: float
    low_scale: float
    mean_scale: float
    high_power: float
    low_power: float
    mean_growth: float
    mean_power: float


class EprFit(NamedTuple):
    """The best of all restarts, and KL(measured || fitted) on the grid, nats."""

    parameters: EprParameters
    divergence: float


def epr_curve(parameters: EprParameters, rates: ArrayLike) -> np.ndarray:
    """The unnormalised curve at masking rates in [0, 1], float64, same shape."""
    p, m = parameters, np.asarray(rates, np.float64)
    mean = p.mean_scale * np.exp(p.mean_growth * m**p.mean_power)
    variance = p.high_scale * m**p.high_power + p.low_scale * (1.0 - m) ** p.low_power
    return np.sqrt(mean**2 + variance)


def fit_epr(
    rates: ArrayLike, mean: ArrayLike, variance: ArrayLike, restarts: int = 20, seed: int = 0
) -> EprFit:
    """Fits the EPR curve to measured moments of the integrand at ``rates`` [N >= 3], increasing.
    Minimises ``KL(w || p)`` by the trapezoid rule, w the normalised ``sqrt(mean^2 + variance)``,
    with L-BFGS-B from random starts. The published ``variance`` is the pattern variance v; v + c,
    over masks and rows, gives the second moment. Raises: ValueError if shapes or values are out of
    range, all moments are zero, or no restart ends at a finite divergence.
    """
    from scipy import optimize  # slow to import

    rates, mean, variance = (np.asarray(a, np.float64) for a in (rates, mean, variance))
    _check(rates, mean, variance, restarts)
    step = np.diff(rates)
    trapezoid = 0.5 * (np.append(step, 0.0) + np.append(0.0, step))
    curve = np.hypot(mean, np.sqrt(variance))
    curve = curve / curve.max()  # squares of large losses would overflow
    measured = trapezoid * curve / np.sum(trapezoid * curve)
    held = measured > 0

    def divergence(raw: np.ndarray) -> float:
        with np.errstate(over="ignore", invalid="ignore"):  # bad starts overflow
            fitted = trapezoid * epr_curve(_positive(raw), rates)
            fitted = fitted / np.sum(fitted)
            return float(np.sum(measured[held] * np.log(measured[held] / fitted[held])))

    rng = np.random.default_rng(seed)
    starts = np.array(_START) + _SPREAD * rng.standard_normal((restarts, len(_START)))
    results = [optimize.minimize(divergence, s, method="L-BFGS-B") for s in starts]
    finite = [result for result in results if np.isfinite(result.fun)]
    if not finite:
        raise ValueError(
            f"fit_epr: none of {restarts} restarts from seed {seed} ended at a finite divergence; "
            "take more restarts or another seed, or give the moments to ppots_binned as they are"
        )
    best = min(finite, key=lambda result: result.fun)
    return EprFit(_positive(best.x), float(best.fun))


def _positive(raw: np.ndarray) -> EprParameters:
    a, b, scale, r, q, k, m = np.logaddexp(0.0, raw)  # softplus
    tiny = 1e-9
    return EprParameters(*map(float, (a + tiny, b + tiny, scale + tiny, 1 + r, 1 + q, k, 1 + m)))


def _check(rates: np.ndarray, mean: np.ndarray, variance: np.ndarray, restarts: int) -> None:
    if rates.ndim != 1 or rates.size < 3 or not rates.shape == mean.shape == variance.shape:
        raise ValueError(
            "fit_epr needs three arrays [N], N >= 3, of one shape, got "
            f"{rates.shape}, {mean.shape} and {variance.shape}"
        )
    if not (np.all(np.diff(rates) > 0) and rates[0] >= 0 and rates[-1] <= 1):
        raise ValueError(f"fit_epr: rates must increase within [0, 1], got {rates}")
    moments = np.concatenate([mean, variance])
    if not (np.all(np.isfinite(moments)) and np.all(variance >= 0) and np.any(moments != 0)):
        raise ValueError(
            "fit_epr: moments must be finite, variances not negative and not everything zero; got "
            f"mean {mean}, variance {variance}"
        )
    if restarts < 1:
        raise ValueError(f"fit_epr needs at least 1 restart, got {restarts}")


class PpotsState(NamedTuple):
    """Running moments of the integrand per bin, [J].
    ``second``, ``mean``: decayed means of its square and of itself, of total ``weight`` from 0
    (never visited) towards 1. ``steps`` counts batches used, ``rejected`` non-finite batches, which
    change nothing else.
    """

    second: Array
    mean: Array
    weight: Array
    steps: Array
    rejected: Array


@checked
def ppots(
    num_bins: LogBins = 32,
    smallest_rate: SmallestRate = 1e-3,
    decay: Decay = 0.999,
    floor: Floor = 0.1,
    warmup_steps: WarmupSteps = 100,
    target: Target = second_moment,
) -> VarianceTransform:
    """P-POTS, adaptive: level bins with masses from running moments of the raw loss.

    J = ``num_bins`` bins are equally wide in the logarithm of the masking rate m = 1 - u, with one
    below ``smallest_rate``. Past batches, views averaged per level (optimal for pairs), give the
    density; a bin never visited counts as average. ``decay`` is per draw of a bin; ``floor`` bounds
    the weights by ``1 / floor``; ``target`` is the moment whose root the density follows: for
    stratified levels ``densities.level_variance``. For per-row gradient norms call ``update`` with
    ``densities.gradient_stats(stats, norms)``.
    Keeps: E[weight f(u)] = int f at every step. Couples: steps, through the state. Costs: one view,
    and a few operations on [J]. Removes: as :func:`ppots_binned`, without calibration. Bias: exact.
    Reference: arXiv 2511.18159, made adaptive; Nichol and Dhariwal 2021, with an exact weight.
    Raises: ValueError if running moments cannot give the target.
    """
    edges = log_spaced_edges(num_bins, smallest_rate)
    return running_bins("ppots", edges, lambda count: decay**count, floor, warmup_steps, target)


@checked
def ppots_slopes(
    num_bins: LogBins = 32,
    smallest_rate: SmallestRate = 1e-3,
    decay: Decay = 0.99,
    floor: Floor = 0.2,
    warmup_steps: WarmupSteps = 50,
    target: Target = second_moment,
) -> VarianceTransform:
    """:func:`ppots` with running moments of the gradient norm at the logits.

    The optimal density follows the second moment of the row's *gradient*. Its norm at the logits is
    nearly free: squared, for a cross-entropy, between ``(1 - p)^2`` and twice that, p the
    probability of the right token, summed over targets in ``LossStats.gradient_norms``. The mean of
    ``weight^2 gradient_norms`` per bin is the gradient's second moment up to a factor, if gradients
    of tokens are not aligned and the network scales them alike at every level.
    Keeps: E[weight f(u)] = int f at every step. Couples: steps, through the state. Costs: as
    :func:`ppots`, and an exponential per token. Removes: the spread of the root of the gradient's
    second moment over levels. Bias: exact. Reference: arXiv 2511.18159; Katharopoulos and Fleuret
    2018 (rows chosen by the last layer's gradient). Raises: as there, and from ``update`` without
    ``gradient_norms``.
    """
    edges = log_spaced_edges(num_bins, smallest_rate)
    keep = lambda count: decay**count  # noqa: E731
    bins = running_bins("ppots_slopes", edges, keep, floor, warmup_steps, target)

    def update(state: PpotsState, current: Draw, stats: LossStats) -> PpotsState:
        return bins.update(state, current, gradient_stats(stats, _norms_at_logits(stats)))

    return bins._replace(update=update)


def running_bins(
    name: str,
    edges: np.ndarray,
    keep: Callable[[Array], Array],
    floor: float,
    warmup_steps: int,
    target: Target,
) -> VarianceTransform:
    """Warp by running moments per bin: the common part of :func:`ppots` and its variants.
    ``keep`` maps draws per bin [J] to the share of the old moments kept; the rest as :func:`ppots`.
    """
    num_bins = len(edges) - 1
    target(LevelMoments(jnp.ones(num_bins), jnp.ones(num_bins)))  # raises if it needs more

    def init(_spec: DrawSpec) -> PpotsState:
        return PpotsState(*(jnp.zeros(num_bins, jnp.float32) for _ in range(3)), **counters())

    def density(state: PpotsState) -> PiecewiseDensity:
        share = jnp.where(state.steps < warmup_steps, 1.0, floor)
        return moment_density(edges, target(level_moments(state)), share)

    def learn(state: PpotsState, current: Draw, stats: LossStats) -> tuple[dict[str, Array], Array]:
        count, total, squares = _bin_sums(edges, current.u, integrand(current, stats))
        some, old = jnp.where(count > 0, count, 1.0), keep(count)
        changes = {
            "second": old * state.second + (1 - old) * squares / some,
            "mean": old * state.mean + (1 - old) * total / some,
            "weight": old * state.weight + (1 - old),
        }
        return changes, jnp.all(jnp.isfinite(total)) & jnp.all(jnp.isfinite(squares))

    return learned_warp(name, init, density, learn)


def level_moments(state: PpotsState) -> LevelMoments:
    """Debiased moments per bin; a bin never visited gets the mean over the visited ones."""
    total = jnp.sum(state.weight)

    def debiased(value: Array) -> Array:
        average = jnp.sum(value) / jnp.where(total > 0, total, 1.0)
        visited = state.weight > 0
        return jnp.where(visited, value / jnp.where(visited, state.weight, 1.0), average)

    return LevelMoments(debiased(state.second), debiased(state.mean))


@checked
def ppots_binned(
    edges: ArrayLike, second_moments: ArrayLike, floor: Floor = 0.1
) -> VarianceTransform:
    """P-POTS from measured moments: bin masses proportional to ``width_j sqrt(second_moments_j)``.

    Moments [J] of loss or gradient are non-negative, in any unit; ``edges`` [J + 1] run from 0 to
    1, highest masking rates first. Ten ``densities.log_spaced_edges`` bins are within 0.5% of the
    optimum.
    Keeps: E[weight f(u)] = int f. Couples: nothing. Costs: one view. Removes: the variance of
    sqrt(E f^2) over uniform levels. Bias: exact. Reference: arXiv 2511.18159, as a histogram.
    Raises: ValueError unless edges cover (0, 1), and moments fit, are finite and >= 0.
    """
    moments = np.asarray(second_moments, np.float64)
    if not (np.all(np.isfinite(moments)) and np.all(moments >= 0)):
        raise ValueError(f"ppots_binned: moments must be finite and not negative, got {moments}")
    return importance(moment_density(edges, moments, floor))._replace(name="ppots_binned")


_NUM_CELLS = 256
_NODES = 8


Curve = Annotated[
    EprParameters | Sequence[float],
    Real("[0, 1e6]", "", "scales, powers >= 1, growth, as mdm variance --fit prints", several=True),
]


@checked
def ppots_parametric(parameters: Curve = (), floor: Floor = 0.1) -> VarianceTransform:
    """P-POTS from its seven-parameter curve, fitted by :func:`fit_epr`.
    Integrated over 256 equal cells of m = 1 - u, with weights for the density that is sampled (not
    so in the published engine).
    Keeps: E[weight f(u)] = int f. Couples: nothing. Costs: one view. Removes: what the curve
    captures of the optimal density. Bias: exact. Reference: arXiv 2511.18159, "EPR" in its code.
    Raises: ValueError if the parameters' number or range is wrong, or ``floor`` is not in (0, 1].
    """
    return importance(epr_density(parameters, floor))._replace(name="ppots_parametric")


@checked
def ppots_unweighted(parameters: Curve = ()) -> VarianceTransform:
    """P-POTS as its code trains: levels from the fitted curve p, and no weight ``1 / p``.

    Keeps: ``int p(u) f(u) du``, a reweighting of the levels by p; the published text describes
    :func:`ppots_parametric`. ``objectives.clamped`` is the other half of that code. Couples:
    nothing. Costs: one view. Removes: nothing of the bound's variance. Bias: biased. Reference:
    arXiv 2511.18159, its code. Raises: ValueError if the parameters' number or range is wrong.
    """
    return unweighted(epr_density(parameters, 0.0))._replace(name="ppots_unweighted")


def epr_density(parameters: EprParameters | Sequence[float], floor: float) -> PiecewiseDensity:
    """The density of :func:`ppots_parametric`; arguments and errors as there."""
    parameters = tuple(parameters)
    if len(parameters) != len(EprParameters._fields):
        raise ValueError(
            f"the curve of P-POTS needs the numbers {', '.join(EprParameters._fields)}, got "
            f"{len(parameters)} of them; mdm variance --fit measures and prints them"
        )
    p = EprParameters(*map(float, parameters))
    if not (
        np.all(np.isfinite(p)) and min(p) >= 0 and min(p.high_power, p.low_power, p.mean_power) >= 1
    ):
        raise ValueError(f"P-POTS: scales and growth are positive, powers >= 1; got {p}")
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    edges = np.linspace(0.0, 1.0, _NUM_CELLS + 1)
    quantiles = edges[:-1, None] + (nodes + 1) / 2 / _NUM_CELLS
    return piecewise_density(edges, epr_curve(p, 1.0 - quantiles) @ weights, floor)


def _bin_sums(edges: np.ndarray, u: Array, losses: LevelLosses) -> tuple[Array, Array, Array]:
    """Per bin: number of estimates, sum of the integrand and of its square."""
    inside = bin_of(edges, u)[..., None] == jnp.arange(len(edges) - 1).reshape(1, 1, 1, -1)

    def gather(values: Array) -> Array:
        # Not a scatter, whose order of summation is left open on accelerators.
        return jnp.sum(jnp.where(inside, values[..., None], 0.0), axis=(0, 1, 2))

    value, count = losses
    return gather(count), gather(count * value), gather(count * jnp.square(value))


def _norms_at_logits(stats: LossStats) -> Array:
    """[V, B, S] gradient norm at the logits; NaN where the loss is not finite."""
    if stats.gradient_norms is None:
        raise ValueError(
            "ppots_slopes learns from LossStats.gradient_norms, which this objective does not fill "
            "in; use ppots, which learns from the loss, or an objective of masked tokens"
        )
    return jnp.where(
        jnp.isfinite(stats.raw), jnp.sqrt(stats.gradient_norms) * stats.weight, jnp.nan
    )
