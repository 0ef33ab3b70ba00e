"""Losses of single positions, computed where they are asked for and a chunk at a time.

The positions of a group (a device's rows) are put in the order asked first, and a loop runs over
chunks of C of them until no group has any left. The number of turns is read off the batch: every
number of positions is exact, none can be one too many, and the cost follows the number that there
is. Stratified levels with fixed counts mask L/2 of a row to within about one row per batch, so
under them the turns are known to within one chunk.

The backward pass computes the logits of a chunk again: four products instead of three. To keep the
slopes of the forward pass instead saved about a tenth of the head's time on a CPU (256 x 32000) and
took four times the memory; as it is, nothing of the size of [N, L, K] ever exists.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import linear_call

from mdm_jax.models.readout import Projection, Readout
from mdm_jax.typing import Array, PyTree


class PositionLoss(NamedTuple):
    """A loss of one position's logits [..., K] and of what else is known there [...].

    Attributes:
        value: ``value(logits, *known) -> (loss [...] float32, memory)``, the memory a pytree of
            [...] arrays.
        slope: ``slope(logits, memory, *known) -> [..., K]``, the loss's derivative.
    """

    value: Callable[..., tuple[Array, PyTree]]
    slope: Callable[..., Array]


def position_losses(loss: PositionLoss, readout: Readout, where: Array, *known: Array) -> Array:
    """``loss`` of every position in ``where``, and zero elsewhere.

    Differentiable once, forward and backward, in the features and the weights. No gradient flows to
    ``known``. Gradients cannot be mapped over (``vmap`` of ``grad``); with ``readout.logits()``
    they can.

    Args:
        loss: of a position.
        readout: [N, L, ...] of the network.
        where: [N, L] bool.
        known: arrays [N, L], handed to the loss.

    Returns:
        [N, L] float32.
    """
    features, projection = readout.features, readout.projection
    groups = math.gcd(readout.chunking.groups, features.shape[0])
    size = where.size // groups
    plan = _Plan(loss, projection, readout.chunking.size(size, readout.num_tokens))
    grouped = [jnp.asarray(a).reshape(groups, size) for a in (where, *known)]
    x = features.reshape(groups, size, features.shape[-1])
    return _losses(plan, x, readout.weights, *grouped).reshape(where.shape)


class _Plan(NamedTuple):
    loss: PositionLoss
    projection: Projection
    chunk: int


class _Order(NamedTuple):
    # From positions [G, R] to slots [G, T C], those asked for first; the last slots may be nobody's
    # and point at position 0.
    position: Array  # [G, T C]
    slot: Array  # [G, R]
    asked: Array  # [G, T C] bool
    where: Array  # [G, R] bool
    turns: Array  # []

    def sort(self, values: Array) -> Array:
        return _take(values, self.position)

    def restore(self, values: Array) -> Array:
        keep = self.where.reshape(*self.where.shape, *(1,) * (values.ndim - 2))
        return jnp.where(keep, _take(values, self.slot), 0.0)


class _Scored(NamedTuple):
    # What the derivatives need of the forward pass; sorted, but for the weights.
    order: _Order
    features: Array
    weights: Array
    known: tuple[Array, ...]
    memory: PyTree


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _losses(plan: _Plan, x: Array, weights: Array, where: Array, *known: Array) -> Array:
    return _score(plan, x, weights, where, known)[0]


@_losses.defjvp
def _losses_jvp(plan: _Plan, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, weights, where, *known = primals
    values, scored = _score(plan, x, weights, where, tuple(known))
    # custom_vjp would leave out forward mode, which the variance meter's slopes are made of.
    push, pull = functools.partial(_push, plan), functools.partial(_pull, plan, x.dtype)
    return values, linear_call(push, pull, scored, tuple(tangents[:2]))


def _score(
    plan: _Plan, x: Array, weights: Array, where: Array, known: tuple[Array, ...]
) -> tuple[Array, _Scored]:
    order = _order(where, plan.chunk)
    x, known = order.sort(x).astype(plan.projection.dtype), tuple(map(order.sort, known))

    def part(t: Array) -> tuple[Array, PyTree]:
        logits = plan.projection(_chunk(plan, x, t), weights)
        return plan.loss.value(logits, *(_chunk(plan, a, t) for a in known))

    def turn(t: Array, found: PyTree) -> PyTree:
        return _write(plan, found, part(t), t)

    length = order.position.shape[1]
    shapes = jax.eval_shape(part, jnp.zeros((), jnp.int32))
    empty = jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], length), leaf.dtype), shapes)
    values, memory = lax.fori_loop(0, order.turns, turn, empty)
    return order.restore(values), _Scored(order, x, weights, known, memory)


def _slopes(plan: _Plan, scored: _Scored, t: Array) -> Array:
    logits = plan.projection(_chunk(plan, scored.features, t), scored.weights)
    memory, *known = (_chunk(plan, a, t) for a in (scored.memory, *scored.known))
    return plan.loss.slope(logits, memory, *known)


def _push(plan: _Plan, scored: _Scored, tangents: tuple[Array, Array]) -> Array:
    dx, dweights = scored.order.sort(tangents[0]), tangents[1]

    def turn(t: Array, found: Array) -> Array:
        change = plan.projection(_chunk(plan, dx, t), scored.weights)
        change += plan.projection(_chunk(plan, scored.features, t), dweights)
        return _write(plan, found, jnp.sum(_slopes(plan, scored, t) * change, axis=-1), t)

    zeros = jnp.zeros(scored.order.position.shape, jnp.float32)
    return scored.order.restore(lax.fori_loop(0, scored.order.turns, turn, zeros))


def _pull(plan: _Plan, dtype: Any, scored: _Scored, cotangent: Array) -> tuple[Array, Array]:
    order, weights, features = scored.order, scored.weights, scored.features
    cotangent = jnp.where(order.asked, order.sort(cotangent), 0.0)

    def turn(t: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        dx, dweights = found
        slopes = _slopes(plan, scored, t) * _chunk(plan, cotangent, t)[..., None]
        slopes = slopes.astype(plan.projection.dtype)
        dx = _write(plan, dx, plan.projection.to_features(slopes, weights), t)
        # Apart for each group, so that devices meet once, after the loop.
        return dx, dweights + plan.projection.to_weights(slopes, _chunk(plan, features, t))

    zeros = (
        jnp.zeros(features.shape, jnp.float32),
        jnp.zeros((features.shape[0], *weights.shape), jnp.float32),
    )
    dx, dweights = lax.fori_loop(0, order.turns, turn, zeros)
    return order.restore(dx).astype(dtype), jnp.sum(dweights, axis=0).astype(weights.dtype)


def _order(where: Array, chunk: int) -> _Order:
    size = where.shape[1]
    count = jnp.sum(where, axis=1, keepdims=True, dtype=jnp.int32)
    before = jnp.cumsum(where, axis=1, dtype=jnp.int32)
    place = lax.broadcasted_iota(jnp.int32, where.shape, 1)
    slot = jnp.where(where, before - 1, count + place - before)
    slots = jnp.zeros((where.shape[0], -(-size // chunk) * chunk), jnp.int32)
    position = jax.vmap(lambda row, at, of: row.at[at].set(of, unique_indices=True))(
        slots, slot, place
    )
    asked = lax.broadcasted_iota(jnp.int32, slots.shape, 1) < count
    return _Order(position, slot, asked, where, jnp.max((count + chunk - 1) // chunk))


def _take(values: Array, index: Array) -> Array:
    return jax.vmap(lambda row, at: row[at])(values, index)


def _chunk(plan: _Plan, values: PyTree, t: Array) -> PyTree:
    start = t * plan.chunk
    return jax.tree.map(
        lambda leaf: lax.dynamic_slice_in_dim(leaf, start, plan.chunk, axis=1), values
    )


def _write(plan: _Plan, values: PyTree, new: PyTree, t: Array) -> PyTree:
    start = t * plan.chunk
    return jax.tree.map(
        lambda old, part: lax.dynamic_update_slice_in_dim(old, part, start, axis=1), values, new
    )
