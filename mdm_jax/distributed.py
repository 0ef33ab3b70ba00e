"""Multi-process runs: collectives, which all processes must call at the same point. And where
programs will run."""

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.distributed import global_state
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mdm_jax.types import PyTree

ROW_AXES = ("data", "fsdp")
"""Mesh axes that shard the rows of a batch."""
VOCABULARY_AXIS = "tensor"
"""Mesh axis that shards the vocabulary of embeddings and logits."""


def is_first() -> bool:
    """Whether this is process 0, which writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process has reached the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def any_of(flag: bool) -> bool:
    """Whether ``flag`` is set in any process."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag, np.int32))))


def from_first(value: Any) -> Any:
    """Process 0's ``value``, which is plain JSON; that of other processes is ignored."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode() if is_first() else b"", np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = text if is_first() else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def from_all(value: Any) -> list[Any]:
    """Every process's ``value``, which is plain JSON."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.pad(text, (0, int(sizes.max()) - text.size))
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


_PATIENCE = 3600 * 1000
"""Milliseconds that threads wait for those of other processes; one that ends takes all with it."""


def collect(name: str, value: Any) -> list[Any] | None:
    """As :func:`from_all` in process 0, None in others, from a thread beside the steps.

    Through the coordination service: collectives of two threads would meet in any order. A
    ``name`` is used again only after a :func:`meet`.
    """
    if jax.process_count() == 1:
        return [value]
    if not is_first():
        global_state.client.key_value_set(f"{name}/{jax.process_index()}", json.dumps(value))
        return None
    values = [value]
    for other in range(1, jax.process_count()):
        key = f"{name}/{other}"
        values.append(json.loads(global_state.client.blocking_key_value_get(key, _PATIENCE)))
        global_state.client.key_value_delete(key)
    return values


def meet(name: str) -> None:
    """As :func:`barrier`, from a thread beside the steps."""
    if jax.process_count() > 1:
        global_state.client.wait_at_barrier(name, _PATIENCE)


def to_host(tree: PyTree) -> PyTree:
    """Global NumPy arrays of every leaf, however it is sharded."""

    def fetch(leaf: Any) -> np.ndarray:
        is_local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if is_local or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(fetch, tree)


def rows_of_all(read: Callable[[np.ndarray], PyTree], count: int) -> PyTree:
    """``count`` rows on every host, of which each process reads a part: ``read(numbers [n])``."""
    if jax.process_count() == 1:
        return read(np.arange(count))
    size = -(-count // jax.process_count())
    own = read(np.minimum(size * jax.process_index() + np.arange(size), count - 1))

    def join(leaf: np.ndarray) -> np.ndarray:
        rows = multihost_utils.process_allgather(np.asarray(leaf), tiled=True)
        return np.asarray(rows)[:count].astype(leaf.dtype)

    return jax.tree.map(join, own)


def spread_rows(batch: PyTree, like: PyTree) -> PyTree:
    """Shard a batch held by every process over the devices of ``like``; uneven rows are copied."""
    mesh, ways = _mesh_of(like), row_shards(like)
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    axes = tuple(axis for axis in ROW_AXES if axis in mesh.shape)

    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        values = np.asarray(leaf)
        spec = PartitionSpec(axes) if values.shape[0] % ways == 0 else PartitionSpec()
        return jax.make_array_from_callback(
            values.shape, NamedSharding(mesh, spec), lambda index: values[index]
        )

    return jax.tree.map(place, batch)


def row_shards(like: PyTree) -> int:
    """How many parts of a batch the devices of ``like`` hold."""
    mesh = _mesh_of(like)
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in ROW_AXES)


def _mesh_of(tree: PyTree) -> Mesh | None:
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def platform(mesh: jax.sharding.AbstractMesh | None = None) -> str:
    """Where what is traced will run: "cpu", "gpu" or "tpu".

    That of the mesh, whose devices need not be there; None: of that which
    :func:`~mdm_jax.sharding.sharded_apply` sets. JAX's default without a mesh.
    """
    device = (mesh or jax.sharding.get_abstract_mesh()).abstract_device
    name = jax.default_backend() if device is None else device.platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def scatter_stages(size: int) -> list[list[list[int]] | None]:
    """Groups, ``axis_index_groups``, of the stages in which the ``size`` devices of a mesh axis add
    up an array of which each gets one part (reduce-scatter); None: all devices at once.

    Of more than 8 TPUs at once, such as 4 x 4 or 2 x 2 x 4, the compiler (libtpu 0.0.42) sends all
    the whole sum. In two stages, first of devices far from each other, it sends half of that.
    Gathering is the same backwards.
    """
    near = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    if platform() != "tpu" or size <= 8 or near == 1:
        return [None]
    index = np.arange(size).reshape(-1, near)
    return [index.T.tolist(), index.tolist()]


def compute_capability() -> str:
    """That of the GPU that what is traced will run on, such as "9.0"; "" if it is not known."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    local = jax.local_devices()[0]
    if device is None or device.device_kind == local.device_kind:
        return str(getattr(local, "compute_capability", ""))
    return next((c for name, c in _CAPABILITIES.items() if name in device.device_kind), "")


_CAPABILITIES = {"A100": "8.0", "H100": "9.0", "H200": "9.0"}
"""Of GPUs that programs are compiled for without being there."""
