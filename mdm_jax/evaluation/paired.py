"""Differences of two likelihoods on common noise.

Two networks with the same masks have correlated errors, so the difference of their bounds is far
more certain than either bound. Rows are subtracted one by one: two checkpoints on one data set, or
one network on two corresponding sets of rows (log-likelihood ratios).
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mdm_jax.estimates import (
    Estimate,
    finite_or_none,
    standard_error_of_mean,
    standard_error_of_ratio,
)
from mdm_jax.likelihood.result import Likelihood
from mdm_jax.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class PairedDifference:
    """First minus second, nats: positive where the second is more likely.

    ``standard_error_*`` is the Monte Carlo error of the paired differences (over replicates),
    ``data_standard_error_*`` their error over rows; ``unpaired_*`` are the errors that independent
    noise and different rows would have.

    Attributes:
        first, second: likelihoods of the same rows on the same noise.
    """

    first: Likelihood
    second: Likelihood

    @property
    def replicate_row_nats(self) -> np.ndarray:
        """[R, N] difference of each replicate and row."""
        return self.first.replicate_row_nats - self.second.replicate_row_nats

    @property
    def per_row_nats(self) -> np.ndarray:
        """[N] difference of each row; ``log p(second) - log p(first)`` for one network."""
        return self.replicate_row_nats.mean(0)

    @property
    def per_row_standard_error(self) -> np.ndarray:
        """[N] Monte Carlo standard error of ``per_row_nats``; NaN for one replicate."""
        differences = self.replicate_row_nats
        return np.array([standard_error_of_mean(row) for row in differences.T])

    @property
    def nats(self) -> float:
        """Difference of the totals."""
        return float(self.replicate_row_nats.sum(1).mean())

    @property
    def nats_per_token(self) -> float:
        """``nats`` over the number of tokens."""
        return self.nats / self.first.tokens

    @property
    def standard_error_nats(self) -> float:
        """Monte Carlo standard error of ``nats``."""
        return standard_error_of_mean(self.replicate_row_nats.sum(1))

    @property
    def standard_error_nats_per_token(self) -> float:
        """Monte Carlo standard error of ``nats_per_token``."""
        return self.standard_error_nats / self.first.tokens

    @property
    def data_standard_error_nats_per_token(self) -> float:
        """Standard error of ``nats_per_token`` from the spread over rows."""
        return standard_error_of_ratio(self.per_row_nats, self.first.row_tokens)

    @property
    def unpaired_standard_error_nats_per_token(self) -> float:
        """Monte Carlo standard error of the difference under independent noise."""
        return math.hypot(*(r.standard_error_nats_per_token for r in (self.first, self.second)))

    @property
    def unpaired_data_standard_error_nats_per_token(self) -> float:
        """Standard error of the difference under different rows."""
        both = (self.first, self.second)
        return math.hypot(*(r.data_standard_error_nats_per_token for r in both))

    @property
    def rows_won_by_second(self) -> Estimate:
        """Share of the rows on which the second is more likely; ties count half."""
        won = 0.5 + 0.5 * np.sign(self.per_row_nats)
        return Estimate(float(won.mean()), standard_error_of_mean(won))

    def to_dict(self) -> dict:
        """JSON values without the per-row arrays; undefined numbers are None."""
        names = ("nats", "nats_per_token", "standard_error_nats", "standard_error_nats_per_token")
        names += ("data_standard_error_nats_per_token", "unpaired_standard_error_nats_per_token")
        names += ("unpaired_data_standard_error_nats_per_token",)
        won, error = self.rows_won_by_second
        return {
            "rows": self.first.rows,
            "tokens": self.first.tokens,
            "passes": [self.first.passes, self.second.passes],
            "replicates": self.first.replicates,
            **{name: finite_or_none(getattr(self, name)) for name in names},
            "rows_won_by_second": won,
            "rows_won_by_second_standard_error": finite_or_none(error),
        }

    def summary(self) -> str:
        """A few lines for the terminal."""
        won, error = self.rows_won_by_second
        return "\n".join(
            [
                f"first minus second over {self.first.rows} rows, {self.first.tokens} tokens",
                f"  nats per token  {self.nats_per_token:+.5f}"
                f" ± {self.standard_error_nats_per_token:.5f}"
                f" (data ± {self.data_standard_error_nats_per_token:.5f})",
                f"  unpaired it would be ± {self.unpaired_standard_error_nats_per_token:.5f}"
                f" (data ± {self.unpaired_data_standard_error_nats_per_token:.5f})",
                f"  second more likely on {won:.1%} ± {error:.1%} of the rows",
            ]
        )


def paired_difference(first: Likelihood, second: Likelihood) -> PairedDifference:
    """First minus second, of two results of one estimator and *one key*.

    An exact result (all replicates agree) can be paired with that of another estimator. That the
    keys agree is checked only by the number of masked tokens; :func:`compare_parameters` is safe.

    Raises:
        ValueError: naming what differs: rows, tokens per row or replicates, and, if both have
            noise, passes or the masked tokens by level.
    """
    same = [
        ("the rows", first.row_index, second.row_index),
        ("the eligible tokens of each row", first.row_tokens, second.row_tokens),
        ("the number of replicates", [first.replicates], [second.replicates]),
    ]
    if _has_noise(first) and _has_noise(second):
        same += [
            ("the number of passes", [first.passes], [second.passes]),
            ("the masked tokens by level", first.levels.targets, second.levels.targets),
        ]
    for what, one, other in same:
        if not np.array_equal(one, other):
            raise ValueError(
                f"the two results cannot be paired, {what} differ: {_short(one)} and "
                f"{_short(other)}; evaluate both with one estimator, one key and the same rows"
            )
    return PairedDifference(first, second)


def compare_parameters(
    evaluate: Callable[..., Likelihood],
    first: PyTree,
    second: PyTree,
    key: Array,
    batches: Iterable[Batch],
    progress: Callable[[int], None] | None = None,
) -> PairedDifference:
    """Two checkpoints of one network on the same rows and masks.

    Args:
        evaluate: ``evaluate(params, key, batches, progress) -> Likelihood``.
        first, second: parameters.
        key: typed key.
        batches: read twice, so a sequence, not an iterator.
        progress: called as in ``evaluate``, for both.

    Raises:
        ValueError: if ``batches`` is an iterator, or as ``evaluate``.
    """
    if isinstance(batches, Iterator):
        raise ValueError("batches is read twice, but is an iterator; give a list of batches")
    results = [evaluate(params, key, batches, progress) for params in (first, second)]
    return paired_difference(*results)


def _has_noise(result: Likelihood) -> bool:
    return result.replicates < 2 or bool(np.ptp(result.replicate_row_nats, axis=0).any())


def _short(values: np.ndarray) -> str:
    return np.array2string(np.asarray(values), threshold=8, edgeitems=3)
