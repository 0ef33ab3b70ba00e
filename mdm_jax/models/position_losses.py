"""Losses of single positions, computed where they are asked for and a chunk at a time.

The positions of a group (a device's rows) are put in the order asked first, and a loop runs over
chunks of C of them until no group has any left. The number of turns is read off the batch: every
number of positions is exact, none can be one too many, and the cost follows the number that there
is. Stratified levels with fixed counts mask L/2 of a row to within about one row per batch, so
under them the turns are known to within one chunk.

The backward pass computes the logits of a chunk again: four products instead of three, so that
nothing of the size of [N, L, K] ever exists. Where a readout knows what its losses will be
multiplied with (``ForeseenReadout``), the forward pass computes the gradient too, from the logits
that it has, and the backward pass only compares: asked for anything but a multiple of that, it goes
through the chunks as above. (To keep the slopes of the forward pass takes four times the memory.)
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import linear_call

from mdm_jax.models.readout import ForeseenReadout, GivenLosses, Projection, Readout
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
    if isinstance(readout, GivenLosses):
        return jnp.where(where, readout.losses, 0.0)
    features, projection = readout.features, readout.projection
    groups = math.gcd(readout.chunking.groups, features.shape[0])
    size = where.size // groups
    plan = _Plan(loss, projection, readout.chunking.size(size, readout.num_tokens))
    expected = readout.expected if isinstance(readout, ForeseenReadout) else None
    expected, where_, *known = jax.tree.map(
        lambda a: jnp.asarray(a).reshape(groups, size), [expected, where, *known]
    )
    x = features.reshape(groups, size, features.shape[-1])
    return _losses(plan, x, readout.weights, where_, expected, *known).reshape(where.shape)


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


class _Gradient(NamedTuple):
    # Of the sum of the losses times what is expected.
    expected: Array  # [G, T C], sorted
    features: Array  # [G, T C, D], sorted
    weights: Array  # of each group


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _losses(
    plan: _Plan, x: Array, weights: Array, where: Array, expected: Array | None, *known: Array
) -> Array:
    del expected  # values do not depend on it
    return _score(plan, x, weights, where, None, known)[0]


@_losses.defjvp
def _losses_jvp(plan: _Plan, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, weights, where, expected, *known = primals
    values, scored, gradient = _score(plan, x, weights, where, expected, tuple(known))
    # custom_vjp would leave out forward mode, which the variance meter's slopes are made of.
    push, pull = functools.partial(_push, plan), functools.partial(_pull, plan, x.dtype)
    return values, linear_call(push, pull, (scored, gradient), tuple(tangents[:2]))


def _score(
    plan: _Plan,
    x: Array,
    weights: Array,
    where: Array,
    expected: Array | None,
    known: tuple[Array, ...],
) -> tuple[Array, _Scored, _Gradient | None]:
    order = _order(where, plan.chunk)
    x, known = order.sort(x).astype(plan.projection.dtype), tuple(map(order.sort, known))
    gradient = None
    if expected is not None:
        zeros = _no_gradient(x, weights)
        gradient = _Gradient(jnp.where(order.asked, order.sort(expected), 0.0), *zeros)

    def part(t: Array) -> tuple[tuple[Array, PyTree], Array, tuple[Array, ...]]:
        logits = plan.projection(_chunk(plan, x, t), weights)
        there = tuple(_chunk(plan, a, t) for a in known)
        return plan.loss.value(logits, *there), logits, there

    def turn(t: Array, found: tuple[PyTree, _Gradient | None]) -> PyTree:
        scores, gradient = found
        new, logits, there = part(t)
        if gradient is not None:
            slopes = plan.loss.slope(logits, new[1], *there)
            slopes *= _chunk(plan, gradient.expected, t)[..., None]
            gradient = gradient._replace(**_add(plan, gradient, slopes, x, weights, t))
        return _write(plan, scores, new, t), gradient

    length = order.position.shape[1]
    shapes = jax.eval_shape(lambda t: part(t)[0], jnp.zeros((), jnp.int32))
    empty = jax.tree.map(lambda leaf: jnp.zeros((leaf.shape[0], length), leaf.dtype), shapes)
    (values, memory), gradient = lax.fori_loop(0, order.turns, turn, (empty, gradient))
    return order.restore(values), _Scored(order, x, weights, known, memory), gradient


def _slopes(plan: _Plan, scored: _Scored, t: Array) -> Array:
    logits = plan.projection(_chunk(plan, scored.features, t), scored.weights)
    memory, *known = (_chunk(plan, a, t) for a in (scored.memory, *scored.known))
    return plan.loss.slope(logits, memory, *known)


def _push(
    plan: _Plan, known: tuple[_Scored, _Gradient | None], tangents: tuple[Array, Array]
) -> Array:
    scored, _ = known
    dx, dweights = scored.order.sort(tangents[0]), tangents[1]

    def turn(t: Array, found: Array) -> Array:
        change = plan.projection(_chunk(plan, dx, t), scored.weights)
        change += plan.projection(_chunk(plan, scored.features, t), dweights)
        return _write(plan, found, jnp.sum(_slopes(plan, scored, t) * change, axis=-1), t)

    zeros = jnp.zeros(scored.order.position.shape, jnp.float32)
    return scored.order.restore(lax.fori_loop(0, scored.order.turns, turn, zeros))


def _pull(
    plan: _Plan, dtype: Any, known: tuple[_Scored, _Gradient | None], cotangent: Array
) -> tuple[Array, Array]:
    (scored, gradient), factor = known, 1.0
    order, weights, features = scored.order, scored.weights, scored.features
    cotangent = jnp.where(order.asked, order.sort(cotangent), 0.0)

    def turn(t: Array, found: _Gradient) -> _Gradient:
        slopes = _slopes(plan, scored, t) * _chunk(plan, found.expected, t)[..., None]
        return found._replace(**_add(plan, found, slopes, features, weights, t))

    def anew(_: _Gradient | None) -> _Gradient:
        start = _Gradient(cotangent, *_no_gradient(features, weights))
        return lax.fori_loop(0, order.turns, turn, start)

    if gradient is None:
        gradient = anew(None)
    else:
        factor = _proportion(cotangent, gradient.expected)
        fits = jnp.all(jnp.abs(cotangent - factor * gradient.expected) <= 1e-6 * jnp.abs(cotangent))
        gradient = lax.cond(fits, lambda found: found, anew, gradient)
        factor = jnp.where(fits, factor, 1.0)
    dx, dweights = order.restore(gradient.features), jnp.sum(gradient.weights, axis=0)
    return (factor * dx).astype(dtype), (factor * dweights).astype(weights.dtype)


def _proportion(values: Array, of: Array) -> Array:
    # Where the others are largest, and 1 where all are zero.
    place = jnp.argmax(jnp.abs(of))
    other = of.reshape(-1)[place]
    return jnp.where(other == 0, 1.0, values.reshape(-1)[place] / jnp.where(other == 0, 1.0, other))


def _no_gradient(features: Array, weights: Array) -> tuple[Array, Array]:
    # Weights apart for each group, so that devices meet once, after the loop.
    return (
        jnp.zeros(features.shape, jnp.float32),
        jnp.zeros((features.shape[0], *weights.shape), jnp.float32),
    )


def _add(
    plan: _Plan, found: _Gradient, slopes: Array, features: Array, weights: Array, t: Array
) -> dict[str, Array]:
    slopes = slopes.astype(plan.projection.dtype)
    dx = _write(plan, found.features, plan.projection.to_features(slopes, weights), t)
    dweights = plan.projection.to_weights(slopes, _chunk(plan, features, t))
    return {"features": dx, "weights": found.weights + dweights}


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
