"""What is estimated: a noise law, a weighting and a per-example loss.

A running baseline for the *reported* loss. It cannot change a gradient.

Subtracting from a loss something that does not depend on the parameters leaves its gradient as it
is, bit for bit, whatever it does to the curve of the loss; a baseline reduces the variance of
*score-function* terms, of which a masked bound with a fixed forward process has none. So this is a
control variate for the number that is logged:

    reported = sum_rows [ w (f - n b(u)) + n mean(b) ] ,

with w the importance weight, n the scored tokens, and b a running mean of the per-token integrand
in equal bins of the quantile u. Where w is one over the density that u is drawn from, ``w b(u)``
has the mean of b, and because b is of the past the expectation is that of the loss. That holds for
chains labelled "exact". Under one that leaves levels out, or pays another weight than that, the
correction has a mean of its own and the number is that of nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.corruption.process import Corruption
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.schedules.laws import Law
from mdm_jax.types import Array, Batch, ModelFn


class Objective(NamedTuple):
    """A training objective as pure functions. It receives a draw and never makes one.

    Attributes:
        name: for logs and reports.
        law: noise law over logSNR; ``draw.u`` holds its quantiles.
        corruption: forward process.
        spec: ``spec(batch_size, length) -> DrawSpec``, the randomness that the loss consumes.
        loss: ``loss(model_fn, batch, draw) -> LossStats`` with a leading view axis.
        bias: "exact" if the expected loss is a full likelihood bound, "truncated" if the law leaves
            out part of the noise range, "biased" if weighting or contexts are not the bound's.
    """

    name: str
    law: Law
    corruption: Corruption
    spec: Callable[[int, int], DrawSpec]
    loss: Callable[[ModelFn, Batch, Draw], LossStats]
    bias: str


class LossSums(NamedTuple):
    """Sums over the rows at hand; they add up over microbatches and shards.

    Attributes:
        loss: weighted loss, nats, averaged over views.
        scored: number of eligible elements.
        cross_entropy: unweighted loss of the target elements, nats, over all views.
        targets: number of target elements, over all views.
    """

    loss: Array
    scored: Array
    cross_entropy: Array
    targets: Array


def sum_losses(draw: Draw, stats: LossStats) -> LossSums:
    """The one place where per-example losses become numbers of a batch."""
    weight = jnp.exp(draw.log_weight) * stats.weight
    views = draw.u.shape[0]
    return LossSums(
        loss=jnp.sum(weight * stats.raw) / views,
        scored=jnp.sum(stats.scored) / views,
        cross_entropy=jnp.sum(stats.raw),
        targets=jnp.sum(stats.targets).astype(jnp.float32),
    )


def token_mean(total: Array, count: Array) -> Array:
    """``total / count``, and zero with zero gradient where nothing was counted."""
    return jnp.where(count > 0, total, 0.0) / jnp.maximum(count, 1.0)


def flatten_views(values: Array) -> Array:
    """[V, B, ...] -> [B V, ...]: all views of a row stay next to it, hence on its device."""
    swapped = jnp.swapaxes(values, 0, 1)
    return swapped.reshape(-1, *swapped.shape[2:])


def unflatten_views(values: Array, views: int) -> Array:
    """[B V, ...] -> [V, B, ...], the inverse of :func:`flatten_views`."""
    return jnp.swapaxes(values.reshape(-1, views, *values.shape[1:]), 0, 1)


def repeat_views(values: Array, views: int) -> Array:
    """[B, ...] -> [B V, ...]: each row once per view, in the order of :func:`flatten_views`."""
    return jnp.repeat(values, views, axis=0)


def call_model(
    model_fn: ModelFn, inputs: Array, logsnr: Array, documents: Array, views: int
) -> Array:
    """Runs the network on all views of all rows in one forward pass; [V, B, ...] in and out."""
    outputs = model_fn(
        flatten_views(inputs), flatten_views(logsnr), repeat_views(jnp.asarray(documents), views)
    )
    return unflatten_views(outputs, views)


def score_tokens(
    model_fn: ModelFn,
    inputs: Array,
    logsnr: Array,
    documents: Array,
    score: Callable[..., Array],
    *known: Array,
) -> Array:
    """Runs a network of tokens on all views of all rows and scores what it returns; [V, B, L].

    The scores are taken before views and rows are told apart again, so that the positions of a row
    stay on its device.

    Args:
        model_fn: returns logits or a readout.
        inputs: [V, B, ...].
        logsnr: [V, B, S].
        documents: [B, L].
        score: ``score(outputs, *known)``, [N, L] each, such as ``token_nats``.
        known: arrays that broadcast to [V, B, L], what the score reads of every position.
    """
    views = inputs.shape[0]
    shape = (views, *documents.shape)
    outputs = model_fn(
        flatten_views(inputs), flatten_views(logsnr), repeat_views(jnp.asarray(documents), views)
    )
    flat = [flatten_views(jnp.broadcast_to(values, shape)) for values in known]
    return unflatten_views(score(outputs, *flat), views)


def bias_of_levels(name: str, num_levels: int) -> str:
    """The label of S noise levels per row: "exact" for one, "biased" for several.

    A bound shows a target to the network in a context of the target's own level. With several
    levels per row a segment's context is drawn at the other segments' levels, and the expectation
    bounds nothing: it can lie below the entropy of the data.

    Args:
        name: of the objective, for the error.
        num_levels: S.

    Raises:
        ValueError: unless ``num_levels`` is positive.
    """
    if num_levels < 1:
        raise ValueError(
            f"{name} needs num_levels >= 1 noise levels per row, got {num_levels}; 1 is the bound"
        )
    return "exact" if num_levels == 1 else "biased"


def describe(objective: Objective) -> str:
    """One line for logs."""
    return f"{objective.name} over {objective.corruption.name} [{objective.bias}]"


def stop_gradient_stats(stats: LossStats) -> LossStats:
    """Statistics as an adaptive transform may see them: values, without a path to parameters."""
    return jax.tree.map(jax.lax.stop_gradient, stats)


class Baseline(NamedTuple):
    """Running mean of the per-token integrand in bins of the quantile.

    Attributes:
        mean: [bins] nats per token; 0 where nothing was seen yet.
        weight: [bins] total weight behind the mean, from 0 towards 1.
        rejected: [] int32 batches left out because a loss was not finite.
    """

    mean: Array
    weight: Array
    rejected: Array


def new_baseline(bins: int = 16) -> Baseline:
    """A baseline that has seen nothing and changes nothing.

    Raises:
        ValueError: unless bins >= 1.
    """
    if bins < 1:
        raise ValueError(f"a baseline needs at least 1 bin, got {bins}")
    mean, weight = (jnp.zeros((bins,), jnp.float32) for _ in range(2))  # both can be donated
    return Baseline(mean, weight, jnp.zeros((), jnp.int32))


def update_baseline(
    baseline: Baseline, draw: Draw, stats: LossStats, decay: float = 0.99
) -> Baseline:
    """The baseline after one more batch; rows that share a bin are averaged, not overwritten.

    Args:
        baseline: of the batches before.
        draw: of this batch.
        stats: of this batch; rows without scored tokens are left out.
        decay: of a bin's mean, whenever it is visited, in [0, 1).
    """
    member, loss, scored = _bins(baseline, draw, stats)
    finite = jnp.all(jnp.isfinite(jnp.where(scored, loss, 0.0)))
    loss = jnp.where(scored & finite, loss, 0.0)
    count = jnp.sum(member, axis=(0, 1, 2))
    seen = jnp.sum(loss[..., None] * member, axis=(0, 1, 2)) / jnp.maximum(count, 1.0)
    new = jnp.where((count > 0) & finite, 1 - decay, 0.0)
    weight = baseline.weight * (1 - new) + new
    gain = jnp.where(weight > 0, new / jnp.maximum(weight, 1e-30), 0.0)
    return Baseline(
        mean=baseline.mean + gain * (seen - baseline.mean),
        weight=weight,
        rejected=baseline.rejected + jnp.where(finite, 0, 1),
    )


def reported_loss(baseline: Baseline, draw: Draw, stats: LossStats) -> Array:
    """Sum over rows of the loss with its control variate, nats, averaged over views.

    Divide by the scored tokens as for ``sum_losses(draw, stats).loss``, whose expectation it has if
    the draw is of a chain whose bias is "exact". The baseline must not have seen this batch.
    """
    member, _, scored = _bins(baseline, draw, stats)
    level = jnp.dot(member, baseline.mean, precision=jax.lax.Precision.HIGHEST)
    weight = jnp.exp(draw.log_weight)
    correction = jnp.mean(baseline.mean) - weight * level
    control = jnp.where(scored, stats.scored * correction, 0.0)
    total = jnp.sum(weight * stats.weight * stats.raw) + jnp.sum(control)
    return total / draw.u.shape[0]


def _bins(baseline: Baseline, draw: Draw, stats: LossStats) -> tuple[Array, Array, Array]:
    bins = baseline.mean.shape[0]
    scored = stats.scored > 0
    index = jnp.clip((draw.u * bins).astype(jnp.int32), 0, bins - 1)
    member = jax.nn.one_hot(index, bins, dtype=jnp.float32) * scored[..., None]
    return member, stats.raw * stats.weight / jnp.maximum(stats.scored, 1), scored
