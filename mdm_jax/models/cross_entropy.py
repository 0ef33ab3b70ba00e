"""The last product of a network, held back until it is known which logits are wanted.

Logits of a whole batch, [N, L, K] in float32, are the largest arrays of a training step by far, and
a loss reads them at some of the positions only. So a network may return a :class:`Readout` in
their place, of which :func:`~mdm_jax.models.position_losses` computes what a loss asks for.

Losses of single positions, computed where they are asked for and a chunk at a time.

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

What a loss will multiply the losses of single positions with, before the network has run.

A bound on tokens is a weighted sum of cross-entropies whose weights depend on the noise alone. So
they are found by differentiating the loss at a network whose cross-entropies are given, and handed
to the real one, which then computes the gradient of a chunk of logits while it has them
(:class:`mdm_jax.models.readout.ForeseenReadout`). On a CPU this saves a tenth of a step with a
vocabulary of 32000 at width 256.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import linear_call

from mdm_jax.models.products import product
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.types import Array, ModelFn, PyTree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Projection:
    """How features become logits.

    Attributes:
        tied: the weights are an embedding table [K, D] instead of a kernel [D, K].
        dtype: of the operands of the products; they accumulate in float32.
    """

    tied: bool
    dtype: Any

    def __call__(self, features: Array, weights: Array) -> Array:
        """Logits [..., K] float32 from features [..., D]."""
        return self._product("...d,kd->...k", "...d,dk->...k", features, weights)

    def to_features(self, slopes: Array, weights: Array) -> Array:
        """The transpose: [..., D] from slopes [..., K]."""
        return self._product("...k,kd->...d", "...k,dk->...d", slopes, weights)

    def to_weights(self, slopes: Array, features: Array) -> Array:
        """The transpose: [G, K, D] or [G, D, K] from slopes [G, C, K] and features [G, C, D]."""
        if self.tied:
            return self._product("gck,gcd->gkd", "", slopes, features)
        return self._product("", "gcd,gck->gdk", features, slopes)

    def _product(self, tied: str, untied: str, left: Array, right: Array) -> Array:
        return product(tied if self.tied else untied, left, right, self.dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Chunking:
    """How many logits exist at a time. It changes what a loss costs, never its value.

    Attributes:
        groups: G, the devices that rows are spread over (data times fsdp). A group is a contiguous
            part of the rows, and no position leaves its group. Where G does not divide the number
            of rows their greatest common divisor is taken.
        positions: of each group whose logits exist at a time; None chooses by the backend: 32 MiB
            of logits on CPUs, whose caches hold them, 512 MiB elsewhere, and at most an eighth of
            the positions.

    Raises:
        ValueError: for numbers below 1.
    """

    groups: int = 1
    positions: int | None = None

    def __post_init__(self):
        for name in ("groups", "positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Chunking needs {name} of at least 1, got {value}")

    def size(self, positions: int, num_tokens: int) -> int:
        """C, of a group of so many positions and of so many logits each."""
        if self.positions is not None:
            return min(self.positions, positions)
        budget = 2**25 if jax.default_backend() == "cpu" else 2**29
        return max(1, min(budget // (4 * num_tokens), -(-positions // 8)))


@pytree_dataclass
class Readout:
    """Logits as a product that is still to be taken.

    Attributes:
        features: [N, L, D] what the last layer says, float.
        weights: of the vocabulary, [K, D] or [D, K] as ``projection`` says.
        projection: see :class:`Projection`.
        chunking: see :class:`Chunking`.
    """

    features: Array
    weights: Array
    projection: Projection
    chunking: Chunking = Chunking()

    @property
    def num_tokens(self) -> int:
        """K."""
        return self.weights.shape[0 if self.projection.tied else 1]

    def logits(self) -> Array:
        """All of them, [N, L, K] float32."""
        return self.projection(self.features, self.weights)


@pytree_dataclass
class ForeseenReadout(Readout):
    """A readout of whose losses it is known what they will be multiplied with.

    Then their gradient can be computed along with them, from the same logits. It changes what a
    loss costs, never its value: gradients that come out otherwise are computed anew.

    Attributes:
        expected: [N, L] float32, in proportion to the loss's slopes with respect to those of single
            positions.
    """

    expected: Array | None = None


@pytree_dataclass
class GivenLosses(Readout):
    """Stands for a network whose losses of single positions are these, whatever is asked of it.

    Attributes:
        losses: [N, L] float32.
    """

    losses: Array | None = None


def as_logits(outputs: Array | Readout) -> Array:
    """What a network returned, as logits [N, L, K]; an array is handed back as it is."""
    return outputs.logits() if isinstance(outputs, Readout) else outputs


def finish(readout: Readout, chunking: Chunking | None) -> Array | Readout:
    """Logits, or the readout itself where a chunking says how a loss is to go through it."""
    return readout.logits() if chunking is None else dataclasses.replace(readout, chunking=chunking)


def readout_apply(model: Any, chunking: Chunking | None = None) -> Callable[..., Readout]:
    """The network for objectives: as ``model.apply``, with a readout in place of the logits.

    Block and autoregressive models take the chunking themselves (``models.block_apply``,
    ``models.causal_apply``).

    Args:
        model: a ``models.Transformer``.
        chunking: of the losses.

    Returns:
        ``apply_fn(params, inputs [N, L], logsnr, documents, estimate=None) -> Readout``.
    """
    chosen = Chunking() if chunking is None else chunking

    def apply_fn(params: PyTree, *inputs: Array | None, **further: Array) -> Readout:
        return finish(model.apply(params, *inputs, **further, method="readout"), chosen)

    return apply_fn


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


def foreseeing(model_fn: ModelFn, loss: Callable[[ModelFn], Array]) -> ModelFn:
    """``model_fn`` whose readouts know what ``loss`` will do with them.

    Args:
        model_fn: a network; one that returns logits is handed back as it is, as is every network
            of a loss that calls it several times.
        loss: scalar loss of a network. Where its slopes depend on the network's losses it is as
            right as ever, but takes a third longer over the last product.
    """
    asked: list[Readout] = []

    def blank(*inputs: Array) -> Readout:
        asked.append(jax.eval_shape(model_fn, *inputs))
        return _zeros(asked[0])

    jax.eval_shape(lambda: loss(blank))
    if len(asked) != 1 or not isinstance(asked[0], Readout):
        return model_fn

    def given(losses: Array) -> Array:
        return loss(lambda *_: GivenLosses(**_fields(_zeros(asked[0])), losses=losses))

    places = jnp.zeros(asked[0].features.shape[:-1], jnp.float32)
    expected = jax.lax.stop_gradient(jax.grad(given)(places))
    return lambda *inputs: ForeseenReadout(**_fields(model_fn(*inputs)), expected=expected)


def _zeros(outputs: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), outputs)


def _fields(readout: Readout) -> dict[str, Any]:
    return {field.name: getattr(readout, field.name) for field in dataclasses.fields(Readout)}
