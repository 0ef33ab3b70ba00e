"""Which of several chains has the least gradient variance per forward pass, by its interval.

All are measured in batches of equally many forward passes with rows drawn anew, as the optimiser
sees them: a view more is a row less. Groups of redraws, paired between chains, give the intervals.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mdm_jax.distributed import spread_rows
from mdm_jax.draws import DrawSpec
from mdm_jax.estimates import Estimate, finite_or_none, mean_estimate, standard_error_of_ratio
from mdm_jax.meter.efficiency import Efficiency, efficiency_with_data
from mdm_jax.meter.subject import ApplyFn, Progress, Subject
from mdm_jax.objectives.objective import Objective, stop_gradient_stats
from mdm_jax.types import Array, Batch, PyTree
from mdm_jax.variance.transform import VarianceTransform, draw_batch


class Ranked(NamedTuple):
    """One chain among others.

    Attributes:
        ratio, interval: its variance (or noise to signal) per forward pass over the reference's.
        tied: whether its paired difference from the least one may be 0 by the interval.
        unsettled: why it has no figure, or "".
    """

    ratio: Estimate
    interval: tuple[float, float]
    tied: bool
    unsettled: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "ratio": finite_or_none(self.ratio.value),
            "ratio_standard_error": finite_or_none(self.ratio.standard_error),
            "interval": [finite_or_none(end) for end in self.interval],
            "tied": self.tied,
            "unsettled": self.unsettled,
        }


def warm_up(
    apply_fn: ApplyFn,
    objective: Objective,
    transform: VarianceTransform,
    spec: DrawSpec,
    params: PyTree,
    state: PyTree,
    batches: Iterable[Batch],
    key: Array,
) -> PyTree:
    """State of a transform after an update from each batch of ``spec``, the parameters fixed."""

    @jax.jit
    def learn(params: PyTree, state: PyTree, batch: Batch, key: Array) -> PyTree:
        draw = draw_batch(key, transform, state, spec)
        stats = objective.loss(lambda *inputs: apply_fn(params, *inputs), batch, draw)
        return transform.update(state, draw, stop_gradient_stats(stats))

    for number, batch in enumerate(batches):
        batch = spread_rows(batch, params)
        state = learn(params, state, batch, jax.random.fold_in(key, number))
    return state


def efficiency_at_equal_passes(
    subject: Subject,
    rows: Batch,
    key: Array,
    *,
    passes: int,
    groups: int,
    redraws: int,
    num_microbatches: int = 1,
    progress: Progress | None = None,
) -> Efficiency:
    """:func:`efficiency_with_data` in batches of ``passes`` forward passes, whatever the views.

    ``num_microbatches`` are those of ``passes`` rows, fewer where they do not divide the rows.
    ValueError if the views do not divide ``passes``.
    """
    views = subject.transform.views
    if passes % views:
        raise ValueError(f"{views} views do not divide the {passes} forward passes of a batch")
    size = passes // views
    spec = subject.estimator.objective.spec(size, rows.tokens.shape[1])
    return efficiency_with_data(
        dataclasses.replace(subject, spec=spec),
        rows,
        key,
        groups=groups,
        redraws=redraws,
        num_microbatches=math.gcd(size, num_microbatches),
        progress=progress,
    )


def rank(
    figures: Mapping[str, Efficiency],
    reference: str,
    by_noise_to_signal: bool = False,
    coverage: float = 0.95,
) -> dict[str, Ranked]:
    """Compare measurements of :func:`efficiency_at_equal_passes` made with one key and one design.

    The least figure is found among those settled, without ``reference``; the others are tied with
    it where Student's interval of the paired difference over groups includes 0. By variance, or,
    for chains that estimate different gradients, by noise to signal (pseudo-values of the jackknife
    over groups). ValueError for fewer than two groups, or different numbers of them.
    """
    from scipy import special  # slow to import

    sizes = {len(figure.group_variances) for figure in figures.values()}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(f"chains are compared over the same groups, two or more; got {sizes}")
    (groups,) = sizes
    reach = special.stdtrit(groups - 1, (1 + coverage) / 2)
    values, reasons = {}, {}
    for name, figure in figures.items():
        values[name] = noise_to_signal(figure) if by_noise_to_signal else figure.group_variances
        reasons[name] = figure.unsettled
        if not reasons[name] and not np.all(np.isfinite(values[name])):
            reasons[name] = "no signal is left in so few redraws; use more"
    settled = [name for name in figures if name != reference and not reasons[name]]
    least = min(settled, key=lambda name: values[name].mean(), default=None)
    ranked = {}
    for name, own in values.items():
        ratio = Estimate(math.nan, math.nan)
        if not reasons[name] and not reasons[reference]:
            base = values[reference]
            ratio = Estimate(own.mean() / base.mean(), standard_error_of_ratio(own, base))
        tied = name in settled
        if tied and name != least:
            difference, error = mean_estimate(own - values[least])
            tied = bool(difference <= reach * error)
        span = reach * ratio.standard_error
        interval = (ratio.value - span, ratio.value + span)
        ranked[name] = Ranked(ratio, interval, tied, reasons[name])
    return ranked


def noise_to_signal(figure: Efficiency) -> np.ndarray:
    """Pseudo-values [groups] of trace over squared mean gradient; NaN where no signal is left."""
    variances, signals = figure.group_variances, figure.group_signals
    groups, rest = len(variances), signals.sum() - signals
    if signals.sum() <= 0 or np.any(rest <= 0):
        return np.full(groups, math.nan)
    without = (variances.sum() - variances) / rest
    return groups * variances.sum() / signals.sum() - (groups - 1) * without


def first_tied(ranked: Mapping[str, Ranked]) -> str | None:
    """The first chain that is the least one or tied with it; None if none has settled."""
    return next((name for name, each in ranked.items() if each.tied), None)
