"""Spacings of Gaussian sampling grids: how n steps are spread over the noise levels.

Grids as in :mod:`~mdm_jax.schedules.grids`. Where a spacing ends at sigma = 0 the last level is
+inf: the last step goes to the denoiser's estimate. For learned laws use ``grids.from_law``.
"""

import operator
from collections.abc import Callable

import jax
import numpy as np

from mdm_jax.checks import unknown_name
from mdm_jax.gaussian.schedules.tables import check_table
from mdm_jax.schedules.grids import check_grid, from_law
from mdm_jax.schedules.laws import TwoSidedLaw, piecewise
from mdm_jax.schedules.times import logsnr_at
from mdm_jax.types import Array, ArrayLike

QUANTITIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "logsnr": lambda logsnr: logsnr,
    "ou_time": lambda logsnr: 0.5 * np.logaddexp(0, -logsnr),
    "variance": lambda logsnr: np.exp(-np.logaddexp(0, logsnr)),
    "correlation": lambda logsnr: np.exp(-0.5 * np.logaddexp(0, -logsnr)),
    "fisher": lambda logsnr: np.arctan(np.exp(-0.5 * logsnr)),
    "sigma": lambda logsnr: np.exp(-0.5 * logsnr),
}
"""Monotone functions of the logSNR to be uniform in: Ornstein-Uhlenbeck time, sigma^2 and alpha of
the variance-preserving path, Fisher arc length arccos(alpha), and sigma / alpha."""


TABLE_SPACINGS = ("leading", "linspace", "trailing")


def uniform_time(law: TwoSidedLaw, n: int, clean: float = 0.0, noisy: float = 0.0) -> Array:
    """[n + 1] levels of a schedule at times falling in equal steps from 1 - noisy to clean.

    TypeError for a traced law. ValueError unless n >= 1, clean, noisy >= 0 and clean + noisy < 1.
    """
    done = _fractions(n)
    if not (clean >= 0 and noisy >= 0 and clean + noisy < 1):
        raise ValueError(
            f"uniform_time needs offsets >= 0 that leave time between them, got clean={clean}, "
            f"noisy={noisy}"
        )
    if clean == noisy == 0:
        return from_law(law, n)
    time = clean * done + (1 - noisy) * (1 - done)
    rest = (1 - clean) * done + noisy * (1 - done)
    with jax.ensure_compile_time_eval():  # a grid of known numbers may be built while tracing
        return check_grid(logsnr_at(law, time, rest))


def uniform_logsnr(n: int, low: float, high: float) -> Array:
    """[n + 1] levels in equal steps from ``low`` to ``high``; see :func:`uniform_in`."""
    return uniform_in("logsnr", n, low, high)


def uniform_in(
    quantity: str | Callable[[np.ndarray], ArrayLike], n: int, low: float, high: float
) -> Array:
    """[n + 1] levels from ``low`` to ``high``, in equal steps of a quantity.

    ``quantity`` is a name in :data:`QUANTITIES` (Santos & Lin 2023), or an elementwise function of
    float64 levels, monotone on [low, high]. ValueError if not, for unknown names, or bad ends.
    """
    if isinstance(quantity, str):
        if quantity not in QUANTITIES:
            raise unknown_name(quantity, QUANTITIES, "quantity")
        quantity = QUANTITIES[quantity]
    done = _fractions(n)
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"uniform_in needs finite low < high, got {low}, {high}")

    def measure(logsnr: np.ndarray) -> np.ndarray:
        return np.asarray(quantity(logsnr), np.float64)

    table = measure(np.linspace(low, high, 257))
    sign = np.sign(table[-1] - table[0])
    if not (np.all(np.isfinite(table)) and sign != 0 and np.all(sign * np.diff(table) >= 0)):
        raise ValueError(
            f"uniform_in: the quantity must rise or fall throughout [{low}, {high}], "
            f"but goes from {table[0]} to {table[-1]} otherwise"
        )
    target = sign * (table[0] + (table[-1] - table[0]) * done)
    left, right = np.full(n + 1, float(low)), np.full(n + 1, float(high))
    for _ in range(60):
        middle = 0.5 * (left + right)
        short = sign * measure(middle) < target
        left, right = np.where(short, middle, left), np.where(short, right, middle)
    levels = 0.5 * (left + right)
    levels[0], levels[-1] = low, high
    return check_grid(levels)


