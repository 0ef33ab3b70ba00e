"""Optimiser states in less memory."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mdm_jax.typing import PyTree

_MEANS, _SQUARES = "mu", "nu"


def store_moments(
    optimizer: optax.GradientTransformation,
    first: jnp.dtype = jnp.float32,
    second: jnp.dtype = jnp.float32,
    b2: float | None = None,
) -> optax.GradientTransformation:
    """Keeps the moments of an optimiser in other dtypes between steps; a step works in float32.

    Rounding to bfloat16 loses changes below 2^-9 to 2^-8 of a number. First moments change by about
    a tenth a step and hardly notice. A second moment falls by at most ``1 - b2`` of itself a step,
    so for ``b2`` near 1 it could rise but never fall again: that is refused.

    Args:
        optimizer: one whose state has fields ``mu`` and ``nu``, such as Adam and Muon.
        first: dtype of the running means of gradients, momentum included.
        second: dtype of the running means of their squares.
        b2: decay of the second moment, to check ``second`` by.

    Raises:
        ValueError: if ``second`` cannot follow a decay as slow as ``b2``.
    """
    lost = float(jnp.finfo(second).eps) / 2
    if b2 is not None and 1 - b2 <= lost:
        raise ValueError(
            f"second moments that decay by 1 - b2 = {1 - b2:.2g} a step cannot be stored in "
            f"{jnp.dtype(second).name}, which would round every decay away; use float32 for them, "
            f"or b2 below {1 - lost:.4f}"
        )
    wide = dict.fromkeys((_MEANS, _SQUARES), jnp.float32)
    narrow = {_MEANS: first, _SQUARES: second}
    if all(dtype == jnp.float32 for dtype in narrow.values()):
        return optimizer

    def init(params: PyTree) -> PyTree:
        return _cast(optimizer.init(params), narrow)

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> Any:
        updates, state = optimizer.update(updates, _cast(state, wide), params)
        return updates, _cast(state, narrow)

    return optax.GradientTransformation(init, update)


def _cast(state: PyTree, dtypes: dict[str, jnp.dtype]) -> PyTree:
    def one(path: tuple, leaf: Any) -> Any:
        names = [getattr(entry, "name", None) for entry in path]
        for name, dtype in dtypes.items():
            if name in names and jnp.issubdtype(leaf.dtype, jnp.floating):
                return leaf.astype(dtype)
        return leaf

    return jax.tree_util.tree_map_with_path(one, state)
