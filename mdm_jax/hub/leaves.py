"""How parameter arrays are made of the tensors of a file, and back, shard by shard."""

import collections
import concurrent.futures
import dataclasses
import difflib
import functools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util

from mdm_jax import distributed
from mdm_jax.hub.files import FLOATS, Tensor, TensorFiles
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
    copies: Mapping[str, str] | None = None,
) -> PyTree:
    """Parameters as jax.Arrays, each shard read from the mapped file where it belongs.

    ``abstract`` is the tree of jax.ShapeDtypeStruct with shardings and the dtypes to convert to;
    ``ignored`` is a pattern of file tensors that are no parameters; ``copies`` are tensors that a
    file may hold beside the one that they equal. Beside finished shards, the host holds one in the
    making.

    ValueError, naming the tensor, if one is missing, superfluous, of another shape, not of floating
    point, or no copy; a warning for weights that are not finite.
    """
    wanted = {leaf.path: leaf for leaf in leaves}
    flat = traverse_util.flatten_dict(abstract["params"])
    if wanted.keys() != flat.keys():
        raise ValueError(
            f"leaves and parameters differ: {sorted(wanted.keys() ^ flat.keys())[:5]}; this is a "
            "fault of the family's description"
        )
    copies = {name: source for name, source in (copies or {}).items() if name in files.shapes}
    _check_names(files, wanted.values(), ignored, copies)
    _check_tensors(files, wanted.values(), {path: leaf.shape for path, leaf in flat.items()})
    for name, source in copies.items():
        if not files.are_equal(name, source):
            raise ValueError(
                f"{files.directory / files.file_of[name]}: {name} differs from {source}, but "
                "config.json ties them (tie_word_embeddings, weight_tying); set that to false to "
                f"use {name}, or take it out of the file to use {source} for both"
            )
    params, finite = {}, {}
    # Finished shards aside, host arrays are at most as large as the largest array; and few, so that
    # the memory of one is used for another: new pages cost more than reading and transposing.
    whole = {path: _host_bytes(flat[path]) for path in wanted}
    sizes = {path: 0 if _stays(leaf, flat[path]) else whole[path] for path, leaf in wanted.items()}
    most, held, queue = max(whole.values()), 0, collections.deque()
    threads = min(8, os.cpu_count() or 1)

    def finish() -> int:
        path, placed = queue.popleft()
        found = [future.result() for future in placed]
        finite[path] = all(good for _, good in found)
        arrays = [array for some, _ in found for array in some]
        params[path] = jax.make_array_from_single_device_arrays(
            flat[path].shape, flat[path].sharding, arrays
        )
        return sizes[path]

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for path, leaf in wanted.items():
            while queue and (held + sizes[path] > most or len(queue) > 2 * threads):
                held -= finish()
            held += sizes[path]
            shards = _shards(leaf, flat[path])
            reads = [pool.submit(read) for read in _reads(files, leaf, shards)]
            placed = [pool.submit(_place, leaf, shard, reads) for shard in shards]
            queue.append((path, placed))
            del shards, reads, placed
        while queue:
            finish()
    if names := [wanted[path].sources.flat[0] for path, good in finite.items() if not good]:
        warnings.warn(
            f"{files.directory}: NaN or infinite weights in {len(names)} arrays, such as "
            f"{', '.join(names[:5])}",
            stacklevel=3,
        )
    return {"params": traverse_util.unflatten_dict(params)}


