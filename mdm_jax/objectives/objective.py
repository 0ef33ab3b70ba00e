"""Objectives and the reduction of per-example losses to a batch's loss and gradient."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax import draws
from mdm_jax.checks import Bins, checked
from mdm_jax.corruption.process import Corruption
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.models.cross_entropy import Readout, with_loss_weights
from mdm_jax.pytrees import of_trained, trained
from mdm_jax.schedules.laws import Law, logistic
from mdm_jax.types import Array, Batch, ModelFn, PyTree

UNIFORM_RATE = logistic()
"""The law of the logSNR under a uniform masking rate."""


class Objective(NamedTuple):
    """A training objective as pure functions. It receives a draw and never makes one.

    Attributes:
        law: noise law over logSNR; ``draw.u`` holds its quantiles.
        spec: ``spec(batch_size, length) -> DrawSpec``, the randomness that the loss consumes.
        loss: ``loss(model_fn, batch, draw) -> LossStats`` with a leading view axis.
        bias: "exact" if the expected loss is a full likelihood bound, "truncated" if the law leaves
            out part of the noise range, "biased" if weighting or contexts are not the bound's.
        summed: ``summed(model_fn, batch, draw) -> (LossSums, LossStats)`` where what is minimised
            is no sum of the rows' weighted losses (``alignment``); None: :func:`sum_losses`.
        log_level_weight: log factor at a logSNR, elementwise, on the mean loss of target elements
            at levels from ``law``; None if it is no function of the level alone.
    """

    name: str
    law: Law
    corruption: Corruption
    spec: Callable[[int, int], DrawSpec]
    loss: Callable[[ModelFn, Batch, Draw], LossStats]
    bias: str
    summed: Callable[[ModelFn, Batch, Draw], tuple["LossSums", LossStats]] | None = None
    log_level_weight: Callable[[Array], Array] | None = None


class LossSums(NamedTuple):
    """Sums over rows; they add up over microbatches and shards.

    Weighted loss, nats, and eligible elements, averaged over views; unweighted loss, nats, and
    number of the target elements, over all views.
    """

    loss: Array
    eligible: Array
    cross_entropy: Array
    targets: Array


def weighted_losses(draw: Draw, stats: LossStats) -> Array:
    """Losses [V, B, S] with all weights, nats: summed over S, estimates of the bound of a row.

    [M, V, B, S] where the stats are of M networks.
    """
    return jnp.broadcast_to(jnp.exp(draw.log_weight) * stats.weight, stats.raw.shape) * stats.raw


def sum_losses(draw: Draw, stats: LossStats) -> LossSums:
    """Sums of a batch, averaged over views; :func:`token_mean` divides them."""
    views = draw.u.shape[0]
    return LossSums(
        loss=jnp.sum(weighted_losses(draw, stats)) / views,
        eligible=jnp.sum(stats.eligible) / views,
        cross_entropy=jnp.sum(stats.raw),
        targets=jnp.sum(stats.targets).astype(jnp.float32),
    )


def token_mean(total: Array, count: Array) -> Array:
    """``total / count``, and zero with zero gradient where nothing was counted."""
    return jnp.where(count > 0, total, 0.0) / jnp.maximum(count, 1.0)


def summed_loss(apply_fn: Callable[..., Any], objective: Objective) -> Callable[..., tuple]:
    """``loss(params, batch, draw) -> (sum, (sums, stats))``, nats: what training differentiates."""

    def loss(params: PyTree, batch: Batch, draw: Draw) -> tuple[Array, tuple[LossSums, LossStats]]:
        def evaluate(model_fn: ModelFn) -> tuple[LossSums, LossStats]:
            if objective.summed is not None:
                return objective.summed(model_fn, batch, draw)
            stats = objective.loss(model_fn, batch, draw)
            return sum_losses(draw, stats), stats

        plain = functools.partial(apply_fn, params)
        sums, stats = evaluate(
            with_loss_weights(plain, lambda model_fn: evaluate(model_fn)[0].loss)
        )
        return sums.loss, (sums, stop_gradient_stats(stats))

    return loss


def accumulate_gradient(
    loss: Callable[..., tuple[Array, tuple[LossSums, LossStats]]],
    params: PyTree,
    batch: Batch,
    draw: Draw,
    num_microbatches: int = 1,
) -> tuple[PyTree, LossSums, LossStats]:
    """Gradient of a :func:`summed_loss`, its sums and stats, accumulated over microbatches.

    Of the part of ``params`` that is trained (``pytrees.trained``). Not divided by the global
    batch's tokens. ``num_microbatches`` must divide the batch's rows.
    """
    gradient, part = jax.grad(of_trained(loss, params), has_aux=True), trained(params)
    if num_microbatches == 1:
        gradients, (sums, stats) = gradient(part, batch, draw)
        return gradients, sums, stats

    def add(total: tuple[PyTree, LossSums], microbatch: tuple[Batch, Draw]):
        gradients, (sums, stats) = gradient(part, *microbatch)
        return jax.tree.map(jnp.add, total, (gradients, sums)), stats

    zeros = (jax.tree.map(jnp.zeros_like, part), LossSums(*(jnp.zeros(()),) * 4))
    microbatches = (
        draws.split_rows(batch, num_microbatches, axis=0),
        draws.split_rows(draw, num_microbatches, axis=1),
    )
    (gradients, sums), stats = jax.lax.scan(add, zeros, microbatches)
    return gradients, sums, draws.join_rows(stats, axis=1)


def flatten_views(values: Array) -> Array:
    """[V, B, ...] -> [B V, ...]: the views of a row stay adjacent, hence on its device."""
    swapped = jnp.swapaxes(values, 0, 1)
    return swapped.reshape(-1, *swapped.shape[2:])


def unflatten_views(values: Array, views: int) -> Array:
    """[B V, ...] -> [V, B, ...], the inverse of :func:`flatten_views`."""
    return jnp.swapaxes(values.reshape(-1, views, *values.shape[1:]), 0, 1)


def repeat_views(values: Array, views: int) -> Array:
    """[B, ...] -> [B V, ...]: each row once per view, in the order of :func:`flatten_views`."""
    return jnp.repeat(values, views, axis=0)


def call_model(
    model_fn: ModelFn,
    inputs: Array,
    logsnr: Array,
    documents: Array,
    loss: Callable[..., Array] | None = None,
    known: tuple[Array, ...] = (),
) -> Array:
    """One forward pass over all views of all rows; outputs [V, B, ...], or losses [V, B, L].

    Args:
        model_fn: returns logits, a readout or predictions; or a tuple of those of M networks on the
            same inputs, for results [M, V, B, ...].
        inputs, logsnr, documents: [V, B, ...], [V, B, S] and [B, L].
        loss: ``loss(outputs, *known)`` of the rows [B V, L] of all views, such as ``token_nats``.
        known: arrays that broadcast to [V, B, L].
    """
    views = inputs.shape[0]
    documents = jnp.asarray(documents)
    outputs = model_fn(flatten_views(inputs), flatten_views(logsnr), repeat_views(documents, views))
    shape = (views, *documents.shape)
    rows = [flatten_views(jnp.broadcast_to(a, shape)) for a in known] if loss else []

    def result(outputs: Array | Readout) -> Array:
        return unflatten_views(loss(outputs, *rows) if loss else outputs, views)

    if isinstance(outputs, tuple):
        return jnp.stack([result(each) for each in outputs])
    return result(outputs)


def rate_importance(law: Law) -> Callable[[Array], Array]:
    """log of the density of a uniform rate over that of the law, at a logSNR, elementwise."""
    return lambda logsnr: UNIFORM_RATE.log_pdf(logsnr) - law.log_pdf(logsnr)


def bias_of_levels(name: str, num_levels: int) -> str:
    """Bias label of S noise levels per row: "exact" for 1, "biased" for more; ValueError below 1.

    With several the context has other levels, and the loss can lie below the data's entropy.
    """
    if num_levels < 1:
        raise ValueError(
            f"{name} needs num_levels >= 1 noise levels per row, got {num_levels}; 1 is the bound"
        )
    return "exact" if num_levels == 1 else "biased"


def bias_of_law(law: Law) -> str:
    """Label of a law: "exact" if it covers the real line and is drawn there, else "truncated"."""
    low, high = law.support
    whole = low == -jnp.inf and high == jnp.inf and getattr(law, "drawn_to_the_ends", True)
    return "exact" if whole else "truncated"


def describe(objective: Objective) -> str:
    """One line for logs."""
    return f"{objective.name} over {objective.corruption.name} [{objective.bias}]"


def stop_gradient_stats(stats: LossStats) -> LossStats:
    """Statistics for adaptive transforms, without gradient."""
    return jax.tree.map(jax.lax.stop_gradient, stats)


class Baseline(NamedTuple):
    """Running mean of the per-token integrand in bins of the quantile, for a steadier logged loss.

    A control variate for that number; gradients do not change:

        reported = sum_rows [ w (f - n b(u)) + n mean(b) ] ,

    with importance weight w, n eligible tokens, b the running mean of past batches. Its expectation
    is the loss's where ``w b(u)`` has the mean of b: under chains labelled "exact".

    Attributes:
        mean: [bins] nats per token; 0 before the first visit.
        weight: [bins] total weight behind the mean, from 0 towards 1.
        rejected: [] int32 batches left out because a loss was not finite.
    """

    mean: Array
    weight: Array
    rejected: Array


@checked
def new_baseline(bins: Bins = 16) -> Baseline:
    """An empty baseline, which changes nothing."""
    mean, weight = (jnp.zeros((bins,), jnp.float32) for _ in range(2))  # both can be donated
    return Baseline(mean, weight, jnp.zeros((), jnp.int32))


def update_baseline(
    baseline: Baseline, draw: Draw, stats: LossStats, decay: float = 0.99
) -> Baseline:
    """The baseline after one more batch; ``decay`` in [0, 1) is per visit of a bin."""
    member, loss, eligible = _bins(baseline, draw, stats)
    finite = jnp.all(jnp.isfinite(jnp.where(eligible, loss, 0.0)))
    loss = jnp.where(eligible & finite, loss, 0.0)
    count = jnp.sum(member, axis=(0, 1, 2))
    mean = jnp.sum(loss[..., None] * member, axis=(0, 1, 2)) / jnp.maximum(count, 1.0)
    new = jnp.where((count > 0) & finite, 1 - decay, 0.0)
    weight = baseline.weight * (1 - new) + new
    gain = jnp.where(weight > 0, new / jnp.maximum(weight, 1e-30), 0.0)
    return Baseline(
        mean=baseline.mean + gain * (mean - baseline.mean),
        weight=weight,
        rejected=baseline.rejected + jnp.where(finite, 0, 1),
    )


def reported_loss(baseline: Baseline, draw: Draw, stats: LossStats) -> Array:
    """``sum_losses(draw, stats).loss`` with the control, nats; ``baseline`` without this batch."""
    member, _, eligible = _bins(baseline, draw, stats)
    level = jnp.dot(member, baseline.mean, precision=jax.lax.Precision.HIGHEST)
    correction = jnp.mean(baseline.mean) - jnp.exp(draw.log_weight) * level
    control = jnp.where(eligible, stats.eligible * correction, 0.0)
    return sum_losses(draw, stats).loss + jnp.sum(control) / draw.u.shape[0]


def _bins(baseline: Baseline, draw: Draw, stats: LossStats) -> tuple[Array, Array, Array]:
    bins = baseline.mean.shape[0]
    eligible = stats.eligible > 0
    index = jnp.clip((draw.u * bins).astype(jnp.int32), 0, bins - 1)
    member = jax.nn.one_hot(index, bins, dtype=jnp.float32) * eligible[..., None]
    return member, stats.raw * stats.weight / jnp.maximum(stats.eligible, 1), eligible
