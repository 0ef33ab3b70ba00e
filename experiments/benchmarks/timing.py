"""Times of calls that take turns, and what may be said of them."""

import time
from collections.abc import Callable, Mapping

import numpy as np


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of each call in rounds A B C, A B C, ...

    Whatever slows the machine down for a while then slows all of them down. Calls must block until
    their result is there, and be compiled already.

    Args:
        calls: by name, in the order of a round.
        rounds: fewest rounds.
        seconds: rounds go on until this time is spent.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, done = time.perf_counter(), 0
    while done < rounds or (calls and time.perf_counter() - begin < seconds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
        done += 1
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles, least and number of some measurements."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return {
        "median": float(median),
        "lower_quartile": float(low),
        "upper_quartile": float(high),
        "least": float(np.min(values)),
        "count": len(values),
    }


def ratios(reference: list[float], values: list[float]) -> dict[str, float]:
    """Summary of ``reference / values`` round by round: how much faster than the reference."""
    return summary([r / v for r, v in zip(reference, values, strict=True)])
