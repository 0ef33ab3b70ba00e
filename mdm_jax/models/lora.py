"""Low-rank adapters of frozen kernels: ``x W + scale (x A) B`` (LoRA, Hu et al. 2021).

Adapters are a collection of variables beside the parameters, ``{"params": ..., "adapters": ...}``,
which every ``apply`` takes in place of the parameters; linear layers look for their own there, and
no kernel ``W + scale A B`` is made. A [in, r] and B [r, out] of a kernel lie at its path.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mdm_jax import rng
from mdm_jax.checks import Plain, Real, Whole, checked, unknown_name
from mdm_jax.models.products import product
from mdm_jax.pytrees import TRAINED
from mdm_jax.types import Array, PyTree

_FIXED = "adapter_settings"  # a collection of numbers that are not trained
COLLECTIONS = (TRAINED, _FIXED)
"""Collections that a scan over layers must split as it does the parameters."""


@checked
@dataclasses.dataclass(frozen=True)
class Lora:
    """What is adapted, and how."""

    rank: Annotated[int, Whole("[1, 1e4]", "", "r of A [in, r] and B [r, out]")] = 16
    alpha: Annotated[float, Real("(0, 1e5]", "", "adapters are scaled by alpha / rank")] = 32.0
    dropout: Annotated[float, Real("[0, 1)", "of the inputs of A", "zeroed in training")] = 0.0
    rslora: Annotated[
        bool, Plain(bool, "scale by alpha / sqrt(rank), Kalajdzievski 2023, instead")
    ] = False
    targets: Annotated[
        tuple[str, ...], Plain(str, "query, key, value, out, gate, up, down; (): all", several=True)
    ] = ()

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def kernels(
    params: PyTree, spec: Lora, elsewhere: Mapping[str, str] | None = None
) -> dict[tuple[str, ...], Any]:
    """Kernels of ``params`` that are adapted, by path; leaves may be linen's boxes, or shapes.

    All but the output projection can be. ValueError for unknown targets (``elsewhere``: names of
    others and what they are here), and a rank above the smaller side of a kernel.
    """
    flat = traverse_util.flatten_dict(params["params"])
    able = {p: leaf for p, leaf in flat.items() if p[-1] == "kernel" and p[0] != "head"}
    known = {path[-2] for path in able}
    for target in spec.targets:
        if target not in known:
            raise ValueError(
                f"adapter.targets: {unknown_name(target, known, 'projection', elsewhere)}"
            )
    chosen = {path: leaf for path, leaf in able.items() if path[-2] in (spec.targets or known)}
    for path, leaf in chosen.items():
        if spec.rank > (side := min(nn.meta.unbox(leaf).shape[-2:])):
            raise ValueError(
                f"adapter.rank={spec.rank} is more than the smaller side, {side}, of "
                f"{'/'.join(path)}; lower it, or leave {path[-2]} out of adapter.targets"
            )
    return chosen


def init(key: Array, params: PyTree, spec: Lora) -> PyTree:
    """New adapters ``{"adapters": ...}`` in float32, of which B is zero, boxed where ``params`` is.

    ``A ~ U(-1, 1) / sqrt(in)``, as PEFT draws it, is a function of key and layer, scanned or not.
    """
    adapters = {}
    for path, leaf in kernels(params, spec).items():
        *stack, rows, columns = nn.meta.unbox(leaf).shape
        drawn = [
            jax.random.uniform(rng.stream(key, name), (rows, spec.rank), minval=-1.0)
            for name in _layers(path, stack)
        ]
        a = jnp.stack(drawn).reshape(*stack, rows, spec.rank) * rows**-0.5
        b = jnp.zeros((*stack, spec.rank, columns), jnp.float32)
        if isinstance(leaf, nn.meta.AxisMetadata):
            *outer, inward, outward = leaf.names
            a, b = (
                leaf.replace(value=value, names=(*outer, *names))
                for value, names in ((a, (inward, None)), (b, (None, outward)))
            )
        adapters |= {(*path[:-1], "a"): a, (*path[:-1], "b"): b}
    return {TRAINED: traverse_util.unflatten_dict(adapters)}


def join(
    base: PyTree, adapters: PyTree, spec: Lora, key: Array | None = None, rows: Array | None = None
) -> PyTree:
    """Variables for ``apply``: frozen parameters ``{"params": ...}`` with their ``adapters``.

    With a ``key`` and numbers ``rows`` [N], or pairs of them [N, 2], that tell the rows of a batch
    apart, inputs are dropped out by masks that are functions of key, layer, row, view and position
    (N or N times the views are applied to).
    """
    fixed = {}
    for path, leaf in traverse_util.flatten_dict(adapters[TRAINED]).items():
        stack = leaf.shape[:-2]
        fixed[(*path[:-1], "scale")] = np.full(stack, spec.scale, np.float32)
        if key is not None and spec.dropout and path[-1] == "a":
            layers = [rng.stream(key, f"dropout/{name}") for name in _layers(path, stack)]
            keys = jax.vmap(_row_keys, (0, None))(jnp.stack(layers), rows)
            fixed[(*path[:-1], "keys")] = keys.reshape(*stack, len(rows))
            fixed[(*path[:-1], "kept")] = np.full(stack, 1 - spec.dropout, np.float32)
    return {**base, **adapters, _FIXED: traverse_util.unflatten_dict(fixed)}


def add(module: nn.Module, x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """``y + scale (x A) B`` by the adapter of a linear module, inside it; ``y`` without one."""
    if not module.has_variable(TRAINED, "a"):
        return y
    a, b = (module.get_variable(TRAINED, name) for name in "ab")
    if module.has_variable(_FIXED, "keys"):
        x = _dropped(x, *(module.get_variable(_FIXED, name) for name in ("keys", "kept")))
    h = product("...i,ir->...r", x.astype(dtype), a, dtype)
    h = h * module.get_variable(_FIXED, "scale").reshape((1,) * h.ndim)
    return y + product("...r,ro->...o", h.astype(dtype), b, dtype)


def merge(
    base: PyTree, adapters: PyTree, spec: Lora, dtype: jax.typing.DTypeLike | None = None
) -> PyTree:
    """Parameters ``{"params": ...}`` with ``W + scale A B`` in place of W: summed in float32,
    rounded to ``dtype`` (None: that of W), placed as W is."""
    flat = traverse_util.flatten_dict(base["params"])
    pairs = traverse_util.flatten_dict(adapters[TRAINED])
    for path in {path[:-1] for path in pairs}:
        kernel = flat[(*path, "kernel")]
        halves = pairs[(*path, "a")], pairs[(*path, "b")]
        merged = _merged(spec.scale, dtype or kernel.dtype, kernel, *halves)
        if not isinstance(merged, jax.core.Tracer):
            merged = jax.device_put(merged, kernel.sharding)
        flat[(*path, "kernel")] = merged
    return {**base, "params": traverse_util.unflatten_dict(flat)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _merged(scale: float, dtype: jax.typing.DTypeLike, kernel: Array, a: Array, b: Array) -> Array:
    change = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * change).astype(dtype)


def _layers(path: tuple[str, ...], stack: Iterable[int]) -> list[str]:
    """Names of the layers that an array holds; those of scanned ones are as if they were not."""
    if not stack:
        return ["/".join(path[:-1])]
    (depth,) = stack
    return [f"block_{i}/{'/'.join(path[2:-1])}" for i in range(depth)]


def _row_keys(key: Array, rows: Array) -> Array:
    """Keys [N] of ``rows`` [N] or [N, 2]."""
    keys = jnp.broadcast_to(key, len(rows))
    for words in rows.reshape(len(rows), -1).T:
        keys = jax.vmap(jax.random.fold_in)(keys, words)
    return keys


def _dropped(x: Array, keys: Array, kept: Array) -> Array:
    """``x`` [N V, ...] with a mask for each row and view by ``keys`` [N], over the share kept."""
    # What conditions all rows alike is a single one. Losses apply a network twice in a step.
    keys = jax.random.clone(keys[: len(x)])
    views = len(x) // len(keys)

    def mask(key: Array, view: Array) -> Array:  # of a shorter row: a part of that of a longer one
        return jax.random.bernoulli(jax.random.fold_in(key, view), kept, x.shape[1:])

    masks = jax.vmap(jax.vmap(mask, (None, 0)), (0, None))(keys, jnp.arange(views))
    return jnp.where(masks.reshape(x.shape), x / kept, 0.0)
