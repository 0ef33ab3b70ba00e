"""Subject of the variance meter: a network's loss and gradient under a transform.
Methods share compiled functions that take the draw, one per number of views. ``progress`` callbacks
get the number of evaluations (redraws, batches) since the last call.
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
from mdm_jax.pytrees import of_trained, trained
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree
from mdm_jax.variance.transform import VarianceTransform

ApplyFn = Callable[..., Array]
"""``apply_fn(params, inputs, logsnr, documents) -> logits``."""

Progress = Callable[[int], None]


class Estimator(NamedTuple):
    """Jitted functions of a network and an objective; see :func:`make_estimator`.

    Attributes:
        losses: ``(params, batch, draw) -> [B]`` nats per row, weighted, view mean, level sum; where
            an objective has sums of its own, those of each row alone.
        directional: ``(params, batch, draw, key, probes)`` -> [B], [probes, B] along random signs.
        gradient: ``(params, batch, draw, num_microbatches)`` -> nats per eligible token.
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
    """What is measured; ``spec`` is that of a *training* batch, and ``state`` is only read.

    Gradients are of the part of ``params`` that is trained (``pytrees.trained``).
    """

    estimator: Estimator
    params: PyTree
    transform: VarianceTransform
    state: PyTree
    spec: DrawSpec


def make_estimator(apply_fn: ApplyFn, objective: Objective) -> Estimator:
    """Jitted functions of network and objective, for ``apply_fn`` without dropout (extra noise)."""

    def losses(params: PyTree, batch: Batch, draw: Draw, network: ApplyFn = apply_fn) -> Array:
        model_fn = functools.partial(network, params)
        if objective.summed is None:
            stats = objective.loss(model_fn, batch, draw)
            return jax.vmap(sum_losses, in_axes=1)(draw, stats).loss

        def of_row(row: Batch, own: Draw) -> Array:
            row = jax.tree.map(lambda field: field[None], row)
            return objective.summed(model_fn, row, Draw(*(a[:, None] for a in own)))[0].loss

        return jax.vmap(of_row, in_axes=(0, 1))(batch, draw)

    def dense(*inputs: Any, **options: Array) -> Array | tuple[Array, ...]:
        outputs = apply_fn(*inputs, **options)  # chunked losses have no forward mode
        return tuple(map(as_logits, outputs)) if isinstance(outputs, tuple) else as_logits(outputs)

    def directional(
        params: PyTree, batch: Batch, draw: Draw, key: Array, probes: int
    ) -> tuple[Array, Array]:
        part = trained(params)
        loss = of_trained(lambda p: losses(p, batch, draw, dense), params)
        value, along = jax.linearize(loss, part)
        each = jax.lax.map(
            lambda probe: along(random_signs(jax.random.fold_in(key, probe), part)),
            jnp.arange(probes),
        )
        return value, each

    loss = summed_loss(apply_fn, objective)

    def gradient(params: PyTree, batch: Batch, draw: Draw, num_microbatches: int) -> PyTree:
        total, sums, _ = accumulate_gradient(loss, params, batch, draw, num_microbatches)
        return jax.tree.map(lambda g: token_mean(g, sums.eligible.astype(g.dtype)), total)

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
    Each has the expectation ``tr Cov(G)``; see :mod:`mdm_jax.estimates`. Holds three gradients.
    """
    mean, terms = start(trained(params)).mean, []
    for index, (batch, draw) in enumerate(batches):
        count = np.float32(index)
        mean, term = estimator.accumulate(mean, count, params, batch, draw, num_microbatches)
        terms.append(term)
    return np.asarray(jax.device_get(terms[1:]), np.float64), float(square_norm(mean))


def random_signs(key: Array, like: PyTree) -> PyTree:
    """Independent signs, 1 or -1, of the structure of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    signs = [
        jax.random.rademacher(stream(key, f"leaf {i}"), leaf.shape, leaf.dtype)
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, signs)
