"""A law from any masking rate m(t) that can be evaluated: tabulated once, exact thereafter."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.schedules.coordinates import level_from_masking_rate
from mdm_jax.schedules.piecewise import PiecewiseConstant
from mdm_jax.typing import ArrayLike

_RESOLUTION = 2.0**-24
_CELLS_PER_OCTAVE = 16
_TAIL_OCTAVES = range(24, 5, -1)
_FLAT = 2.0**-8
_ROUNDING = 1e-6


def tabulated(
    masking_rate: Callable[[np.ndarray], ArrayLike], num_cells: int = 1024
) -> PiecewiseConstant:
    """Law of the logSNR of an arbitrary schedule m(t), t ~ U(0, 1).

    m is evaluated once, in float64, on a table of t that is uniform in the middle and refined by
    octaves towards both ends, down to quantiles of 2**-24. Between the points the law is uniform in
    the logSNR. Its density and inverse are exact for the law it is, which follows m(t) to a few
    parts in ``num_cells``; where m reaches 0 or 1, the tail beyond the last quantile is drawn from
    one more octave of logSNR, so the support is finite.

    Args:
        masking_rate: rate in [0, 1] for an array of times in [0, 1], elementwise and
            non-decreasing, built from NumPy or JAX operations; t = 0 is the clean end.
        num_cells: cells of the middle part, at least 16.

    Raises:
        ValueError: if m has another shape than its argument, leaves [0, 1], falls, stands still for
            more than 2**-8 of the time (no density describes an atom), or varies too little.
    """
    if num_cells < 16:
        raise ValueError(f"tabulated needs num_cells >= 16, got {num_cells}")
    quantile = _quantile_table(num_cells)
    times = 1 - quantile[::-1]
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        rate = _check_rate(times, np.asarray(masking_rate(times)))
        logsnr = np.asarray(level_from_masking_rate(rate[::-1]).logsnr)
    quantile, logsnr = _merge(*_close_ends(quantile, logsnr))
    if len(quantile) < 16:
        raise ValueError(
            f"tabulated: m(t) varies too little, from {rate[0]} to {rate[-1]}, for float32"
        )
    return PiecewiseConstant(jnp.asarray(logsnr), jnp.asarray(quantile))


def _quantile_table(num_cells: int) -> np.ndarray:
    """Increasing quantiles from 0 to 1 on multiples of 2**-24, which float32 holds exactly."""
    steps = 1 + np.arange(_CELLS_PER_OCTAVE) / _CELLS_PER_OCTAVE
    tail = np.concatenate([2.0**-octave * steps for octave in _TAIL_OCTAVES])
    middle = np.linspace(tail[-1], 1 - tail[-1], num_cells + 1)
    table = np.concatenate([[0.0, 1.0], tail, 1 - tail, middle])
    return np.unique(np.round(table / _RESOLUTION) * _RESOLUTION)


def _check_rate(times: np.ndarray, rate: np.ndarray) -> np.ndarray:
    if rate.shape != times.shape:
        raise ValueError(
            f"tabulated: m(t) must work elementwise, got {rate.shape} from {times.shape}"
        )
    rate = rate.astype(np.float64)
    if not np.all((rate >= 0) & (rate <= 1)):
        at = int(np.argmin((rate >= 0) & (rate <= 1)))
        raise ValueError(f"tabulated: m(t) must stay in [0, 1], but m({times[at]}) = {rate[at]}")
    rising = np.maximum.accumulate(rate)
    if np.any(rising - rate > _ROUNDING):
        at = int(np.argmax(rising - rate > _ROUNDING))
        raise ValueError(
            f"tabulated: m(t) must not fall, but m({times[at - 1]}) = {rate[at - 1]} "
            f"and m({times[at]}) = {rate[at]}"
        )
    start = 0
    for stop in [*np.flatnonzero(np.diff(rising) > 0), len(rising) - 1]:
        if times[stop] - times[start] > _FLAT:
            raise ValueError(
                f"tabulated: m(t) = {rising[start]} all the way from t = {times[start]} to "
                f"{times[stop]}, which has no density; rescale t to leave this part out"
            )
        start = stop + 1
    return rising


def _close_ends(quantile: np.ndarray, logsnr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replaces infinite levels at the ends by one octave beyond the outermost finite one."""
    finite = np.flatnonzero(np.isfinite(logsnr))
    first, last = finite[0], finite[-1]
    inner, level = quantile[first : last + 1], logsnr[first : last + 1]
    if first > 0:
        octave = level[np.searchsorted(inner, 2 * inner[0])] - level[0]
        inner, level = np.append(0.0, inner), np.append(level[0] - octave, level)
    if last < len(logsnr) - 1:
        octave = level[-1] - level[np.searchsorted(inner, 1 - 2 * (1 - inner[-1]))]
        inner, level = np.append(inner, 1.0), np.append(level, level[-1] + octave)
    return inner, level


def _merge(quantile: np.ndarray, logsnr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drops edges that float32 could not tell apart: cells keep at least 64 units of rounding."""
    width = 64 * np.finfo(np.float32).eps * np.maximum(1, np.abs(logsnr))
    kept = [0]
    for index in range(1, len(logsnr)):
        if logsnr[index] - logsnr[kept[-1]] >= width[index]:
            kept.append(index)
    if len(kept) > 1:
        kept[-1] = len(logsnr) - 1
    return quantile[kept], logsnr[kept]
