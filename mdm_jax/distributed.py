"""Multi-process runs: collectives, which all processes must call at the same point. And where
programs will run."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


def to_host(tree: PyTree) -> PyTree:
    """Global NumPy arrays of every leaf, however it is sharded."""

    def fetch(leaf: Any) -> np.ndarray:
        is_local = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        if is_local or leaf.is_fully_replicated:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(fetch, tree)


def spread_rows(batch: PyTree, like: PyTree) -> PyTree:
    """Shard a batch held by every process over the devices of ``like``; uneven rows are copied."""
    mesh = _mesh_of(like)
    if mesh is None:
        return jax.tree.map(jnp.asarray, batch)
    axes = tuple(axis for axis in ROW_AXES if axis in mesh.shape)
    ways = int(np.prod([mesh.shape[axis] for axis in axes]))

    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        values = np.asarray(leaf)
        spec = PartitionSpec(axes) if values.shape[0] % ways == 0 else PartitionSpec()
        return jax.make_array_from_callback(
            values.shape, NamedSharding(mesh, spec), lambda index: values[index]
        )

    return jax.tree.map(place, batch)


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


def compute_capability() -> str:
    """That of the GPU that what is traced will run on, such as "9.0"; "" if it is not known."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    local = jax.local_devices()[0]
    if device is None or device.device_kind == local.device_kind:
        return str(getattr(local, "compute_capability", ""))
    return next((c for name, c in _CAPABILITIES.items() if name in device.device_kind), "")


_CAPABILITIES = {"A100": "8.0", "H100": "9.0", "H200": "9.0"}
"""Of GPUs that programs are compiled for without being there."""
