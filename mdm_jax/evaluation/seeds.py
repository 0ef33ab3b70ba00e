"""Paired comparison of two methods over a few seeds, by scipy's resampling tests.

Two runs with one seed share initial parameters and the order of the data, so the *difference* per
seed is what is compared, and what is resampled.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mdm_jax.estimates import finite_or_none, standard_error_of_mean

RESAMPLES = 100_000


@dataclasses.dataclass(frozen=True)
class PairedSeeds:
    """Differences of two methods over seeds, first minus second.

    Attributes:
        differences: [N] one per seed.
        mean: of the differences.
        standard_error: of that mean, from their spread; NaN for one seed.
        bootstrap: percentile bootstrap interval of the mean.
        student: interval of the mean for normal differences; NaN for one seed.
        sign_flips: share of the 2^N signs of the differences whose mean is at least as far from 0;
            at least 2 / 2^N, which is 0.0625 for five seeds.
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
        """Whether both intervals exclude 0; for one comparison, not for the best of many.

        The bootstrap alone is too narrow for few seeds, by ``sqrt((N - 1) / N)`` and because the
        spread is estimated too.
        """
        return all(low > 0 or high < 0 for low, high in (self.bootstrap, self.student))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; None where one seed is too few."""
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
        first, second: [N] a finite score per seed.
        coverage: of the intervals, in (0, 1).

    Raises:
        ValueError: if the two cannot be paired, are empty or not finite, or coverage is out of
            range.
    """
    from scipy import special, stats  # slow to import

    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"paired_seeds needs one score per seed of both, got shapes {first.shape} and "
            f"{second.shape}"
        )
    values = first - second
    if not np.all(np.isfinite(values)):
        raise ValueError(f"paired_seeds needs finite scores, got differences {values}")
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be in (0, 1), got {coverage}")
    mean, error = float(values.mean()), standard_error_of_mean(values)
    freedom = max(len(values) - 1, 1)
    reach = special.stdtrit(freedom, (1 + coverage) / 2) * error  # NaN for one seed
    if error == 0:  # differences without any spread
        student_p = 0.0 if mean else 1.0
    else:
        student_p = float(2 * special.stdtr(freedom, -abs(mean) / error))
    interval, flips = (mean, mean), 1.0
    if len(values) > 1:
        bootstrap = stats.bootstrap(
            (values,),
            np.mean,
            confidence_level=coverage,
            method="percentile",
            n_resamples=RESAMPLES,
            rng=0,
        )
        interval = tuple(map(float, bootstrap.confidence_interval))
        # All signs are enumerated up to 16 seeds, and drawn beyond.
        signs = stats.permutation_test(
            (values,), np.mean, permutation_type="samples", n_resamples=2**16, rng=0
        )
        flips = float(min(signs.pvalue, 1.0))
    return PairedSeeds(
        differences=values,
        mean=mean,
        standard_error=error,
        bootstrap=interval,
        student=(mean - reach, mean + reach),
        sign_flips=flips,
        student_p=student_p,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for several comparisons (Holm 1979), in the same order.

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