def tensors_of(params: PyTree, leaves: Iterable[Leaf]) -> dict[str, Tensor]:
    """File tensors of parameters by name, in the dtypes of the parameters; reading, inverted.

    With several processes all must make them, in one order.
    """
    flat = traverse_util.flatten_dict(params["params"])
    pieces: dict[str, list[tuple[int, Leaf, tuple[int, ...]]]] = collections.defaultdict(list)
    for leaf in leaves:
        for at in np.ndindex(leaf.sources.shape):
            pieces[leaf.sources[at]].append((leaf.part[0] if leaf.part else 0, leaf, at))

    def make(parts: list[tuple[int, Leaf, tuple[int, ...]]]) -> np.ndarray:
        values = []
        for _, leaf, at in parts:
            value = distributed.to_host(flat[leaf.path][at] if at else flat[leaf.path])
            values.append(value.T if leaf.transpose else value)
        return values[0] if len(values) == 1 else np.concatenate(values)

    tensors = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        shapes = [_file_shape(leaf, flat[leaf.path].shape) for _, leaf, _ in parts]
        rows = (sum(shape[0] for shape in shapes),) if shapes[0] else ()
        dtype = flat[parts[0][1].path].dtype.name
        tensors[name] = Tensor(rows + shapes[0][1:], dtype, functools.partial(make, parts))
    return tensors


