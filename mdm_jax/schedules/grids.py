"""Sampling grids: the noise levels a sampler steps through, noisy to clean.

A grid of n steps is a float32 array of n + 1 strictly increasing logSNR. It may begin with -inf
(every token masked) and end with +inf (none). Grids are built outside jit, from known numbers:
traced sources raise a TypeError, n < 1 or levels that round to the same float32 a ValueError.
"""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import is_concrete
from mdm_jax.schedules.laws import Law, logistic
from mdm_jax.schedules.schedule import MaskedSchedule
from mdm_jax.types import Array, ArrayLike


def uniform_masking_rate(n: int) -> Array:
    """[n + 1] levels whose masking rates fall in equal steps from 1 to 0."""
    done, left = _steps(n)
    with np.errstate(divide="ignore"):
        return check_grid(np.log(done) - np.log(left))


def from_schedule(schedule: MaskedSchedule, n: int) -> Array:
    """[n + 1] levels of a schedule at equally spaced times from 1 to 0; see :func:`open_ends`."""
    done, left = _steps(n)
    return _evaluate(schedule, lambda: schedule.logsnr(left / n, done / n))


def cosine(schedule: MaskedSchedule, n: int) -> Array:
    """MD4's cosine grid (Shi et al. 2024): times ``cos(pi/2 (1 - t))``, t falling from 1 to 0."""
    done, left = _steps(n)
    time = np.sin(np.pi / 2 * left / n)
    rest = 2 * np.square(np.sin(np.pi / 4 * done / n))
    return _evaluate(schedule, lambda: schedule.logsnr(time, rest))


def from_law(law: Law, n: int) -> Array:
    """[n + 1] levels at equally spaced quantiles of a law, ends of its support included."""
    return _evaluate(law, lambda: _levels(law, _steps(n)[0] / n))


def from_log_density(
    log_density: Callable[[np.ndarray], ArrayLike], n: int, law: Law | None = None
) -> Array:
    """[n + 1] levels that cut a density over the quantile of a law into n parts of equal mass.

    For densities learned in training. The distribution function is summed over some 8000 cells and
    inverted; the grid ends where the density's support does, to within a cell. ValueError also if
    the density is nowhere positive, infinite or NaN.

    Args:
        log_density: elementwise, of the quantile u in (0, 1), near 1 = clean, up to a constant; may
            be -inf. Of a variance transform ``lambda u: transform.profile(state, u).log_density``.
        law: of the quantiles; default uniform masking rates (``logistic()``).
    """
    law = logistic() if law is None else law
    shares = _steps(n)[0] / n
    return _evaluate(law, lambda: _levels(law, _density_quantiles(log_density, shares)))


def explicit(values: ArrayLike) -> Array:
    """The given levels as a grid; see :func:`check_grid`."""
    return check_grid(values)


def open_ends(grid: ArrayLike) -> Array:
    """The grid from rate 1 to rate 0: first level replaced by -inf, last by +inf."""
    return check_grid(grid).at[0].set(-jnp.inf).at[-1].set(jnp.inf)


def check_grid(grid: ArrayLike) -> Array:
    """Validate a grid and return it as float32 [n + 1].

    TypeError for a traced grid. ValueError unless it has one axis and at least two levels, strictly
    increasing as float32; -inf may only be first and +inf last.
    """
    if not is_concrete(grid):
        raise TypeError("a grid is built and checked outside of jit; pass it in as an argument")
    known = np.asarray(grid, np.float32)
    if known.ndim != 1 or known.size < 2:
        raise ValueError(f"a grid is [n + 1] levels with n >= 1, got shape {known.shape}")
    if np.any(np.isnan(known)):
        raise ValueError(f"a grid holds no NaN, but level {int(np.argmax(np.isnan(known)))} is")
    rising = known[1:] > known[:-1]
    if not np.all(rising):
        at = int(np.argmin(rising))
        raise ValueError(
            f"a grid increases strictly in logSNR (noisy to clean) as float32, but levels {at} and "
            f"{at + 1} are {known[at]} and {known[at + 1]}; reverse it, or use fewer steps"
        )
    return jnp.asarray(known)


def _evaluate(source: Law | MaskedSchedule, levels: Callable[[], ArrayLike]) -> Array:
    if not is_concrete(*jax.tree.leaves(source)):
        raise TypeError(
            "the parameters of a grid's law or schedule are traced; build it outside jit"
        )
    with jax.ensure_compile_time_eval():  # a grid of known numbers may be built while tracing
        return check_grid(levels())


def _levels(law: Law, u: np.ndarray) -> np.ndarray:
    low, high = (float(end) for end in law.support)
    inner = np.asarray(np.clip(u, 2.0**-24, 1 - 2.0**-24), jnp.result_type(float))
    levels = np.asarray(law.icdf(inner), np.float64)
    return np.where(u == 0, low, np.where(u == 1, high, levels))


def _density_quantiles(
    log_density: Callable[[np.ndarray], ArrayLike], shares: np.ndarray
) -> np.ndarray:
    """Quantiles below which the density has the given shares of its mass, rising from 0 to 1."""
    half = 1 / (1 + np.exp(np.linspace(16.0, 0.0, 2049)))  # down to 1e-7, where float32 ends at 1
    edges = np.unique([0, *half, *(1 - half[-2::-1]), *np.linspace(0, 1, 4097)])
    middle = (edges[1:] + edges[:-1]) / 2
    value = log_density(np.asarray(middle, jnp.result_type(float)))
    if not is_concrete(value):
        raise TypeError("the density of a grid is traced; build the grid outside jit")
    value = np.asarray(value, np.float64)
    if value.shape != middle.shape or np.any(np.isnan(value)) or not np.isfinite(value.max()):
        raise ValueError(
            "from_log_density needs an elementwise log density that is finite, or -inf, on (0, 1) "
            f"and finite somewhere; got shape {value.shape}, largest value {value.max()}"
        )
    mass = np.diff(edges) * np.exp(value - value.max())
    below = np.concatenate([[0.0], np.cumsum(mass)])
    quantiles = np.interp(shares * below[-1], below, edges)
    some = np.flatnonzero(mass)
    quantiles[0], quantiles[-1] = edges[some[0]], edges[some[-1] + 1]
    return quantiles


def _steps(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps done and steps left, 0..n and n..0, float64 [n + 1]."""
    if operator.index(n) < 1:
        raise ValueError(f"a grid needs n >= 1 steps, got {n}")
    done = np.arange(n + 1, dtype=np.float64)
    return done, n - done
