"""Frozen dataclasses that are pytrees; parts of pytrees of parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.types import Array, PyTree

T = TypeVar("T", bound=type)


@dataclass_transform(frozen_default=True)
def pytree_dataclass(cls: T) -> T:
    """Make ``cls`` a frozen dataclass and a pytree whose fields are its children.

    ``jax.tree_util.register_dataclass`` (jax 0.10.2) gives two classes with equally many fields
    equal structures, so ``jax.jit`` may run the code compiled for one on the other.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = tuple(field.name for field in dataclasses.fields(cls))

    def flatten(value: Any) -> tuple[tuple[PyTree, ...], type]:
        return tuple(getattr(value, name) for name in names), cls

    def flatten_with_keys(value: Any) -> tuple[tuple[tuple[Any, PyTree], ...], type]:
        return tuple((jax.tree_util.GetAttrKey(n), getattr(value, n)) for n in names), cls

    def unflatten(_: type, children: tuple[PyTree, ...]) -> Any:
        return cls(*children)

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


TRAINED = "adapters"
"""The collection that alone is trained where variables hold one (``models.lora``)."""


def trained(params: PyTree) -> PyTree:
    """The part of ``params`` that gradients are taken of: all, or the adapters of variables."""
    if isinstance(params, Mapping) and TRAINED in params:
        return {TRAINED: params[TRAINED]}
    return params


def of_trained(function: Callable[..., Any], params: PyTree) -> Callable[..., Any]:
    """``function(params, ...)`` as a function of :func:`trained` in place of ``params``."""
    if trained(params) is params:
        return function
    return lambda part, *args: function({**params, **part}, *args)


@jax.jit
def checksum(leaf: Array) -> tuple[Array, Array]:
    """Two sums modulo 2^32 of an array's bits, the second by position; the same on any mesh."""
    kind = {1: "uint8", 2: "uint16"}.get(leaf.dtype.itemsize, "uint32")
    bits = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        step = np.uint32(stride % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * step
        stride *= bits.shape[axis]
    factor = (index ^ (index >> 15)) * np.uint32(0x9E3779B1) | np.uint32(1)
    return jnp.sum(bits, dtype=jnp.uint32), jnp.sum(bits * factor, dtype=jnp.uint32)