def _file_shape(leaf: Leaf, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape, or that of the part, in the file."""
    inner = tuple(shape[leaf.sources.ndim :])
    return inner[::-1] if leaf.transpose else inner


def _check_names(
    files: TensorFiles, leaves: Iterable[Leaf], ignored: str, copies: Iterable[str]
) -> None:
    needed = {name for leaf in leaves for name in leaf.sources.flat}
    extra = files.shapes.keys() - needed - set(copies)
    extra = sorted(name for name in extra if not re.fullmatch(ignored, name))
    for name in sorted(needed - files.shapes.keys()):
        near = difflib.get_close_matches(name, extra, 1)
        hint = f"; it has {near[0]}, which config.json does not ask for" if near else ""
        raise ValueError(f"{files.directory}: no tensor {name}, which config.json asks for{hint}")
    if extra:
        raise ValueError(
            f"{files.directory}: {len(extra)} tensors that config.json does not ask for, such as "
            f"{', '.join(extra[:3])}; it belongs to another model, or the family is not supported"
        )


def _check_tensors(
    files: TensorFiles, leaves: Iterable[Leaf], shapes: Mapping[tuple[str, ...], Sequence[int]]
) -> None:
    asked: dict[str, list[tuple[int, ...]]] = collections.defaultdict(list)
    for leaf in leaves:
        shape = shapes[leaf.path]
        if tuple(shape[: leaf.sources.ndim]) != leaf.sources.shape:
            raise ValueError(f"{leaf.path} is stacked as {leaf.sources.shape}, not as {shape}")
        inner = _file_shape(leaf, shape)
        if leaf.part is not None and leaf.part[1] - leaf.part[0] != inner[0]:
            raise ValueError(f"{leaf.path} has {inner[0]} rows, its part is {leaf.part}")
        for name in leaf.sources.flat:
            asked[name].append(inner)
    for name, inner in asked.items():
        where, found = files.directory / files.file_of[name], files.shapes[name]
        rows = (sum(part[0] for part in inner),) if inner[0] else ()
        if found != rows + inner[0][1:]:
            raise ValueError(
                f"{where}: {name} has shape {list(found)}, config.json asks for "
                f"{list(rows + inner[0][1:])}"
            )
        if files.dtypes[name] not in FLOATS:
            raise ValueError(
                f"{where}: {name} has dtype {files.dtypes[name]}; weights must be "
                f"{', '.join(FLOATS)} (quantised checkpoints are not supported)"
            )


def _stays(leaf: Leaf, target: jax.ShapeDtypeStruct) -> bool:
    """Whether what is read is the memory of the finished array."""
    devices = target.sharding.addressable_devices
    return not leaf.transpose and all(device.platform == "cpu" for device in devices)


def _host_bytes(target: jax.ShapeDtypeStruct) -> int:
    """Bytes of this process's shards."""
    places = target.sharding.addressable_devices_indices_map(target.shape)
    shards = len({str(index) for index in places.values()})
    shape = target.sharding.shard_shape(target.shape)
    return shards * math.prod(shape) * target.dtype.itemsize


class _Shard(NamedTuple):
    """A shard in the making: its devices, and its host array in the layout of the file.

    ``index`` is of the array's axes: those of the sources, then those of the file.
    """

    devices: list[jax.Device]
    index: tuple[slice, ...]
    values: np.ndarray


def _shards(leaf: Leaf, target: jax.ShapeDtypeStruct) -> list[_Shard]:
    """Shards of this process, each once; host memory is not touched yet."""
    stacked = leaf.sources.ndim
    holders = collections.defaultdict(list)
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        bounds = [part.indices(size)[:2] for part, size in zip(index, target.shape)]
        inner = bounds[stacked:][::-1] if leaf.transpose else bounds[stacked:]
        if leaf.part is not None:
            inner[0] = tuple(bound + leaf.part[0] for bound in inner[0])
        holders[(*bounds[:stacked], *inner)].append(device)
    shards = []
    for bounds, devices in holders.items():
        values = _aligned([stop - start for start, stop in bounds], target.dtype)
        shards.append(_Shard(devices, tuple(slice(*bound) for bound in bounds), values))
    return shards


def _reads(files: TensorFiles, leaf: Leaf, shards: list[_Shard]) -> Iterator[Callable[[], bool]]:
    """Calls that fill the shards, each from some rows of a file; whether these are finite."""
    stacked = leaf.sources.ndim
    for at in np.ndindex(leaf.sources.shape):
        parts = []  # of this source: its rows and further axes, and where they go
        for shard in shards:
            outer, inner = shard.index[:stacked], shard.index[stacked:]
            if all(part.start <= i < part.stop for i, part in zip(at, outer)):
                out = shard.values[(*(i - part.start for i, part in zip(at, outer)), ...)]
                parts.append((inner, out) if inner else ((slice(0, 1),), out.reshape(1)))
        if parts:
            first = min(inner[0].start for inner, _ in parts)
            stop = max(inner[0].stop for inner, _ in parts)
            for rows in files.chunks(leaf.sources[at], first, stop):
                yield functools.partial(_read_rows, files, leaf.sources[at], rows, parts)


def _read_rows(
    files: TensorFiles,
    name: str,
    rows: tuple[int, int],
    parts: list[tuple[tuple[slice, ...], np.ndarray]],
) -> bool:
    """Copy rows to where they belong, converted; whether all that was copied is finite."""
    finite = True
    with files.rows(name, *rows) as values:
        for inner, out in parts:
            start, stop = max(rows[0], inner[0].start), min(rows[1], inner[0].stop)
            if start < stop:
                some = values[(slice(start - rows[0], stop - rows[0]), *inner[1:])]
                out = out[start - inner[0].start : stop - inner[0].start]
                if some.dtype == out.dtype:  # NumPy copies its own dtypes faster
                    word = f"u{out.itemsize}"
                    out.view(word)[...] = some.view(word)
                else:
                    out[...] = some
                finite &= _are_finite(out)
    return finite


def _are_finite(x: np.ndarray) -> bool:
    """Whether all of an array is, by the largest bit patterns of either sign, which is fast."""
    if x.size == 0:
        return True
    signed, unsigned = (f"{kind}{x.itemsize}" for kind in "iu")
    positive, negative = np.array([[np.inf], [-np.inf]], x.dtype)
    return bool(
        x.view(signed).max() < positive.view(signed)[0]
        and x.view(unsigned).max() < negative.view(unsigned)[0]
    )


def _place(
    leaf: Leaf, shard: _Shard, reads: list[concurrent.futures.Future]
) -> tuple[list[jax.Array], bool]:
    """Arrays of the shard's devices when all is read, and whether it is finite.

    XLA transposes on the host, several times as fast as NumPy. Reads are before this in the queue.
    """
    finite, values = [read.result() for read in reads], shard.values
    if leaf.transpose:
        first = leaf.sources.ndim
        values = values.transpose(*range(first), *reversed(range(first, values.ndim)))
    return jax.block_until_ready([jax.device_put(values, d) for d in shard.devices]), all(finite)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array whose memory a CPU device takes over without a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
