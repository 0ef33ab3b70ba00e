"""Token cross-entropy over large vocabularies: chunked linear cross-entropy at masked positions.

A network may return a :class:`Readout` instead of logits [N, L, K], the largest arrays of a step;
:func:`position_losses` computes a chunk of them at a time, and the gradient in the forward pass.
On a mesh whose tensor axis divides the vocabulary each device has the weights and logits of its own
tokens alone, and the devices of that axis exchange sums per position (Shoeybi et al. 2019).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mdm_jax.distributed import ROW_AXES, VOCABULARY_AXIS, platform, scatter_stages
from mdm_jax.models.products import product
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.types import Array, ArrayLike, ModelFn

PositionLoss = Callable[..., tuple[Array, Array]]
"""``loss(logits [..., K], *known [...]) -> (losses [...], gradients at the logits [..., K])``."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Projection:
    """Logits from features: weights [K, D] if ``tied``, else [D, K]; operands of ``dtype``.

    A bias [K] is added if not None. Logits of the ids ``excluded`` are as of
    :func:`exclude_token`.
    """

    tied: bool
    dtype: Any
    excluded: tuple[int, ...] = ()

    def __call__(self, features: Array, weights: Array, bias: Array | None) -> Array:
        spec = "...d,kd->...k" if self.tied else "...d,dk->...k"
        logits = product(spec, features, weights, self.dtype)
        if bias is not None:
            logits = logits + bias.astype(jnp.float32).reshape((1,) * (logits.ndim - 1) + (-1,))
        return exclude_token(logits, *self.excluded) if self.excluded else logits

    def gradients(
        self, at_logits: Array, features: Array, weights: Array, bias: Array | None
    ) -> tuple[Array, tuple[Array, Array | None]]:
        """From [G, C, K] those of the features, [G, C, D], and of weights and bias, per group."""
        of_bias = None if bias is None else jnp.sum(at_logits, axis=1, dtype=jnp.float32)
        if self.tied:
            of_features = product("gck,kd->gcd", at_logits, weights, self.dtype)
            of_weights = product("gck,gcd->gkd", at_logits, features, self.dtype)
        else:
            of_features = product("gck,dk->gcd", at_logits, weights, self.dtype)
            of_weights = product("gcd,gck->gdk", features, at_logits, self.dtype)
        return of_features, (of_weights, of_bias)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Chunking:
    """How many logits exist at a time; changes the cost of a loss, not its value.

    ``groups`` of contiguous rows, one per device, are lowered to divide the rows. ``positions`` is
    the chunk size in a group; None: 32 MiB of a device's logits on CPUs (cache size), 512 MiB
    elsewhere, and at most an eighth of the positions. ``mesh`` is that of the groups, by which
    weights, logits and gradients are sharded; None: the one that a readout is made under, if any.
    """

    groups: int = 1
    positions: int | None = None
    mesh: jax.sharding.AbstractMesh | None = None

    def __post_init__(self):
        if self.groups < 1 or (self.positions is not None and self.positions < 1):
            raise ValueError(f"Chunking needs groups and positions of at least 1, got {self}")

    def size(self, positions: int, num_tokens: int) -> int:
        if self.positions is not None:
            return min(self.positions, positions)
        budget = 2**25 if platform(self.mesh) == "cpu" else 2**29
        here = num_tokens // (self.vocabulary_shards(num_tokens) if self.sharded else 1)
        return max(1, min(budget // (4 * here), -(-positions // 8)))

    @property
    def sharded(self) -> bool:
        """Whether there is a mesh, with one group per data-parallel device."""
        mesh = self.mesh
        return mesh is not None and self.groups == math.prod(mesh.shape[a] for a in ROW_AXES)

    def vocabulary_shards(self, num_tokens: int) -> int:
        ways = self.mesh.shape[VOCABULARY_AXIS]
        return 1 if num_tokens % ways else ways

    def place(self, array: Array, *axes: str | tuple[str, ...] | None) -> Array:
        """``array`` sharded by mesh axes, the vocabulary's where it divides; as it is without a
        mesh."""
        if not self.sharded:
            return array
        spec = [
            None if axis == VOCABULARY_AXIS and self.vocabulary_shards(size) == 1 else axis
            for axis, size in zip(axes, array.shape)
        ]
        where = NamedSharding(self.mesh, PartitionSpec(*spec))
        return jax.lax.with_sharding_constraint(array, where)


@pytree_dataclass
class Readout:
    """Logits as a product not yet taken: features [N, L, D], weights [K, D] or [D, K], bias [K].

    ``loss_weights`` [N, L] are those of :func:`with_loss_weights`, up to a common factor;
    ``losses`` [N, L] are returned instead of computed ones.
    """

    features: Array
    weights: Array
    projection: Projection
    chunking: Chunking = Chunking()
    loss_weights: Array | None = None
    losses: Array | None = None
    bias: Array | None = None

    @property
    def num_tokens(self) -> int:
        return self.weights.shape[0 if self.projection.tied else 1]

    def logits(self) -> Array:
        """All logits, [N, L, K] float32."""
        return self.projection(self.features, self.weights, self.bias)

    def chunked(self, chunking: Chunking | None) -> "Array | Readout":
        """The logits if ``chunking`` is None, else the readout with it."""
        if chunking is None:
            return self.logits()
        here = jax.sharding.get_abstract_mesh()
        mesh = chunking.mesh or (None if here.empty else here)
        return dataclasses.replace(self, chunking=dataclasses.replace(chunking, mesh=mesh))


class Deferred(NamedTuple):
    """A readout not yet computed: ``read(positions [N, C] or None) -> Readout`` of these alone.

    None: of all positions.
    """

    read: Callable[[Array | None], Readout]


def as_logits(outputs: Array | Readout | Deferred) -> Array:
    """Logits [N, L, K] of a network's outputs."""
    outputs = outputs.read(None) if isinstance(outputs, Deferred) else outputs
    return outputs.logits() if isinstance(outputs, Readout) else outputs


def readout_apply(model: Any, chunking: Chunking | None = None) -> Callable[..., Readout]:
    """The ``apply`` of a ``models.Transformer`` that returns a readout instead of logits."""
    apply = functools.partial(model.apply, method="readout")
    return lambda params, *inputs, **options: apply(params, *inputs, **options).chunked(
        chunking or Chunking()
    )


def shifted_apply(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """``apply_fn`` of a network whose outputs at i - 1 predict token i, as Dream's do.

    The first position of a document keeps its own.
    """

    def apply(
        params: Any, inputs: Array, logsnr: Any = None, documents: Any = None, **options: Any
    ) -> Array | Readout:
        outputs = apply_fn(params, inputs, logsnr, documents, **options)
        values = outputs.features if isinstance(outputs, Readout) else outputs
        shifted = jnp.concatenate([values[:, :1], values[:, :-1]], axis=1)
        if documents is not None:
            before = jnp.concatenate([documents[:, :1], documents[:, :-1]], axis=1)
            shifted = jnp.where((before == documents)[..., None], shifted, values)
        if isinstance(outputs, Readout):
            return dataclasses.replace(outputs, features=shifted)
        return shifted

    return apply


def exclude_token(logits: Array, *ids: int | None) -> Array:
    """Logits, float32 or wider, in which ``ids`` (None: no token) have probability zero."""
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    logits, lowest = logits.astype(wide), jnp.finfo(jnp.float32).min
    excluded = [token for token in ids if token is not None and token < logits.shape[-1]]
    if len(excluded) > 4:  # rows beyond the tokens of a model can be hundreds
        table = np.isin(np.arange(logits.shape[-1]), excluded)
        return jnp.where(jnp.broadcast_to(table, logits.shape), lowest, logits)
    for token in excluded:
        logits = jnp.where(_is_token(logits, token), lowest, logits)
    return logits


def without_tokens(apply_fn: Callable[..., Any], ids: Sequence[int]) -> Callable[..., Any]:
    """``apply_fn`` whose logits or readouts exclude ``ids``, for samplers that must not write them.

    E.g. padding, ``Dataset.absent_ids``: a network learns little about ids that no row holds.
    """

    def without(outputs: Array | Readout | Deferred) -> Array | Readout | Deferred:
        if isinstance(outputs, Deferred):
            return Deferred(lambda positions: without(outputs.read(positions)))
        if isinstance(outputs, Readout):
            projection = dataclasses.replace(outputs.projection, excluded=tuple(ids))
            return dataclasses.replace(outputs, projection=projection)
        return exclude_token(outputs, *ids)

    def apply(*inputs: Any, **options: Any) -> Array | Readout | Deferred:
        return without(apply_fn(*inputs, **options))

    return apply


def _is_token(logits: Array, ids: ArrayLike) -> Array:
    return lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == ids


def token_nats(
    outputs: Array | Readout, targets: Array, where: Array, mask_id: int | None
) -> Array:
    """Cross-entropy of the clean tokens in ``where``, nats, float32 [N, L]; zero elsewhere.

    The mask token, if not None, is excluded from the softmax: a clean token is never it.
    """

    def loss(logits: Array, targets: Array) -> tuple[Array, Array]:
        logits = exclude_token(logits, mask_id)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        nats = total - jnp.take_along_axis(logits, targets[..., None], axis=-1)
        return nats[..., 0], jnp.exp(logits - total) - _is_token(logits, targets[..., None])

    if isinstance(outputs, Readout):
        return position_losses(loss, outputs, where, targets)
    return jnp.where(where, loss(outputs, targets)[0], 0.0)


def position_losses(loss: PositionLoss, readout: Readout, where: Array, *known: Array) -> Array:
    """``loss`` of every position in ``where``, float32 [N, L], zero elsewhere.

    The cost follows their number. ``known`` [N, L] are the further arguments of the loss. In
    reverse mode, correct ``readout.loss_weights`` save a second pass over the chunks; forward mode
    needs ``readout.logits()``.
    """
    if readout.losses is not None:
        return jnp.where(where, readout.losses, 0.0)
    groups = math.gcd(readout.chunking.groups, where.shape[0])
    size = where.size // groups
    chunk = readout.chunking.size(size, readout.num_tokens)
    chunking = dataclasses.replace(readout.chunking, groups=groups)
    sums = functools.partial(_losses_and_gradients, loss, readout.projection, chunking, chunk)
    x, *arrays = jax.tree.map(
        lambda a: jnp.asarray(a).reshape(groups, size, *a.shape[2:]),
        (readout.features, where, readout.loss_weights, known),
    )
    head = readout.weights, readout.bias
    add = functools.partial(_add_groups, chunking, readout.projection.tied)
    return _losses(sums, add, x, head, *arrays).reshape(where.shape)


def with_loss_weights(model_fn: ModelFn, loss: Callable[[ModelFn], Array]) -> ModelFn:
    """``model_fn`` whose readouts carry per-token loss weights, computed before the forward pass.

    They are the derivatives of the loss by the tokens' losses, in which it should be linear. A
    network that returns logits, or that the loss calls repeatedly, is returned unchanged.
    """
    shapes: list[Any] = []

    def zeros(*inputs: Array, **options: Array) -> Any:
        shapes.append(jax.eval_shape(model_fn, *inputs, **options))
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[0])

    def loss_from(losses: Array) -> Array:
        return loss(lambda *inputs: dataclasses.replace(zeros(*inputs), losses=losses))

    jax.eval_shape(lambda: loss(zeros))
    if len(shapes) != 1 or not isinstance(shapes[0], Readout):
        return model_fn
    weights = jax.grad(loss_from)(jnp.zeros(shapes[0].features.shape[:-1], jnp.float32))
    return lambda *inputs: dataclasses.replace(model_fn(*inputs), loss_weights=weights)


def _place_head(
    chunking: Chunking, tied: bool, head: tuple[Array, Array | None], *lead: tuple[str, ...]
) -> tuple[Array, Array | None]:
    """Weights and bias, after the ``lead`` axes, sharded over the vocabulary alone."""
    weights, bias = head
    axes = (VOCABULARY_AXIS, None) if tied else (None, VOCABULARY_AXIS)
    placed = chunking.place(weights, *lead, *axes)
    return placed, None if bias is None else chunking.place(bias, *lead, VOCABULARY_AXIS)


_WIDEST = 2**17
"""The longest rows that the compiler for TPUs (libtpu 0.0.42) scatters; sums of longer ones it
sends to all, unless they are cut."""


def _add_groups(
    chunking: Chunking, tied: bool, gradients: tuple[Array, Array | None]
) -> tuple[Array, Array | None]:
    """Sums over groups of the gradients of weights, [G, K, D] or [G, D, K], and bias.

    Each device gets its part of the width: by :func:`scatter_stages`, since compilers may send all
    of the sum to all.
    """
    weights, bias = _place_head(chunking, tied, gradients, ROW_AXES)  # added up where they are
    bias = None if bias is None else bias.sum(axis=0)
    width, copies, parts = 1 if tied else 0, *ROW_AXES
    ways = chunking.mesh.shape[parts] if chunking.sharded else 1
    if weights.shape[1 + width] % ways or ways == 1:
        return weights.sum(axis=0), bias

    def add(one: Array) -> Array:
        total, stages = one[0], scatter_stages(ways)
        if len(stages) > 1 and total.shape[-1] > _WIDEST and total.shape[-1] % 128 == 0:
            total = total.reshape(len(total), -1, 128)
        for groups in stages:
            total = lax.psum_scatter(
                total, parts, scatter_dimension=width, axis_index_groups=groups, tiled=True
            )
        return lax.psum(total.reshape(len(total), -1), copies)

    shards = chunking.vocabulary_shards(weights.shape[2 - width])
    axes = [VOCABULARY_AXIS if shards > 1 else None] * 2
    before = PartitionSpec(ROW_AXES, *axes[:width], None, *axes[width + 1 :])
    after = PartitionSpec(*axes[:width], parts, *axes[width + 1 :])
    total = jax.shard_map(
        add, mesh=chunking.mesh, in_specs=before, out_specs=after, check_vma=False
    )(weights)
    return total, bias


def _losses_and_gradients(
    loss, projection, chunking, chunk, features, head, where, loss_weights, known
):
    """Losses [G, R]; gradients of their sum times ``loss_weights``, or () if that is None.

    ``head`` are weights and bias.
    """
    if chunking.sharded:  # gathered along the width once, not for every chunk, and narrow
        head = head[0].astype(projection.dtype), head[1]
        head = _place_head(chunking, projection.tied, head)
    of_groups = functools.partial(_place_head, chunking, projection.tied)
    order = jnp.argsort(~where, axis=1, stable=True)
    inverse = jnp.argsort(order, axis=1)
    order = jnp.pad(order, ((0, 0), (0, -where.shape[1] % chunk)))
    count = jnp.sum(where, axis=1, keepdims=True, dtype=jnp.int32)
    take = jax.vmap(lambda row, index: row[index])
    x, known = jax.tree.map(lambda a: take(a, order), (features.astype(projection.dtype), known))
    empty = [jnp.zeros(order.shape, jnp.float32)]
    if loss_weights is not None:
        used = lax.broadcasted_iota(jnp.int32, order.shape, 1) < count
        scale = jnp.where(used, take(loss_weights, order), 0.0)[..., None]
        # One weight gradient per group, so that devices communicate once, after the loop.
        per_group = jax.tree.map(lambda a: jnp.zeros((len(x), *a.shape), jnp.float32), head)
        empty += [jnp.zeros(x.shape, jnp.float32), of_groups(per_group, ROW_AXES)]

    def add_chunk(i, results):
        at = lambda a: lax.dynamic_slice_in_dim(a, i * chunk, chunk, axis=1)  # noqa: E731
        write = lambda a, new: lax.dynamic_update_slice_in_dim(a, new, i * chunk, axis=1)  # noqa: E731
        logits = chunking.place(projection(at(x), *head), ROW_AXES, None, VOCABULARY_AXIS)
        losses, at_logits = loss(logits, *map(at, known))
        if loss_weights is None:
            return [write(results[0], losses)]
        at_logits = (at_logits * at(scale)).astype(projection.dtype)
        dx, of_head = projection.gradients(at_logits, at(x), *head)
        of_head = of_groups(jax.tree.map(jnp.add, results[2], of_head), ROW_AXES)
        return [write(results[0], losses), write(results[1], dx), of_head]

    losses, *gradients = lax.fori_loop(0, jnp.max(-(-count // chunk)), add_chunk, empty)
    if gradients:
        gradients[0] = jnp.where(where[..., None], take(gradients[0], inverse), 0.0)
    return jnp.where(where, take(losses, inverse), 0.0), gradients


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(sums, add, features, head, where, loss_weights, known):
    del add, loss_weights  # losses do not depend on them
    return sums(features, head, where, None, known)[0]


def _backward(sums, add, residuals, cotangent):
    (features, head, where, loss_weights, known), gradients = residuals
    cotangent, scale = jnp.where(where, cotangent, 0.0), 1.0
    second_pass = lambda: sums(features, head, where, cotangent, known)[1]  # noqa: E731
    gradients = gradients or second_pass()
    if loss_weights is not None:
        expected = jnp.where(where, loss_weights, 0.0)
        largest = jnp.argmax(jnp.abs(expected))
        scale, divisor = (a.reshape(-1)[largest] for a in (cotangent, expected))
        scale /= jnp.where(divisor == 0, 1.0, divisor)
        fits = jnp.all(jnp.abs(cotangent - scale * expected) <= 1e-6 * jnp.abs(cotangent))
        gradients = lax.cond(fits, lambda: gradients, second_pass)
        scale = jnp.where(fits, scale, 1.0)
    dx, of_head = gradients
    of_head = jax.tree.map(lambda g, a: (scale * g).astype(a.dtype), add(of_head), head)
    return (scale * dx).astype(features.dtype), of_head, None, None, None


def _forward(sums, add, *arrays):
    del add
    losses, gradients = sums(*arrays)
    return losses, (arrays, gradients)


_losses.defvjp(_forward, _backward)
