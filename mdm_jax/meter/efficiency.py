"""Variance of the batch gradient from redrawn batches, the figure to compare methods by.
Per-example variances are wrong for coupled rows, and losses for gradients. So whole batches are
redrawn through the chain at fixed state; trace of the gradient's covariance times forward passes
per row compares methods at equal compute. Heavy tails (Bernoulli masks) may leave it unsettled.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.distributed import spread_rows
from mdm_jax.draws import GRID_BITS, Draw, DrawSpec
from mdm_jax.estimates import Estimate, finite_or_none, mean_estimate
from mdm_jax.meter.nested import eligible_rows
from mdm_jax.meter.subject import Progress, Subject, gradient_deviations
from mdm_jax.objectives.objective import Objective
from mdm_jax.rng import stream
from mdm_jax.schedules import Law
from mdm_jax.types import Array, Batch, PyTree
from mdm_jax.variance.transform import VarianceTransform, draw_batch

MAX_RELATIVE_ERROR = 0.2
"""Largest relative standard error across groups of a settled estimate."""

MAX_TOP_SHARE = 0.2
"""Largest share of the sum of squares in the largest 1% of the redraws, if settled."""

MIN_TAIL_INDEX = 1.3
"""Smallest tail index of the squared deviations; their mean is infinite at 1 and below.
On the toy (3 parameters, batches of 16) the three rules refuse Bernoulli masks of infinite variance
in 86% of runs of 256 redraws and all of 1024, fixed counts in none.
"""

MIN_REDRAWS = 40
"""Fewest squared deviations (redraws less one per group) for an estimate."""


class Comparison(NamedTuple):
    """Difference, ratio, and difference in standard errors (inf if exact) of variance x passes."""

    difference: Estimate
    ratio: float
    standard_errors: float


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Variance of the batch gradient, nats per eligible token, under one method.

    Attributes:
        group_variances: [groups] trace of the covariance, each from its own redraws.
        group_signals: [groups] squared norm of the mean gradient, unbiased, from each group.
        signal: their mean.
        passes, redraws: forward passes per row; batches per group.
        top_share: share of the sum of squared deviations in the largest 1% of the redraws.
        tail_index: Hill's estimate from the largest tenth of the squared deviations.
        unsettled: why there is no number, or an empty string.
    """

    group_variances: np.ndarray
    signal: float
    passes: int
    redraws: int
    top_share: float
    tail_index: float
    unsettled: str
    group_signals: np.ndarray | None = None

    @property
    def settled(self) -> bool:
        return not self.unsettled

    @property
    def variance(self) -> Estimate:
        """Trace of the covariance; ValueError, with the reason, if unsettled."""
        if self.unsettled:
            raise ValueError(self.unsettled)
        return mean_estimate(self.group_variances)

    @property
    def variance_times_passes(self) -> Estimate:
        """The equal-compute figure; errors as :attr:`variance`."""
        value, error = self.variance
        return Estimate(value * self.passes, error * self.passes)

    @property
    def noise_to_signal(self) -> float:
        """Variance over signal, NaN where no signal is left; errors as :attr:`variance`."""
        return self.variance.value / self.signal if self.signal > 0 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the figures of an unsettled estimate are None."""
        record = dataclasses.asdict(self)
        record["group_variances"] = self.group_variances.tolist()
        del record["group_signals"]
        for name in ("top_share", "tail_index"):
            record[name] = finite_or_none(record[name])
        for name in ("variance", "variance_times_passes"):
            value, error = getattr(self, name) if self.settled else (None, math.nan)
            record |= {name: value, f"{name}_standard_error": finite_or_none(error)}
        ratio = finite_or_none(self.noise_to_signal) if self.settled else None
        return record | {"noise_to_signal": ratio}


def efficiency(
    subject: Subject,
    batches: Sequence[Batch],
    key: Array,
    *,
    groups: int = 16,
    redraws: int = 16,
    num_microbatches: int = 1,
    progress: Progress | None = None,
) -> Efficiency:
    """Noise of the batch gradient with fixed data: levels and masks are redrawn.

    Group g uses batch g modulo their number; ``groups`` is a multiple of it, and the standard
    error, from the spread of groups, covers the choice of batches only if the two are equal. With
    one key, methods get the same base draws, for :func:`compare`. ``num_microbatches`` bounds the
    memory, which also holds three gradients. Raises: ValueError if a batch has not
    ``spec.batch_size`` rows, ``groups`` or ``redraws`` (per group) is below 2, settings do not fit,
    or gradients are not finite.
    """
    if not batches or groups % len(batches):
        raise ValueError(f"groups must be a multiple of the {len(batches)} batches, got {groups}")
    for batch in batches:
        if batch.tokens.shape[0] != subject.spec.batch_size:
            raise ValueError(
                f"each batch must have the spec's {subject.spec.batch_size} rows, got "
                f"{batch.tokens.shape[0]}"
            )
        eligible_rows(batch)  # raises if nothing is eligible
    placed = [jax.tree.map(jnp.asarray, batch) for batch in batches]

    def batch_of(group: int, _key: Array) -> Batch:
        return placed[group % len(placed)]

    return _measure(subject, batch_of, key, groups, redraws, num_microbatches, progress)


def efficiency_with_data(
    subject: Subject,
    rows: Batch,
    key: Array,
    *,
    groups: int = 16,
    redraws: int = 16,
    num_microbatches: int = 1,
    progress: Progress | None = None,
) -> Efficiency:
    """:func:`efficiency` of batches redrawn from ``rows`` [N, L] too, with replacement.
    The rows of a batch are spread over the devices of sharded parameters.
    """
    eligible_rows(rows)  # raises if nothing is eligible
    size, count = subject.spec.batch_size, rows.tokens.shape[0]
    pool = jax.tree.map(jnp.asarray, rows)

    @jax.jit
    def pick(key: Array, pool: Batch) -> Batch:
        index = jax.random.randint(stream(key, "data"), (size,), 0, count)
        return jax.tree.map(lambda field: field[index], pool)

    def batch_of(_group: int, key: Array) -> Batch:
        return spread_rows(pick(key, pool), subject.params)

    return _measure(subject, batch_of, key, groups, redraws, num_microbatches, progress)


def compare(first: Efficiency, second: Efficiency) -> Comparison:
    """Difference and ratio of two methods' gradient variance per compute, paired by group.
    Needs the same key, batches and groups. ValueError if groups differ or one is unsettled.
    """
    if first.group_variances.shape != second.group_variances.shape:
        raise ValueError(
            "only measurements with the same groups can be compared, got "
            f"{len(first.group_variances)} and {len(second.group_variances)}"
        )
    value, other = first.variance_times_passes.value, second.variance_times_passes.value
    difference = mean_estimate(
        first.group_variances * first.passes - second.group_variances * second.passes
    )
    if difference.standard_error > 0:
        errors = difference.value / difference.standard_error
    else:
        errors = math.copysign(math.inf, difference.value) if difference.value else 0.0
    return Comparison(difference, value / other if other else math.nan, errors)


def _measure(
    subject: Subject,
    batch_of: Callable[[int, Array], Batch],
    key: Array,
    groups: int,
    redraws: int,
    num_microbatches: int,
    progress: Progress | None,
) -> Efficiency:
    if groups < 2 or redraws < 2:
        raise ValueError(f"at least 2 groups of 2 redraws are needed, got {groups} of {redraws}")
    if num_microbatches < 1 or subject.spec.batch_size % num_microbatches:
        raise ValueError(
            f"num_microbatches must be a divisor of the batch size {subject.spec.batch_size}, "
            f"got {num_microbatches}"
        )

    @jax.jit
    def draw(state: PyTree, key: Array) -> Draw:
        return draw_batch(stream(key, "draw"), subject.transform, state, subject.spec)

    def redrawn(group: int) -> Iterator[tuple[Batch, Draw]]:
        group_key = jax.random.fold_in(key, group)
        for index in range(redraws):
            one = jax.random.fold_in(group_key, index)
            yield batch_of(group, one), draw(subject.state, one)

    terms, squares = [], []
    for group in range(groups):
        deviations, square = gradient_deviations(
            subject.estimator, subject.params, redrawn(group), num_microbatches
        )
        terms.append(deviations)
        squares.append(square)
        if progress is not None:
            progress(redraws)
    terms = np.asarray(terms)
    if not np.all(np.isfinite(terms)):
        raise ValueError("a gradient is not finite; nothing can be estimated")
    variances = terms.mean(1)
    top_share, tail_index = tail_of(terms.ravel())
    signals = squares - variances / redraws
    return Efficiency(
        group_variances=variances,
        group_signals=signals,
        signal=float(np.mean(signals)),
        passes=subject.transform.views,
        redraws=redraws,
        top_share=top_share,
        tail_index=tail_index,
        unsettled=why_unsettled(terms, top_share, tail_index),
    )


def tail_of(terms: np.ndarray) -> tuple[float, float]:
    """Share of the largest 1% in the sum, and Hill's tail index from the largest tenth."""
    ordered = np.sort(terms)[::-1]
    if not ordered[0] > 0:
        return 0.0, math.inf
    top = max(1, len(ordered) // 100)
    size = min(max(10, len(ordered) // 10), len(ordered) - 1)
    excess = np.log(ordered[:size] / max(ordered[size], np.finfo(np.float64).tiny))
    index = 1 / excess.mean() if excess.mean() > 0 else math.inf
    return float(ordered[:top].sum() / ordered.sum()), float(index)


def why_unsettled(terms: np.ndarray, top_share: float, tail_index: float) -> str:
    """Why squared deviations [groups, redraws] do not make an estimate; empty if they do."""
    reasons = []
    value, error = mean_estimate(terms.mean(1))
    if terms.size < MIN_REDRAWS:
        reasons.append(f"{terms.size} squared deviations do not show a tail, {MIN_REDRAWS} would")
    if value > 0 and error / value > MAX_RELATIVE_ERROR:
        reasons.append(f"groups disagree (standard error {error / value:.0%} of the mean)")
    if top_share > MAX_TOP_SHARE:
        reasons.append(f"the largest 1% of the redraws carry {top_share:.0%} of it")
    if tail_index < MIN_TAIL_INDEX:
        reasons.append(f"the squared deviations have a tail of index {tail_index:.1f}")
    if not reasons:
        return ""
    return (
        f"the variance has not settled: {'; '.join(reasons)}; use more redraws, or an estimator of "
        "finite variance"
    )


_SLOWEST = 0.01  # power of m that still counts as a fall


def inverse_rates_diverge(
    objective: Objective, transform: VarianceTransform, state: PyTree, spec: DrawSpec
) -> bool:
    """Whether an estimate with losses S/m of the bound has infinite variance, by law and chain.
    With p the law's density of the rate, q(u) that of the quantiles and w(u) their weight, the
    second moment near m = 0 is ``int q w^2 / (m p) dm``: finite if law or chain stop above m = 0,
    or ``q w^2 / p`` falls like a power of m (from the last two float32 grid points). A warp without
    profile counts as bounded. False for "biased" objectives, whose weight is not the bound's.
    """
    if objective.bias == "biased" or float(objective.law.support[1]) < jnp.inf:
        return False

    @jax.jit
    def diverges(law: Law, state: PyTree) -> Array:
        last = jnp.asarray([3.0, 1.0])
        u = jnp.broadcast_to((1 - last * 2.0 ** -(GRID_BITS + 1))[:, None], (2, spec.num_levels))
        logsnr = law.icdf(u)
        log_rate, log_survival = jax.nn.log_sigmoid(-logsnr), jax.nn.log_sigmoid(logsnr)
        height = -(law.log_pdf(logsnr) - log_rate - log_survival)
        if transform.profile is not None:
            profile = transform.profile(state, u)
            height = height + profile.log_density + 2 * profile.log_weight
        power = jnp.diff(height, axis=0) / jnp.diff(log_rate, axis=0)
        return jnp.any((height[1] > -jnp.inf) & (power[0] < _SLOWEST))

    return bool(diverges(objective.law, state))
