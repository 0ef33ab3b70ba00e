"""Device meshes; sharding of parameters, batches and activations by logical axis names."""

import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mdm_jax.distributed import ROW_AXES, scatter_stages
from mdm_jax.types import Array, Batch, PyTree

AXES = ("data", "fsdp", "tensor")

LOGICAL_RULES = (
    ("batch", ROW_AXES),
    ("replica", "data"),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
    ("matrices", ("fsdp", "tensor")),
)
"""Logical axis of a parameter or an activation -> mesh axis, or axes, that shard it."""


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices; ValueError unless the product of the axes is their number.

    ``data``: copies, -1 for the devices left over; ``fsdp``: shards along ``embed``, which also
    split the batch; ``tensor``: shards of layers. ``devices`` None: those of this run.
    """
    given, devices = devices, jax.device_count() if devices is None else len(devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        if size < 1 and not (name == "data" and size == -1):
            raise ValueError(f"mesh axis {name!r} must be positive (or -1 for data), got {size}")
    if data == -1:
        data = devices // (fsdp * tensor)
    if data * fsdp * tensor != devices:
        raise ValueError(
            f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} does not use the "
            f"{devices} devices at hand exactly; choose sizes whose product is {devices}"
        )
    # Auto: the compiler places what is inside the step.
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=kinds, devices=given)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of rows over the data-parallel axes."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def check_batch_size(mesh: Mesh, batch_size: int, num_microbatches: int = 1) -> None:
    """Raise ValueError unless every microbatch splits evenly over the data-parallel devices."""
    if num_microbatches < 1:
        raise ValueError(
            f"num_microbatches must be at least 1, got {num_microbatches}; 1 takes the batch as a "
            "whole"
        )
    ways = _ways(mesh, ROW_AXES)
    if batch_size % (ways * num_microbatches):
        raise ValueError(
            f"a batch of {batch_size} rows in {num_microbatches} microbatches does not split over "
            f"{ways} data-parallel devices; use a multiple of {ways * num_microbatches}"
        )


def check_num_heads(mesh: Mesh, num_heads: int) -> None:
    """Raise ValueError if the tensor axis would cut through attention heads."""
    ways = mesh.shape["tensor"]
    if num_heads % ways:
        raise ValueError(
            f"{num_heads} attention heads do not split over tensor={ways}; choose a divisor of "
            f"{num_heads} for the mesh's tensor axis, or another number of heads"
        )


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Ascending indices of the global rows on this process's devices; processes may share rows."""
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in slices]))


def place_batch(batch: Batch, sharding: NamedSharding, batch_size: int | None = None) -> Batch:
    """A global batch of ``batch_size`` rows (default: all given) from this process's rows.

    ``batch`` holds the rows of :func:`local_rows` in this order; ValueError for another number.
    """
    size = len(batch.tokens) if batch_size is None else batch_size
    rows = local_rows(sharding, size)
    if len(batch.tokens) != len(rows):
        raise ValueError(
            f"this process holds {len(rows)} of {size} rows, but {len(batch.tokens)} were given"
        )

    def place(leaf: np.ndarray) -> jax.Array:
        leaf = np.asarray(leaf)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = int(np.searchsorted(rows, start))
            return leaf[first : first + stop - start]

        return jax.make_array_from_callback((size, *leaf.shape[1:]), sharding, shard)

    return jax.tree.map(place, batch)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copy every leaf to every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def abstract_sharded(
    init: Callable[[], PyTree], mesh: Mesh, rules: tuple = LOGICAL_RULES
) -> PyTree:
    """Shapes, dtypes and shardings (jax.ShapeDtypeStruct) of what ``init`` returns, uncomputed.

    Parameters, and their optimiser and EMA copies, may carry linen's logical axis names, which
    ``rules`` map to mesh axes. A dimension that its mesh axis does not divide is not sharded.
    """

    def place(node: PyTree) -> PyTree:
        names = ()
        if _is_box(node):
            names, node = node.get_partition_spec(), node.unbox()

        # What an optimiser keeps for a parameter may be empty or of another rank.
        def abstract(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            same_rank = len(names) == len(leaf.shape)
            spec = _spec(mesh, leaf.shape, names, rules) if same_rank else PartitionSpec()
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(abstract, node)

    return jax.tree.map(place, jax.eval_shape(init), is_leaf=_is_box)


def kept_whole(init: Callable[[], PyTree], mesh: Mesh, rules: tuple = LOGICAL_RULES) -> list[str]:
    """Messages on logical axes not sharded since their mesh axis does not divide them."""
    names, arrays = dict(rules), {}
    boxes = jax.tree.leaves(jax.eval_shape(init), is_leaf=_is_box)
    for box in filter(_is_box, boxes):
        axes, leaf = box.get_partition_spec(), box.unbox()
        for axis, size in zip(axes, getattr(leaf, "shape", ())):
            ways = mesh.shape.get(names.get(axis), 1)
            if size % ways:
                arrays.setdefault((axis, size, names[axis], ways), []).append(leaf)
    return [
        f"{axis} of size {size} does not divide by {name}={ways}: {len(leaves)} arrays "
        f"({sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**20:.1f} MiB) are whole "
        f"along it on every device"
        for (axis, size, name, ways), leaves in sorted(arrays.items())
    ]


def init_sharded(
    init: Callable[[], PyTree], mesh: Mesh, rules: tuple = LOGICAL_RULES
) -> tuple[PyTree, PyTree]:
    """Run ``init`` with every leaf computed where it is sharded: values and their shardings."""
    abstract = abstract_sharded(init, mesh, rules)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(lambda: nn.meta.unbox(init()), out_shardings=shardings)(), shardings


def sharded_apply(
    apply_fn: Callable[..., Array], mesh: Mesh, rules: tuple[tuple[str, object], ...]
) -> Callable[..., Array]:
    """``apply_fn`` with its activations sharded over ``mesh``, for use inside ``jit``."""

    def apply(*args, **options):
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            nn.logical_axis_rules(rules),
        ):
            return apply_fn(*args, **options)

    return apply


