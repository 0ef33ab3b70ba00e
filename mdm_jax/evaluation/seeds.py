"""What a handful of seeds says about the difference of two methods.

Two runs with one seed share initial parameters and the order of the data, so what is compared is
the *difference* per seed, and seeds are what is drawn again. With N seeds there are only
``C(2 N - 1, N)`` different resamples (126 for five): they are enumerated, each with its multinomial
probability, and the interval is then exact, without a Monte Carlo error of its own.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mdm_jax.estimates import finite_or_none, standard_error_of_mean

MOST_ENUMERATED = 8
"""Up to so many values the resamples are enumerated (6,435 of them), above they are drawn."""


@dataclasses.dataclass(frozen=True)
class PairedSeeds:
    """Differences of two methods over seeds, first minus second.

    Attributes:
        differences: [N] one per seed, NaN-free.
        mean: of the differences.
        standard_error: of that mean, from their spread; NaN for one seed.
        bootstrap: interval of the mean, percentiles of the bootstrap.
        student: interval of the mean under normal differences; wider, since it knows that the
            spread is estimated too. NaN for one seed.
        sign_flips: share of the 2^N signs of the differences whose mean is at least as far from 0;
            no less than 2 / 2^N, so 0.0625 is the least that five seeds can say.
        student_p: two-sided p-value of Student's test of mean 0; NaN for one seed.
    """

    differences: np.ndarray
    mean: float
    standard_error: float
    bootstrap: tuple[float, float]
    student: tuple[float, float]
    sign_flips: float
    student_p: float

    @property
    def significant(self) -> bool:
        """Whether both intervals leave out 0; for one method at a time, not for the best of many.

        The percentiles alone are too narrow for few seeds: their spread is that of the mean times
        ``sqrt((N - 1) / N)``, and they do not know that it is estimated.
        """
        return all(low > 0 or high < 0 for low, high in (self.bootstrap, self.student))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what one seed cannot say is None."""
        return {
            "differences": self.differences.tolist(),
            "mean": self.mean,
            "standard_error": finite_or_none(self.standard_error),
            "bootstrap": [finite_or_none(end) for end in self.bootstrap],
            "student": [finite_or_none(end) for end in self.student],
            "sign_flips": self.sign_flips,
            "student_p": finite_or_none(self.student_p),
            "significant": self.significant,
        }


def paired_seeds(
    first: Sequence[float], second: Sequence[float], coverage: float = 0.95
) -> PairedSeeds:
    """Compares two methods run with the same seeds, in the same order.

    Args:
        first, second: [N] a score per seed.
        coverage: of the intervals, in (0, 1).

    Raises:
        ValueError: if the two cannot be paired, are empty or not finite, or coverage is out of
            range.
    """
    from scipy import special  # slow to import

    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"paired_seeds needs one score per seed of both, got shapes {first.shape} and "
            f"{second.shape}"
        )
    values = first - second
    mean, error = float(values.mean()), standard_error_of_mean(values)
    freedom = max(len(values) - 1, 1)
    reach = special.stdtrit(freedom, (1 + coverage) / 2) * error  # NaN for one seed
    return PairedSeeds(
        differences=values,
        mean=mean,
        standard_error=error,
        bootstrap=bootstrap_interval(values, coverage=coverage),
        student=(mean - reach, mean + reach),
        sign_flips=sign_flip_probability(values),
        student_p=_student_p(mean, error, freedom),
    )


def _student_p(mean: float, error: float, freedom: int) -> float:
    if error == 0:  # differences without any spread
        return 0.0 if mean else 1.0
    from scipy import special

    return float(2 * special.stdtr(freedom, -abs(mean) / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for that several comparisons are made (Holm 1979), in the same order.

    Those below 0.05 are false with a probability of at most 5 % *together*, however the
    comparisons depend on each other.

    Raises:
        ValueError: if a value is not in [0, 1].
    """
    values = np.asarray(p_values, np.float64)
    if values.ndim != 1 or not np.all((values >= 0) & (values <= 1)):
        raise ValueError(f"holm needs p-values [N] in [0, 1], got {p_values}")
    order = np.argsort(values, kind="stable")
    corrected = np.empty_like(values)
    steps = values[order] * np.arange(len(values), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    coverage: float = 0.95,
    resamples: int = 100_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a statistic under resampling with replacement.

    Exact by enumeration up to :data:`MOST_ENUMERATED` values; an end is the smallest value of the
    statistic that the stated probability does not exceed.

    Args:
        values: [N] finite numbers.
        statistic: ``statistic(samples [R, N]) -> [R]``, symmetric in the N; the mean if not given.
        coverage: in (0, 1).
        resamples: drawn where they are not enumerated.
        seed: of these.

    Raises:
        ValueError: if there are no values, one is not finite, or coverage is out of range.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.all(np.isfinite(values)):
        raise ValueError(f"a bootstrap needs finite values [N], got {values}")
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be in (0, 1), got {coverage}")
    if len(values) <= MOST_ENUMERATED:
        picks, probability = resampled(len(values))
    else:
        generator = np.random.default_rng(seed)
        picks = generator.integers(0, len(values), (resamples, len(values)))
        probability = np.full(resamples, 1 / resamples)
    samples = values[picks]
    found = samples.mean(1) if statistic is None else np.asarray(statistic(samples), np.float64)
    order = np.argsort(found, kind="stable")
    cumulated = np.cumsum(probability[order])
    tail = (1 - coverage) / 2
    # Sums of thousands of probabilities are off by rounding; an end must not jump for that.
    ends = np.searchsorted(cumulated, np.array([tail, 1 - tail]) - 1e-12)
    low, high = found[order][np.minimum(ends, len(found) - 1)]
    return float(low), float(high)


def resampled(count: int) -> tuple[np.ndarray, np.ndarray]:
    """All resamples of ``count`` values and their probabilities: indices [R, N], [R]."""
    picks = np.array(list(itertools.combinations_with_replacement(range(count), count)))
    times = (picks[:, :, None] == np.arange(count)).sum(1)
    factorials = np.array([math.factorial(k) for k in range(count + 1)], np.float64)
    return picks, factorials[count] / factorials[times].prod(1) / float(count) ** count


def sign_flip_probability(values: Sequence[float]) -> float:
    """Two-sided p-value of "the differences are symmetric about 0", over all signs or 2^16 of them.

    Exact up to 16 values.
    """
    values = np.asarray(values, np.float64)
    if len(values) <= 16:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), (2**16, len(values)))
        signs[0] = 1.0  # what was found is one of the possibilities
    flipped = np.abs(signs @ values)
    slack = 1e-12 * np.abs(values).sum()
    return float(np.mean(flipped >= abs(values.sum()) - slack))
