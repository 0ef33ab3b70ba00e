"""What is estimated: a noise law, a weighting and a per-example loss."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.batches import Batch
from mdm_jax.corruption import Corruption
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.schedules import Law
from mdm_jax.typing import Array, ModelFn


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