def constrain(x: Array, *names: str | None) -> Array:
    """Shard ``x`` by its axes' logical names; a no-op outside :func:`sharded_apply`.

    An axis named None, or that the mesh does not divide, is not sharded.
    """
    layout = _layout(x.shape, names)
    return x if layout is None else jax.lax.with_sharding_constraint(x, NamedSharding(*layout))


def constrain_like(abstract: PyTree, tree: PyTree) -> PyTree:
    """``tree`` sharded as the abstract arrays of the same structure are, inside ``jit``."""
    return jax.tree.map(
        lambda leaf, like: jax.lax.with_sharding_constraint(leaf, like.sharding), tree, abstract
    )


def map_shards(
    function: Callable[..., Array], names: tuple[tuple[str | None, ...], ...], *arrays: Array
) -> Array:
    """``function(*arrays)`` shard by shard, for kernels that the compiler cannot partition.

    ``names`` are the axis names of every array; the result is sharded like the first.
    """
    layouts = [_layout(x.shape, axes) for x, axes in zip(arrays, names)]
    if layouts[0] is None:
        return function(*arrays)
    specs = tuple(spec for _, spec in layouts)
    mapped = jax.shard_map(
        function, mesh=layouts[0][0], in_specs=specs, out_specs=specs[0], check_vma=False
    )
    return mapped(*arrays)


def gather(shard: Array, name: str, axis: int, size: int, dtype: jnp.dtype) -> Array:
    """Inside :func:`map_shards`: all shards, in ``dtype``, of an array that has ``size`` along an
    axis of this logical name. Gradients are summed over the devices in float32."""
    if shard.shape[axis] == size:
        return shard.astype(dtype)
    mesh_axis = dict(nn.get_logical_axis_rules())[name]

    @jax.custom_jvp
    def together(shard: Array) -> Array:
        return jax.lax.all_gather(shard.astype(dtype), mesh_axis, axis=axis, tiled=True)

    @together.defjvp
    def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
        tangent = tangents[0].astype(jnp.float32)
        for groups in reversed(scatter_stages(size // shard.shape[axis])):
            tangent = jax.lax.all_gather(
                tangent, mesh_axis, axis=axis, tiled=True, axis_index_groups=groups
            )
        return together(*primals), tangent.astype(dtype)

    return together(shard)


def add_shards(part: Array, name: str, here: int, size: int) -> Array:
    """Inside :func:`map_shards`: the sum of what devices computed from ``here`` of ``size`` along a
    logical axis."""
    return part if here == size else jax.lax.psum(part, dict(nn.get_logical_axis_rules())[name])


def map_stack(function: Callable[[Array], Array], stack: Array, name: str) -> Array:
    """``function(stack)`` for one that treats the members of a stack [K, ...] one by one.

    Every device has whole members, by the mesh axes of the logical ``name``; members of zeros are
    added where these do not divide K. Outside :func:`sharded_apply` it is the function alone.
    """
    rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
    axes = None if mesh.empty else dict(rules).get(name)
    ways = _ways(mesh, axes)
    if ways == 1:
        return function(stack)
    where = NamedSharding(mesh, PartitionSpec(axes))
    padding = [(0, -len(stack) % ways)] + [(0, 0)] * (stack.ndim - 1)
    placed = jax.lax.with_sharding_constraint(jnp.pad(stack, padding), where)
    return jax.lax.with_sharding_constraint(function(placed), where)[: len(stack)]


def num_shards(size: int, name: str) -> int:
    """Shards of an axis of this logical name; 1 outside :func:`sharded_apply`."""
    layout = _layout((size,), (name,))
    return 1 if layout is None else _ways(layout[0], layout[1][0])


def _is_box(node: PyTree) -> bool:
    return isinstance(node, nn.meta.AxisMetadata)


def _layout(shape: tuple[int, ...], names: tuple[str | None, ...]):
    rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
    return None if not rules or mesh.empty else (mesh, _spec(mesh, shape, names, rules))


def _spec(mesh, shape: tuple[int, ...], names: tuple, rules: tuple) -> PartitionSpec:
    """Mesh axes of logical names where they divide the shape, None elsewhere."""
    axes = nn.logical_to_mesh_axes(names, rules)
    return PartitionSpec(
        *(axis if size % _ways(mesh, axis) == 0 else None for size, axis in zip(shape, axes))
    )


def _ways(mesh, axes: str | tuple[str, ...] | None) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[axis] for axis in axes)
