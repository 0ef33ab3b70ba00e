"""Moments of an optimiser stored in fewer bits: in bfloat16, or in 8 bits by logarithmic codes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mdm_jax import rng
from mdm_jax.types import Array, PyTree

SMALLEST = 4096
"""Moments of fewer numbers, and vectors, are not stored in 8 bits."""


def store_moments(
    optimizer: optax.GradientTransformation,
    first: jnp.dtype = jnp.float32,
    second: jnp.dtype = jnp.float32,
    b2: float | None = None,
) -> optax.GradientTransformation:
    """Store the moments ``mu`` and ``nu`` of an optimiser in dtypes of their own, whatever that of
    the parameters; steps work in float32.

    Optax's ``mu_dtype`` has no counterpart for second moments and decays first ones in the narrow
    dtype. A second moment falls by at most ``1 - b2`` of itself a step, which bfloat16 rounds away
    for ``b2`` near 1: it could rise but never fall. With ``b2`` given, such a ``second`` is a
    ValueError. int8 is :func:`store_in_8_bits`.
    """
    eight = [name for name, dtype in (("mu", first), ("nu", second)) if dtype == jnp.int8]
    first, second = (jnp.float32 if d == jnp.int8 else d for d in (first, second))
    lost = float(jnp.finfo(second).eps) / 2
    if b2 is not None and 1 - b2 <= lost:
        raise ValueError(
            f"second moments that decay by 1 - b2 = {1 - b2:.2g} a step cannot be stored in "
            f"{jnp.dtype(second).name}, which would round every decay away; use float32 or int8 "
            f"for them, or b2 below {1 - lost:.4f}"
        )
    wide, narrow = {"mu": jnp.float32, "nu": jnp.float32}, {"mu": first, "nu": second}

    def init(params: PyTree) -> PyTree:
        return _cast(optimizer.init(params), narrow)

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> Any:
        updates, state = optimizer.update(updates, _cast(state, wide), params)
        return updates, _cast(state, narrow)

    stored = optax.GradientTransformation(init, update)
    return store_in_8_bits(stored, eight) if eight else stored


class Codes(NamedTuple):
    """Numbers in 8 bits: codes of their shape, and the largest size along the last axis.

    Code 0 is zero. Others are powers of two, ``SIGNED`` or ``UNSIGNED`` a step, up to the largest.
    """

    codes: Array
    largest: Array


SIGNED, UNSIGNED = 1 / 6, 1 / 8
"""Octaves between codes: 127 of either sign span 21 octaves, 255 without a sign 32."""


class StoredState(NamedTuple):
    """An optimiser's state whose moments are :class:`Codes`; ``count`` updates were made."""

    count: Array
    inner: PyTree


def store_in_8_bits(
    optimizer: optax.GradientTransformation, moments: Sequence[str] = ("mu", "nu")
) -> optax.GradientTransformation:
    """Store moments of these names in 8 bits and a scale per row; steps work in float32.

    Neighbouring codes differ by 9 % ("nu", which has no sign) or 12 % ("mu"), far more than a step
    changes a moment. So codes are drawn: a number between two becomes either, with the
    number as mean, and decays are not lost. Noise is a function of the number of updates and the
    moment's name. A second moment below 2^-32 of its row's largest is stored as that, since a zero
    would make a step infinite. Scales are per row of the last axis, so that a sharded axis costs a
    maximum over its shards. Vectors and moments below :data:`SMALLEST` numbers stay as they are.
    New moments are computed twice, for that maximum and for their codes, and not held in float32.
    Muon comes to the same loss later than with float32 (``tests/unit/training/test_moments.py``).

    Reference: Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, which rounds to
    the nearest of other codes.
    """

    def init(params: PyTree) -> StoredState:
        empty, inner = jnp.zeros((), jnp.int32), optimizer.init(params)
        return StoredState(empty, _encode(inner, _scales(inner, moments), moments, empty))

    def update(updates: PyTree, state: StoredState, params: PyTree | None = None) -> Any:
        # The barrier, lest the compiler computes them once, and holds them.
        scales = _scales(optimizer.update(updates, _decoded(state.inner), params)[1], moments)
        inner, scales = jax.lax.optimization_barrier((state.inner, scales))
        updates, inner = optimizer.update(updates, _decoded(inner), params)
        count = state.count + 1
        return updates, StoredState(count, _encode(inner, scales, moments, count))

    return optax.GradientTransformation(init, update)