def edm(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Array:
    """[n + 1] levels of EDM: n values of sigma, uniform in sigma^(1 / rho), then sigma = 0 (+inf).

    Karras et al. (2022), eq. 5. ValueError unless n >= 2, 0 < sigma_min < sigma_max and rho > 0.
    """
    if operator.index(n) < 2:
        raise ValueError(f"edm needs n >= 2 steps, from sigma_max over sigma_min to 0, got {n}")
    if not (0 < sigma_min < sigma_max < np.inf and rho > 0):
        raise ValueError(
            f"edm needs 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max}, {rho}"
        )
    done = _fractions(n - 1)
    root = sigma_max ** (1 / rho) * (1 - done) + sigma_min ** (1 / rho) * done
    return check_grid(np.append(-2 * rho * np.log(root), np.inf))


def uniform_information(loss: ArrayLike, edges: ArrayLike, n: int) -> Array:
    """[n + 1] levels in equal steps of the information I(data; noisy).

    It grows by half the noise-prediction error per unit of logSNR (I-MMSE): ``loss`` [K], a tracked
    mean square between ``edges`` [K + 1] logSNR (or two outer ends). ValueError if shapes do not
    fit, or errors are negative, not finite or all zero.
    """
    loss, edges = np.asarray(loss, np.float64), np.asarray(edges, np.float64)
    if loss.ndim == 1 and edges.shape == (2,):
        edges = np.linspace(*edges, loss.size + 1)
    if loss.ndim != 1 or edges.shape != (loss.size + 1,):
        raise ValueError(
            f"uniform_information needs loss [K] and edges [K + 1] or 2, got {loss.shape} and "
            f"{edges.shape}"
        )
    return from_law(piecewise(loss * np.diff(edges), edges), n)


def uniform_mmse(mmse: ArrayLike, logsnr: ArrayLike, n: int) -> Array:
    """[n + 1] levels in equal steps of the error of the predicted data, from first to last level.

    ``mmse`` [K] is the tracked mean squared error at increasing ``logsnr`` [K], made to fall by its
    running minimum. ValueError if shapes do not fit, it is not finite, or never falls.
    """
    mmse, logsnr = np.asarray(mmse, np.float64), np.asarray(logsnr, np.float64)
    if mmse.ndim != 1 or mmse.shape != logsnr.shape or mmse.size < 2:
        raise ValueError(
            f"uniform_mmse needs mmse [K] and logsnr [K], K >= 2, got {mmse.shape} and "
            f"{logsnr.shape}"
        )
    return from_law(piecewise(-np.diff(np.minimum.accumulate(mmse)), logsnr), n)


def table_indices(num_table: int, n: int, spacing: str) -> np.ndarray:
    """[n] rising indices of the levels of a table, 0 the cleanest, at which the network is called.

    "leading" takes every (num_table // n)-th from 0, "linspace" includes both ends, "trailing"
    counts back from the last by num_table / n. ValueError for others, or n outside [1, num_table].
    """
    if not 1 <= operator.index(n) <= num_table:
        raise ValueError(f"table_indices needs 1 <= n <= {num_table} steps, got {n}")
    if spacing == "leading":
        return np.arange(n) * (num_table // n)
    if spacing == "linspace":
        return np.round(np.linspace(0, num_table - 1, n)).astype(int)
    if spacing == "trailing":
        return np.round(np.arange(1, n + 1) * (num_table / n)).astype(int) - 1
    raise unknown_name(spacing, TABLE_SPACINGS, "spacing")


def from_table(table: ArrayLike, n: int, spacing: str) -> Array:
    """[n + 1] levels of a noise table at :func:`table_indices`, then +inf, clean data.

    ``table`` is falling logSNR; the last may be -inf, where "leading" spacing never starts.
    """
    table = np.asarray(table, np.float64)
    check_table(table[:-1] if table.size and table[-1] == -np.inf else table)
    levels = table[table_indices(table.size, n, spacing)]
    return check_grid(np.append(levels[::-1], np.inf))


def _fractions(n: int) -> np.ndarray:
    if operator.index(n) < 1:
        raise ValueError(f"a grid needs n >= 1 steps, got {n}")
    return np.arange(n + 1, dtype=np.float64) / n
