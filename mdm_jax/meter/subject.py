"""What the variance meter measures: a network's loss and gradient under a transform.

Every method is measured with the same forward and backward pass; only the draw differs. So these
functions take the draw as an argument, and compile once per number of views, not per method.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.estimates import RunningMean, add, square_norm, start
from mdm_jax.models.cross_entropy import as_logits
from mdm_jax.objectives.objective import (
    Objective,
    accumulate_gradient,
    sum_losses,
    summed_loss,
    token_mean,
)
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree
from mdm_jax.variance.transform import VarianceTransform

ApplyFn = Callable[..., Array]
"""``apply_fn(params, inputs, logsnr, documents) -> logits``."""

Progress = Callable[[int], None]
"""Called with the number of evaluations done since the last call."""


class Estimator(NamedTuple):
    """A network and an objective; see :func:`make_estimator`.

    Attributes:
        objective: what is estimated.
        losses: ``(params, batch, draw) -> [B]`` nats per row, importance weights inside, averaged
            over views and summed over levels.
        directional: ``(params, batch, draw, key, probes) -> (losses [B], [probes, B])``, with the
            losses' derivatives along random signs.
        gradient: ``(params, batch, draw, num_microbatches)`` -> gradient, nats per eligible token.
        accumulate: ``(mean, count, params, batch, draw, num_microbatches) -> (mean, term)``: adds
            that gradient to a running mean of ``count`` gradients, which is donated.
    """

    objective: Objective
    losses: Callable[[PyTree, Batch, Draw], Array]
    directional: Callable[[PyTree, Batch, Draw, Array, int], tuple[Array, Array]]
    gradient: Callable[[PyTree, Batch, Draw, int], PyTree]
    accumulate: Callable[..., tuple[PyTree, Array]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured.

    Attributes:
        estimator: network and objective; share it between methods.
        params: parameters.
        transform: variance reduction; any chain.
        state: its state; read, never written.
        spec: shape of a *training* batch, ``objective.spec(batch_size, length)``.
    """

    estimator: Estimator
    params: PyTree
    transform: VarianceTransform
    state: PyTree
    spec: DrawSpec


def make_estimator(apply_fn: ApplyFn, objective: Objective) -> Estimator:
    """Jitted functions shared by all measurements of one network under one objective.

    Args:
        apply_fn: ``apply_fn(params, inputs, logsnr, documents) -> logits``, without dropout, which
            would pass for masking noise.
        objective: what is estimated.
    """

    def losses(params: PyTree, batch: Batch, draw: Draw, network: ApplyFn = apply_fn) -> Array:
        stats = objective.loss(functools.partial(network, params), batch, draw)
        return jax.vmap(sum_losses, in_axes=1)(draw, stats).loss

    def dense(*inputs: Any, **options: Array) -> Array:
        return as_logits(apply_fn(*inputs, **options))  # chunked losses have no forward mode

    def directional(
        params: PyTree, batch: Batch, draw: Draw, key: Array, probes: int
    ) -> tuple[Array, Array]:
        value, along = jax.linearize(lambda p: losses(p, batch, draw, dense), params)
        each = jax.lax.map(
            lambda probe: along(_signs(jax.random.fold_in(key, probe), params)), jnp.arange(probes)
        )
        return value, each

    loss = summed_loss(apply_fn, objective)

    def gradient(params: PyTree, batch: Batch, draw: Draw, num_microbatches: int) -> PyTree:
        total, sums, _ = accumulate_gradient(loss, params, batch, draw, num_microbatches)
        return jax.tree.map(lambda g: token_mean(g, sums.scored.astype(g.dtype)), total)

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
        jax.jit(directional, static_argnums=4),
        jax.jit(gradient, static_argnums=3),
        accumulate,
    )


def gradient_deviations(
    estimator: Estimator,
    params: PyTree,
    batches: Iterable[tuple[Batch, Draw]],
    num_microbatches: int = 1,
) -> tuple[np.ndarray, float]:
    """Squared deviations of batch gradients [N - 1] and the squared norm of their mean.

    Each deviation has the expectation ``tr Cov(G)``; see :mod:`mdm_jax.estimates`. Holds three
    gradients at a time.
    """
    mean, terms = start(params).mean, []
    for index, (batch, draw) in enumerate(batches):
        count = np.float32(index)
        mean, term = estimator.accumulate(mean, count, params, batch, draw, num_microbatches)
        terms.append(term)
    return np.asarray(jax.device_get(terms[1:]), np.float64), float(square_norm(mean))


def _signs(key: Array, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)
    signs = [
        jax.random.rademacher(stream(key, f"leaf {i}"), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, signs)