def largest(x: Array) -> Array:
    """The largest size along the last axis, [..., 1] float32."""
    return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1, keepdims=True)


def encode(x: Array, scale: Array, signed: bool, key: Array) -> Codes:
    """Draw codes whose mean is ``x`` [..., N], except for unsigned numbers below the lowest.

    ``scale`` is its :func:`largest`.
    """
    step, highest = (SIGNED, 127) if signed else (UNSIGNED, 255)
    share = jnp.abs(x.astype(jnp.float32)) / jnp.where(scale > 0, scale, 1.0)
    below = jnp.floor(highest + jnp.log2(jnp.maximum(share, 2.0**-126)) / step)
    below = jnp.clip(below, 0, highest - 1)
    low = jnp.where(below > 0, _share(below, step, highest), 0.0)
    part = (share - low) / (_share(below + 1, step, highest) - low)
    drawn = _uniform(key, x.shape)
    code = below + (drawn < part)
    if not signed:
        return Codes(jnp.where(share > 0, jnp.maximum(code, 1), 0).astype(jnp.uint8), scale)
    return Codes((jnp.sign(x) * code).astype(jnp.int8), scale)


def decode(stored: Codes) -> Array:
    """The numbers of codes, float32."""
    signed = stored.codes.dtype == jnp.int8
    step, highest = (SIGNED, 127) if signed else (UNSIGNED, 255)
    code = stored.codes.astype(jnp.float32)
    size = jnp.where(code == 0, 0.0, _share(jnp.abs(code), step, highest)) * stored.largest
    return jnp.sign(code) * size


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Numbers in (0, 1) that are a hash of key and position (the finaliser of MurmurHash3, twice).

    Elementwise, so they are made where they are read; those of ``jax.random`` may be stored.
    """
    first, second = jax.random.key_data(key)
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        step = jnp.uint32(stride % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * step
        stride *= shape[axis]

    def mixed(x: Array) -> Array:
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    bits = mixed(mixed(index + first) ^ second)
    return (bits >> 8).astype(jnp.float32) * 2.0**-24 + 2.0**-25


def _share(code: Array, step: float, highest: int) -> Array:
    return jnp.exp2((code - highest) * step)


def _scales(state: PyTree, moments: Sequence[str]) -> dict[str, Array]:
    """The :func:`largest` of the moments that are stored in 8 bits, by path."""
    scales: dict[str, Array] = {}

    def one(path: tuple, _: str, leaf: Array) -> Array:
        if leaf.ndim >= 2 and leaf.size >= SMALLEST:
            scales[jax.tree_util.keystr(path)] = largest(leaf)
        return leaf

    _of_moments(state, moments, one)
    return scales


def _encode(
    state: PyTree, scales: dict[str, Array], moments: Sequence[str], count: Array
) -> PyTree:
    def one(path: tuple, name: str, leaf: Array) -> Any:
        path = jax.tree_util.keystr(path)
        if path not in scales:
            return leaf
        key = rng.stream(rng.step_key(0, count), path)
        return encode(leaf, scales[path], name != "nu", key)

    return _of_moments(state, moments, one)


def _decoded(state: PyTree) -> PyTree:
    return jax.tree.map(
        lambda node: decode(node) if isinstance(node, Codes) else node,
        state,
        is_leaf=lambda node: isinstance(node, Codes),
    )


def _cast(state: PyTree, dtypes: dict[str, jnp.dtype]) -> PyTree:
    return _of_moments(state, dtypes, lambda _, name, leaf: leaf.astype(dtypes[name]))


def _of_moments(
    state: PyTree, moments: Sequence[str], change: Callable[[tuple, str, Array], Any]
) -> PyTree:
    """``change(path, name, leaf)`` of the floating-point arrays below nodes of these names."""

    def one(path: tuple, leaf: Any) -> Any:
        names = [getattr(entry, "name", None) for entry in path]
        for name in moments:
            if name in names and jnp.issubdtype(leaf.dtype, jnp.floating):
                return change(path, name, leaf)
        return leaf

    return jax.tree_util.tree_map_with_path(one, state)
