"""The parametric family of P-POTS ("EPR") and its fit to measured moments."""

from typing import NamedTuple

import numpy as np

from mdm_jax.types import ArrayLike

_START = (-0.3, 0.4, -1.0, 0.3, 0.2, -0.2, 0.2)
_SPREAD = 0.6


class EprParameters(NamedTuple):
    """Parameters of the curve ``sqrt(g(m)^2 + v(m))`` over the masking rate m, with

        g(m) = mean_scale * exp(mean_growth * m ** mean_power)
        v(m) = high_scale * m ** high_power + low_scale * (1 - m) ** low_power

    a model of the mean and variance of the loss at rate m; published letters a, b, A, r, q, k, m.
    Scales and growth are positive, powers at least 1. A common factor (c on the mean's scale, c^2
    on the other two) leaves the density unchanged. v stays finite at m = 0, so the family cannot
    follow the 1/m growth of Bernoulli's weights.
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
    """Fits the family to measured moments by the KL divergence on the grid of rates.

    Minimises ``KL(w || p)`` by the trapezoid rule, w the normalised ``sqrt(mean^2 + variance)``,
    with L-BFGS-B from random starts. The pattern variance v alone is the published target; v + c,
    the variance over masks and rows, makes it the second moment.

    Args: ``rates``, [N >= 3] increasing masking rates in [0, 1]; ``mean`` and ``variance`` [N] of
    the integrand at each; number of random ``restarts``, and their ``seed``.
    Raises: ValueError if the arguments are out of range, nothing was measured (all zero), or no
    restart ends at a finite divergence.
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
        with np.errstate(over="ignore", invalid="ignore"):  # a start may lead astray
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
