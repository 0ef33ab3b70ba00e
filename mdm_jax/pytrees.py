"""Frozen dataclasses that are pytrees; parts of pytrees of parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

import jax

from mdm_jax.types import PyTree

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
