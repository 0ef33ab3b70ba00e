"""What a step will need on each device, before anything is compiled.

State and gradients are counted exactly, from shapes and shardings. Activations are what the
backward pass keeps: the residuals of the traced loss of one microbatch, which know of
rematerialisation, scans and custom derivatives, divided by the number of devices over which its
rows are spread. The tensor axis is not counted in their favour, values that several operations keep
are counted for each, and what a single operation needs while it runs is not counted at all, so the
sum is a guide and not a bound; ``compile().memory_analysis()`` knows better, later.
"""

import collections
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from mdm_jax import draws
from mdm_jax.distributed import ROW_AXES
from mdm_jax.types import PyTree

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


class MemoryEstimate(NamedTuple):
    """Bytes on the fullest device.

    Attributes:
        parameters, average, optimizer, variance: the parts of the TrainState; monitors and counters
            are counted with the variance transform's state.
        gradients: of one backward pass and, with microbatches, their sum.
        activations: what one microbatch's forward pass keeps for its backward pass.
        batch: the rows themselves.
    """

    parameters: int
    average: int
    optimizer: int
    variance: int
    gradients: int
    activations: int
    batch: int

    @property
    def total(self) -> int:
        """Sum of all parts, bytes."""
        return sum(self)

    def describe(self) -> str:
        """One line for people."""
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in self._asdict().items())
        return f"about {format_bytes(self.total)} per device ({parts})"


def estimate_memory(
    state: PyTree,
    batch: PyTree,
    loss: Callable[..., Any],
    draw: PyTree,
    num_microbatches: int = 1,
) -> MemoryEstimate:
    """Estimates without compiling or computing.

    Args:
        state: TrainState of jax.ShapeDtypeStruct with shardings, from ``abstract_sharded``.
        batch: Batch of jax.ShapeDtypeStruct with shardings.
        loss: from :func:`~mdm_jax.training.step.weighted_sum`.
        draw: shapes of the step's Draw.
        num_microbatches: as the step's.
    """
    gradients = tree_bytes(state.params) * (1 if num_microbatches == 1 else 2)
    rest = (state.variance, state.monitors, state.step, state.skipped, state.skipped_in_a_row)
    return MemoryEstimate(
        parameters=tree_bytes(state.params),
        average=tree_bytes(state.ema),
        optimizer=tree_bytes(state.opt_state),
        variance=tree_bytes(rest),
        gradients=gradients,
        activations=_kept(state.params, batch, loss, draw, num_microbatches),
        batch=tree_bytes(batch),
    )


def tree_bytes(tree: PyTree) -> int:
    """Bytes of a pytree of arrays or shapes with shardings on one device."""

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def format_bytes(size: float) -> str:
    """As people read it."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} B"


def _kept(params, batch, loss, draw, parts) -> int:
    def residuals(params, batch, draw):
        one = (draws.split_rows(batch, parts, axis=0), draws.split_rows(draw, parts, axis=1))
        one = jax.tree.map(lambda leaf: leaf[0], one)
        return jax.vjp(lambda p: loss(p, *one), params, has_aux=True)[1]

    whole = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, batch, draw)
    )
    found = jax.tree.leaves(jax.eval_shape(residuals, *whole))
    # Parameters are among the residuals, as they are or in the dtype of the products.
    known = collections.Counter(leaf.shape for leaf in jax.tree.leaves(params))
    total = 0
    for leaf in found:
        if known[leaf.shape] > 0:
            known[leaf.shape] -= 1
        else:
            total += math.prod(leaf.shape) * leaf.dtype.itemsize
    mesh = jax.tree.leaves(batch)[0].sharding.mesh
    return total // math.prod(mesh.shape.get(axis, 1) for axis in ROW_AXES)
