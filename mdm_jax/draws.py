"""The randomness of one training step, as data.

Variance transforms couple and warp a :class:`Draw`; corruptions and objectives consume it. Uniforms
are odd multiples of 2**-24 in (0, 1): ``1 - u`` is exact and quantile functions stay finite.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax import rng
from mdm_jax.types import Array, ArrayLike, PyTree

GRID_BITS = 23
"""The grid has ``2**GRID_BITS`` points; 24 significant bits are all that float32 has."""


class DrawSpec(NamedTuple):
    """Static shape of a draw.

    Attributes:
        batch_size: B, rows of the global batch (all devices, hosts and microbatches).
        num_levels: S, independent noise levels per row.
        event_shape: base noise of a row; ``(L,)`` for masks, ``(L, 2)`` for two per element.
        separate_levels: whether each level's loss depends on its own quantile and noise segment
            alone, as in block diffusion. Only then may the levels of one row be coupled.
    """

    batch_size: int
    num_levels: int
    event_shape: tuple[int, ...]
    separate_levels: bool = False


class Draw(NamedTuple):
    """All randomness of one step.

    Attributes:
        u: [V, B, S] quantile of the objective's noise law, in (0, 1).
        log_weight: [V, B, S] log importance weight; zero until ``u`` is warped.
        noise: [V, B, *event_shape] base noise of the corruption, in (0, 1).
    """

    u: Array
    log_weight: Array
    noise: Array


class LossStats(NamedTuple):
    """Per-example losses of one forward pass, unreduced, [V, B, S].

    Attributes:
        raw: sum of the losses of the target elements, nats.
        weight: the objective's factor; for uniform quantiles ``raw * weight`` is an unbiased
            estimate of the level's loss in nats.
        eligible, targets: number of eligible elements (the normaliser), and of those with a loss.
        gradient_norms: sum over targets of the squared gradient norm of the element's loss at the
            logits, up to a common factor; None if unknown.
    """

    raw: Array
    weight: Array
    eligible: Array
    targets: Array
    gradient_norms: Array | None = None


def check_spec(spec: DrawSpec) -> DrawSpec:
    """Return ``spec``; ValueError unless all sizes are positive and fit the grid."""
    if not 1 <= spec.batch_size <= 2**GRID_BITS:
        raise ValueError(f"batch_size must be in [1, 2**{GRID_BITS}], got {spec.batch_size}")
    if spec.num_levels < 1:
        raise ValueError(f"num_levels must be at least 1, got {spec.num_levels}")
    if not spec.event_shape or math.prod(spec.event_shape) < 1:
        raise ValueError(f"event_shape must name at least one element, got {spec.event_shape}")
    return spec


def from_grid(index: ArrayLike) -> Array:
    """Grid point ``(2 index + 1) / 2**24`` of an integer in [0, 2**GRID_BITS); exact, float32."""
    return (2 * jnp.asarray(index, jnp.int32) + 1).astype(jnp.float32) * 2.0 ** -(GRID_BITS + 1)


def open_uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Independent float32 uniforms on the open unit interval."""
    bits = jax.random.bits(key, shape, jnp.uint32)
    return from_grid(bits >> (32 - GRID_BITS))


def iid(key: Array, spec: DrawSpec) -> Draw:
    """One view of independent uniforms, the start of every chain.

    Element i of a row depends on the key, the row's global index and i alone.
    """
    check_spec(spec)
    levels = (1, spec.batch_size, spec.num_levels)
    return Draw(
        u=open_uniform(rng.stream(key, "level"), levels),
        log_weight=jnp.zeros(levels, jnp.float32),
        noise=open_uniform(rng.stream(key, "noise"), (1, spec.batch_size, *spec.event_shape)),
    )


def by_example(key: Array, example_keys: Array, spec: DrawSpec) -> Draw:
    """As :func:`iid`, but a token's noise goes with its example, whatever slot that has.

    The noise of a token is a function of ``key`` and its two words alone, so it does not depend on
    the batch, its size, its other rows, the devices, or what an example is packed with. A row's
    levels are keyed by its first example (:func:`row_words`). ``example_keys``: [B, L, 2], as of
    :class:`~mdm_jax.types.KeyedBatch`, with B of ``spec`` and at least its number of elements (that
    of next tokens has one, unread); ValueError for other shapes.
    """
    check_spec(spec)
    rows, length = spec.batch_size, spec.event_shape[0]
    example_keys = example_keys[:, :length]
    if example_keys.shape != (rows, length, 2):
        raise ValueError(
            f"example_keys must be {(rows, length, 2)} for this spec, got {example_keys.shape}"
        )
    level, noise = rng.stream(key, "level"), rng.stream(key, "noise")
    u = _by_words(level, row_words(example_keys), (spec.num_levels,))[None]
    return Draw(
        u=u,
        log_weight=jnp.zeros(u.shape, jnp.float32),
        noise=_by_words(noise, example_keys, spec.event_shape[1:])[None],
    )


def row_words(example_keys: Array) -> Array:
    """Words [B, 2] of each row's first example, of ``KeyedBatch.example_keys``: no position."""
    return example_keys[:, 0] & jnp.array([[0xFFFFFFFF, 0xFF000000]], jnp.uint32)


def _by_words(key: Array, words: Array, shape: tuple[int, ...]) -> Array:
    """Uniforms of ``shape`` for each pair of ``words`` [..., 2], [..., *shape]."""

    def one(pair: Array) -> Array:
        return open_uniform(jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]), shape)

    for _ in words.shape[:-1]:
        one = jax.vmap(one)
    return one(words)


def split_rows(tree: PyTree, parts: int, axis: int) -> PyTree:
    """Microbatches: split the row axis of every leaf into ``parts``, on a new leading axis.

    Part j takes rows j, j + parts, ..., so no row moves between devices; ValueError if uneven.
    """

    def split(leaf: Array) -> Array:
        rows = leaf.shape[axis]
        if rows % parts:
            raise ValueError(
                f"{parts} microbatches do not divide a batch of {rows} rows; choose a divisor"
            )
        shape = (*leaf.shape[:axis], rows // parts, parts, *leaf.shape[axis + 1 :])
        return jnp.moveaxis(leaf.reshape(shape), axis + 1, 0)

    return jax.tree.map(split, tree)


def join_rows(tree: PyTree, axis: int) -> PyTree:
    """The inverse of :func:`split_rows`."""

    def join(leaf: Array) -> Array:
        moved = jnp.moveaxis(leaf, 0, axis + 1)
        return moved.reshape(*moved.shape[:axis], -1, *moved.shape[axis + 2 :])

    return jax.tree.map(join, tree)
