"""What the variance meter measures: a network's loss and gradient, compiled once.

Every method is measured with the same forward and backward pass; only the draw differs. So these
functions take the draw as an argument, and compile once per number of views rather than once per
method.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax import draws
from mdm_jax.draws import Draw, LossStats
from mdm_jax.estimates import RunningMean, add
from mdm_jax.objectives.objective import Objective, sum_losses, token_mean
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree

ApplyFn = Callable[..., Array]
"""``apply_fn(params, inputs, logsnr, documents) -> logits``."""


class Estimator(NamedTuple):
    """A network and an objective; see :func:`make_estimator`.

    Attributes:
        objective: what is estimated.
        losses: ``(params, batch, draw) -> [B]`` nats per row, importance weights inside, averaged
            over views and summed over levels.
        slopes: ``(params, batch, draw, key, probes) -> (losses [B], slopes [probes, B])``, the
            losses and their derivatives along random signs.
        gradient: ``(params, batch, draw, num_microbatches)`` -> gradient of the batch's loss in
            nats per scored token, as the optimiser sees it.
        accumulate: ``(mean, count, params, batch, draw, num_microbatches) -> (mean, term)``: adds
            that gradient to a running mean of ``count`` gradients, which is donated.
    """

    objective: Objective
    losses: Callable[[PyTree, Batch, Draw], Array]
    slopes: Callable[[PyTree, Batch, Draw, Array, int], tuple[Array, Array]]
    gradient: Callable[[PyTree, Batch, Draw, int], PyTree]
    accumulate: Callable[..., tuple[PyTree, Array]]


def make_estimator(apply_fn: ApplyFn, objective: Objective) -> Estimator:
    """Jitted functions shared by all measurements of one network under one objective.

    Args:
        apply_fn: ``apply_fn(params, inputs, logsnr, documents) -> logits``, without dropout, which
            would pass for masking noise.
        objective: what is estimated.
    """

    def stats_of(params: PyTree, batch: Batch, draw: Draw) -> LossStats:
        return objective.loss(lambda *inputs: apply_fn(params, *inputs), batch, draw)

    def losses(params: PyTree, batch: Batch, draw: Draw) -> Array:
        stats = stats_of(params, batch, draw)
        values = jnp.exp(draw.log_weight) * stats.weight * stats.raw
        return jnp.mean(jnp.sum(values, axis=-1), axis=0)

    def slopes(
        params: PyTree, batch: Batch, draw: Draw, key: Array, probes: int
    ) -> tuple[Array, Array]:
        value, slope = jax.linearize(lambda p: losses(p, batch, draw), params)
        each = jax.lax.map(
            lambda probe: slope(_signs(jax.random.fold_in(key, probe), params)), jnp.arange(probes)
        )
        return value, each

    def weighted_sum(params: PyTree, batch: Batch, draw: Draw) -> tuple[Array, Array]:
        sums = sum_losses(draw, stats_of(params, batch, draw))
        return sums.loss, sums.scored

    part_gradient = jax.grad(weighted_sum, has_aux=True)

    def gradient(params: PyTree, batch: Batch, draw: Draw, num_microbatches: int) -> PyTree:
        if num_microbatches == 1:
            total, scored = part_gradient(params, batch, draw)
        else:

            def add_part(carry: PyTree, part: tuple[Batch, Draw]) -> tuple[PyTree, None]:
                return jax.tree.map(jnp.add, carry, part_gradient(params, *part)), None

            parts = (
                draws.split_rows(batch, num_microbatches, axis=0),
                draws.split_rows(draw, num_microbatches, axis=1),
            )
            zeros = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()))
            (total, scored), _ = jax.lax.scan(add_part, zeros, parts)
        return jax.tree.map(lambda g: token_mean(g, scored.astype(g.dtype)), total)

    @functools.partial(jax.jit, static_argnums=5, donate_argnums=0)
    def accumulate(
        mean: PyTree, count: Array, params: PyTree, batch: Batch, draw: Draw, num_microbatches: int
    ) -> tuple[PyTree, Array]:
        sample = gradient(params, batch, draw, num_microbatches)
        running, term = add(RunningMean(count, mean), sample)
        return running.mean, term

    return Estimator(
        objective,
        jax.jit(losses),
        jax.jit(slopes, static_argnums=4),
        jax.jit(gradient, static_argnums=3),
        accumulate,
    )


def _signs(key: Array, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    signs = [
        jax.random.rademacher(stream(key, f"leaf {i}"), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, signs)
