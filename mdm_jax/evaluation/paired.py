"""Differences of two likelihoods that were measured on common noise.

Two networks that see the same masks make errors of the same sign on them, so the difference of two
bounds is far more certain than either. What is subtracted row by row can be two checkpoints on one
data set, or one network on two sets of rows that correspond: then the differences are estimates of
log-likelihood ratios.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mdm_jax.estimates import finite_or_none, standard_error_of_mean, standard_error_of_ratio
from mdm_jax.likelihood.result import Likelihood
from mdm_jax.meter.nested import Estimate
from mdm_jax.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class PairedDifference:
    """First minus second, nats: positive where the second is more likely.

    ``standard_error_*`` is the Monte Carlo error from the spread of the paired differences over
    replicates, ``data_standard_error_*`` their spread over rows. ``unpaired_*`` are what the errors
    would be if the two had been measured with independent noise, on different rows.

    Attributes:
        first: one likelihood.
        second: the other, of the same rows on the same noise.
    """

    first: Likelihood
    second: Likelihood

    @property
    def replicate_row_nats(self) -> np.ndarray:
        """[R, N] difference of each replicate and row."""
        return self.first.replicate_row_nats - self.second.replicate_row_nats

    @property
    def per_row_nats(self) -> np.ndarray:
        """[N] difference of each scored row.

        Of one network on corresponding rows x (first) and y (second) it estimates
        ``log p(y) - log p(x)``.
        """
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
        """Monte Carlo standard error of two independent measurements' difference."""
        return math.hypot(*(r.standard_error_nats_per_token for r in (self.first, self.second)))

    @property
    def unpaired_data_standard_error_nats_per_token(self) -> float:
        """Standard error over rows, if each had been measured on rows of its own."""
        both = (self.first, self.second)
        return math.hypot(*(r.data_standard_error_nats_per_token for r in both))

    @property
    def rows_won_by_second(self) -> Estimate:
        """Share of the rows on which the second is more likely, ties counted half."""
        won = 0.5 + 0.5 * np.sign(self.per_row_nats)
        return Estimate(float(won.mean()), standard_error_of_mean(won))

    def to_dict(self) -> dict:
        """Everything but the per-row arrays as JSON values; undefined numbers become None."""
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
    """First minus second, of two results made with *one key* by one estimator.

    A result whose replicates all agree has no noise to share: it (the exact likelihood of an
    autoregressive model, say) can be paired with that of another estimator. Otherwise what the
    results say about themselves is checked. That the key was the same cannot be, beyond the number
    of tokens each masked; :func:`compare_parameters` leaves no room for the mistake.

    Raises:
        ValueError: naming what differs: scored rows, tokens per row or replicates, and, if both
            have noise, passes or the masked tokens by level (which tell keys and designs apart).
    """
    same = [
        ("the scored rows", first.row_index, second.row_index),
        ("the eligible tokens of each row", first.row_tokens, second.row_tokens),
        ("the number of replicates", [first.replicates], [second.replicates]),
    ]
    if _has_noise(first) and _has_noise(second):
        same += [
            ("the number of passes", [first.passes], [second.passes]),
            ("the masked tokens by level", first.levels.targets, second.levels.targets),
        ]
    for what, mine, other in same:
        if not np.array_equal(mine, other):
            raise ValueError(
                f"the two results cannot be paired, {what} differ: {_short(mine)} and "
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
    """Two checkpoints on the same rows and masks.

    Args:
        evaluate: ``evaluate(params, key, batches, progress) -> Likelihood``, such as
            ``make_likelihood`` gives.
        first: parameters.
        second: parameters of the same network.
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
