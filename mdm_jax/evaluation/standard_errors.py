"""Standard errors of means and ratios, and numbers as JSON takes them."""

import math

import numpy as np


def standard_error_of_mean(values: np.ndarray) -> float:
    """Standard error of the mean of independent values [R]; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def standard_error_of_ratio(totals: np.ndarray, sizes: np.ndarray) -> float:
    """Standard error of ``sum(totals) / sum(sizes)`` with rows [N] as the sampling unit.

    To first order (linearised); NaN for fewer than two rows or without size.
    """
    rows, size = len(totals), sizes.sum()
    if rows < 2 or size <= 0:
        return math.nan
    residual = totals - totals.sum() / size * sizes
    return float(math.sqrt(rows / (rows - 1) * np.sum(residual**2)) / size)


def finite_or_none(value: float) -> float | None:
    """A number as JSON takes it: None for NaN and the infinities."""
    return float(value) if math.isfinite(value) else None
