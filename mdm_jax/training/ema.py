"""Exponential moving average of the parameters, in float32 or in half the memory.

A bfloat16 average would stand still, since its relative steps are below 2^-8. Its *offset* from the
parameters is small, and eight bits suffice for it:

    offset' = average' - p' = d (average - p') = d (offset + p - p')
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.types import Array, PyTree


class AverageOffset(NamedTuple):
    """An average stored as its offset from the parameters."""

    offset: PyTree


def new_average(params: PyTree, dtype: jnp.dtype = jnp.float32) -> PyTree:
    """The average at step 0; float32, or bfloat16 as an :class:`AverageOffset`, else ValueError."""
    if dtype == jnp.float32:
        # Of float32 parameters a copy; narrower ones would make it stand still.
        wide = jax.tree.map(lambda p: jnp.promote_types(p.dtype, jnp.float32), params)
        return jax.tree.map(lambda p, dtype: jnp.array(p, dtype, copy=True), params, wide)
    if dtype == jnp.bfloat16:
        return AverageOffset(jax.tree.map(lambda p: jnp.zeros_like(p, dtype=dtype), params))
    raise ValueError(f"averages are kept in float32 or bfloat16, got {jnp.dtype(dtype).name}")


def update_average(average: PyTree, old: PyTree, new: PyTree, decay: Array) -> PyTree:
    """The average after a step from parameters ``old`` to ``new``; arithmetic in float32."""
    if not isinstance(average, AverageOffset):
        return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, new)

    def move(offset: Array, before: Array, after: Array) -> Array:
        moved = offset.astype(jnp.float32) + (before - after).astype(jnp.float32)
        return (decay * moved).astype(offset.dtype)

    return AverageOffset(jax.tree.map(move, average.offset, old, new))


def averaged(state: PyTree) -> PyTree:
    """The averaged parameters of a TrainState, or their shapes if its leaves are only shapes."""
    if not isinstance(state.ema, AverageOffset):
        return state.ema
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(state.params)):
        return state.params
    return _add(state.params, state.ema.offset)


@jax.jit
def _add(params: PyTree, offset: PyTree) -> PyTree:
    return jax.tree.map(lambda p, o: p + o.astype(p.dtype), params, offset)
