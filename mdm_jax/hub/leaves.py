"""How parameter arrays are made of the tensors of a file, and back, shard by shard."""

import collections
import dataclasses
import difflib
import functools
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mdm_jax.hub.files import TensorFiles
from mdm_jax.types import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Leaf:
    """One parameter array and the tensors that it is made of.

    Attributes:
        path: names down the parameter tree, ("block_0", "attention", "query", "kernel").
        sources: names of file tensors, an object array; its axes are leading axes of the array:
            () for one tensor, (depth,) for scanned layers, (experts,), or both.
        transpose: the file has [out, in], the array [in, out].
        part: (start, stop) rows of axis 0 of a file tensor that holds several arrays; None: all.
    """

    path: tuple[str, ...]
    sources: np.ndarray
    transpose: bool = False
    part: tuple[int, int] | None = None


def leaf(
    path: str, sources: str | Sequence[Any], transpose: bool = False, part: Any = None
) -> Leaf:
    """A :class:`Leaf` by "a/b/c" and a name or nested lists of names."""
    return Leaf(tuple(path.split("/")), np.array(sources, object), transpose, part)


def load_params(
    files: TensorFiles,
    leaves: Iterable[Leaf],
    abstract: PyTree,
    ignored: str = "",
) -> PyTree:
    """Parameters as jax.Arrays, each shard read from the mapped file where it belongs.

    ``abstract`` is the tree of jax.ShapeDtypeStruct with shardings and the dtypes to convert to
    (``sharding.abstract_sharded``); ``ignored`` is a pattern of
    file tensors that are no parameters.
    At most the shard in the making is in memory beside the finished ones.

    ValueError, naming the tensor, if one is missing, superfluous or of another shape; a warning for
    weights that are NaN.
    """
    wanted = {leaf.path: leaf for leaf in leaves}
    flat = traverse_util.flatten_dict(abstract["params"])
    if wanted.keys() != flat.keys():
        raise ValueError(
            f"leaves and parameters differ: {sorted(wanted.keys() ^ flat.keys())[:5]}; this is a "
            "fault of the family's description"
        )
    _check_names(files, wanted.values(), ignored)
    params, spoilt = {}, {}
    for path, leaf in wanted.items():
        _check_shape(files, leaf, flat[path].shape)
        params[path] = _load(files, leaf, flat[path])
        spoilt[path] = _has_nan(params[path])
    if names := [wanted[path].sources.flat[0] for path, bad in spoilt.items() if bad]:
        warnings.warn(f"{files.directory}: NaN in {', '.join(names[:5])}", stacklevel=2)
    return {"params": traverse_util.unflatten_dict(params)}


def tensors_of(params: PyTree, leaves: Iterable[Leaf]) -> dict[str, Callable[[], np.ndarray]]:
    """File tensors of parameters by name, each made when it is called for; reading, inverted.

    With several processes all must call them, in one order.
    """
    flat = traverse_util.flatten_dict(params["params"])
    pieces: dict[str, list[tuple[int, Leaf, tuple[int, ...]]]] = collections.defaultdict(list)
    for leaf in leaves:
        for at in np.ndindex(leaf.sources.shape):
            start = leaf.part[0] if leaf.part else 0
            pieces[leaf.sources[at]].append((start, leaf, at))

    def make(parts: list[tuple[int, Leaf, tuple[int, ...]]]) -> np.ndarray:
        values = []
        for _, leaf, at in sorted(parts, key=lambda part: part[0]):
            value = _to_host(flat[leaf.path][at] if at else flat[leaf.path])
            values.append(value.T if leaf.transpose else value)
        return values[0] if len(values) == 1 else np.concatenate(values)

    return {name: functools.partial(make, parts) for name, parts in pieces.items()}


def _check_names(files: TensorFiles, leaves: Iterable[Leaf], ignored: str) -> None:
    needed = {name for leaf in leaves for name in leaf.sources.flat}
    extra = sorted(name for name in files.shapes.keys() - needed if not re.fullmatch(ignored, name))
    for name in sorted(needed - files.shapes.keys()):
        near = difflib.get_close_matches(name, extra, 1)
        hint = f"; it has {near[0]}, which the config does not ask for" if near else ""
        raise ValueError(f"{files.directory}: no tensor {name}, which config.json asks for{hint}")
    if extra:
        raise ValueError(
            f"{files.directory}: {len(extra)} tensors that config.json does not ask for, such as "
            f"{', '.join(extra[:3])}; it belongs to another model, or the family is not supported"
        )


def _check_shape(files: TensorFiles, leaf: Leaf, shape: Sequence[int]) -> None:
    expected = list(shape[leaf.sources.ndim :])
    expected = expected[::-1] if leaf.transpose else expected
    for name in leaf.sources.flat:
        found = list(files.shapes[name])
        if leaf.part is not None and found:
            found[0] = min(leaf.part[1], found[0]) - leaf.part[0]
        if found != expected:
            raise ValueError(
                f"{files.directory / files.file_of[name]}: {name} has shape "
                f"{list(files.shapes[name])}, config.json asks for {expected}"
                + (f" at rows {leaf.part}" if leaf.part else "")
            )
    if tuple(shape[: leaf.sources.ndim]) != leaf.sources.shape:
        raise ValueError(f"{leaf.path} is stacked as {leaf.sources.shape}, not as {tuple(shape)}")


def _load(files: TensorFiles, leaf: Leaf, target: jax.ShapeDtypeStruct) -> jax.Array:
    stacked, shards = leaf.sources.ndim, {}

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        index = index[::-1] if leaf.transpose else index
        if leaf.part is not None:
            start, stop, _ = index[0].indices(leaf.part[1] - leaf.part[0])
            index = (slice(start + leaf.part[0], stop + leaf.part[0]), *index[1:])
        value = files.read(name, index)
        return (value.T if leaf.transpose else value).astype(target.dtype)

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        key = str(index)  # devices that hold the same share it
        if key not in shards:
            names = np.asarray(leaf.sources[index[:stacked]], object)
            pieces = [read(name, index[stacked:]) for name in names.flat]
            whole = np.stack(pieces) if stacked else pieces[0]
            shards[key] = whole.reshape(names.shape + pieces[0].shape)
        return shards[key]

    if target.sharding is None:
        return jnp.asarray(shard((slice(None),) * len(target.shape)))
    return jax.make_array_from_callback(target.shape, target.sharding, shard)


@jax.jit
def _has_nan(x: jax.Array) -> jax.Array:
    return jnp.any(jnp.isnan(x))


def _to_host(x: jax.Array) -> np.ndarray:
    """A whole array on this host, gathered from others if need be."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
