"""Sampling grids: the noise levels a sampler steps through, noisy to clean.

A grid of n steps is a float32 array of n + 1 strictly increasing logSNR. It may begin with -inf,
where every token is masked, and end with +inf, where none is. Grids are built outside of jit, from
known numbers; inside, they are arrays like any other.
"""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.schedules.laws import Law
from mdm_jax.schedules.masked_schedule import MaskedSchedule
from mdm_jax.schedules.parameters import is_concrete
from mdm_jax.typing import Array, ArrayLike


def uniform_masking_rate(n: int) -> Array:
    """[n + 1] levels whose masking rates fall in equal steps from 1 to 0.

    Raises:
        ValueError: unless n >= 1.
    """
    done, left = _steps(n)
    with np.errstate(divide="ignore"):
        return check_grid(np.log(done) - np.log(left))


def from_schedule(schedule: MaskedSchedule, n: int) -> Array:
    """[n + 1] levels of a schedule at times falling in equal steps from 1 to 0.

    The ends are those of the schedule; where it stops short of rates 1 and 0, a sampler that starts
    from masks only and must leave none wants :func:`open_ends` of it.

    Raises:
        ValueError: unless n >= 1, or if n is so large that neighbours round to the same float32.
    """
    done, left = _steps(n)
    return _evaluate(schedule, lambda: schedule.logsnr(left / n, done / n))


def cosine(schedule: MaskedSchedule, n: int) -> Array:
    """[n + 1] levels of a schedule at the times ``cos(pi/2 (1 - t))``, t falling from 1 to 0.

    Steps in time become small at the noisy end, where a revealed token matters most. The cosine
    grid of MD4 (Shi et al. 2024).

    Raises:
        ValueError: unless n >= 1, or if n is so large that neighbours round to the same float32.
    """
    done, left = _steps(n)
    time = np.sin(np.pi / 2 * left / n)
    rest = 2 * np.square(np.sin(np.pi / 4 * done / n))
    return _evaluate(schedule, lambda: schedule.logsnr(time, rest))


def from_law(law: Law, n: int) -> Array:
    """[n + 1] levels at equally spaced quantiles of a law, the ends of its support included.

    Raises:
        ValueError: unless n >= 1, or if n is so large that neighbours round to the same float32.
    """
    done, _ = _steps(n)

    def levels() -> np.ndarray:
        low, high = law.support
        inner = law.icdf(np.asarray(done[1:-1] / n, jnp.result_type(float)))
        return np.concatenate([[float(low)], np.asarray(inner), [float(high)]])

    return _evaluate(law, levels)


def explicit(values: ArrayLike) -> Array:
    """The given levels as a grid; see :func:`check_grid`."""
    return check_grid(values)


def open_ends(grid: ArrayLike) -> Array:
    """The grid with its first level moved to -inf (rate 1) and its last to +inf (rate 0)."""
    grid = check_grid(grid)
    return grid.at[0].set(-jnp.inf).at[-1].set(jnp.inf)


def check_grid(grid: ArrayLike) -> Array:
    """Returns the grid as float32 [n + 1].

    Raises:
        TypeError: for a traced grid, whose values cannot be checked.
        ValueError: unless it has one axis, at least two levels, and they increase strictly as
            float32; -inf may only be first and +inf last.
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


def _steps(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Steps done and steps left, 0..n and n..0, float64 [n + 1]."""
    if operator.index(n) < 1:
        raise ValueError(f"a grid needs n >= 1 steps, got {n}")
    done = np.arange(n + 1, dtype=np.float64)
    return done, n - done
