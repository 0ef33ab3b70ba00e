"""Device meshes and where arrays live on them.

Where activations lie on a device mesh: named axes, which mean nothing where there is no mesh.

Names are those of parameters (``heads``, ``mlp``) and ``batch``, the rows of a global batch. What
mesh axis a name stands for is said by rules such as ``training.LOGICAL_RULES``.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mdm_jax.distributed import ROW_AXES
from mdm_jax.types import Array, Batch, PyTree

AXES = ("data", "fsdp", "tensor")

LOGICAL_RULES = (
    ("batch", ROW_AXES),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("layers", None),
)
"""Logical axis of a parameter or an activation -> mesh axis, or axes, that it is cut along."""


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices with the axes ``data``, ``fsdp`` and ``tensor``.

    Args:
        data: data-parallel copies; -1 takes all devices that the other two axes leave.
        fsdp: ways in which parameters are cut along their ``embed`` axis; also splits the batch.
        tensor: ways in which layers are cut.

    Raises:
        ValueError: if the product is not the number of devices.
    """
    devices = jax.device_count()
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        if size < 1 and not (name == "data" and size == -1):
            raise ValueError(f"mesh axis {name!r} must be positive (or -1 for data), got {size}")
    rest = fsdp * tensor
    if data == -1:
        data = devices // rest
    if data * rest != devices:
        raise ValueError(
            f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} does not use the "
            f"{devices} devices at hand exactly; choose sizes whose product is {devices}"
        )
    # The compiler places what is inside the step; models stay free of sharding.
    kinds = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=kinds)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data-parallel axes, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def check_batch_size(mesh: Mesh, batch_size: int, num_microbatches: int = 1) -> None:
    """Raises ValueError unless every microbatch splits evenly over the data-parallel devices."""
    if num_microbatches < 1:
        raise ValueError(
            f"num_microbatches must be at least 1, got {num_microbatches}; 1 takes the batch as a "
            "whole"
        )
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (ways * num_microbatches):
        raise ValueError(
            f"a batch of {batch_size} rows in {num_microbatches} microbatches does not split over "
            f"{ways} data-parallel devices; use a multiple of {ways * num_microbatches}"
        )


def check_num_heads(mesh: Mesh, num_heads: int) -> None:
    """Raises ValueError if the tensor axis would cut through attention heads."""
    ways = mesh.shape["tensor"]
    if num_heads % ways:
        raise ValueError(
            f"{num_heads} attention heads do not split over tensor={ways}; choose a divisor of "
            f"{num_heads} for the mesh's tensor axis, or another number of heads"
        )


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Ascending numbers of the rows of a global batch that this process's devices hold.

    Where an axis other than those of the rows spans processes, several of them hold the same rows.
    """
    found = sharding.addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in found]))


def place_batch(batch: Batch, sharding: NamedSharding, batch_size: int | None = None) -> Batch:
    """Puts this process's rows on its devices, as its part of the global batch.

    Args:
        batch: the rows that :func:`local_rows` names, in this order.
        sharding: of the rows.
        batch_size: rows of the global batch; those of ``batch`` if not given.
    """
    size = len(batch.tokens) if batch_size is None else batch_size
    rows = local_rows(sharding, size)
    if len(batch.tokens) != len(rows):
        raise ValueError(
            f"this process holds {len(rows)} of {size} rows, but {len(batch.tokens)} were given"
        )

    def place(leaf: np.ndarray) -> jax.Array:
        leaf = np.asarray(leaf)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = int(np.searchsorted(rows, start))
            return leaf[first : first + stop - start]

        return jax.make_array_from_callback((size, *leaf.shape[1:]), sharding, part)

    return jax.tree.map(place, batch)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Every leaf whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def abstract_sharded(
    init: Callable[[], PyTree], mesh: Mesh, rules: tuple = LOGICAL_RULES
) -> PyTree:
    """Shapes, dtypes and shardings of what ``init`` returns, without computing it.

    Args:
        init: returns a pytree whose parameters may carry linen's logical axis names; optimiser and
            EMA copies carry them too, so they are cut alike.
        mesh: device mesh.
        rules: logical axis -> mesh axis.

    Returns:
        Pytree of jax.ShapeDtypeStruct without axis names. A dimension that its mesh axis does not
        divide is kept whole.
    """

    def place(node: PyTree) -> PyTree:
        axes = PartitionSpec()
        if _is_box(node):
            axes, node = nn.logical_to_mesh_axes(node.get_partition_spec(), rules), node.unbox()
        # What optimisers keep in a parameter's place may be empty or of another rank.
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape,
                leaf.dtype,
                sharding=NamedSharding(mesh, _fitting(leaf.shape, axes, mesh)),
            ),
            node,
        )

    return jax.tree.map(place, jax.eval_shape(init), is_leaf=_is_box)


def kept_whole(init: Callable[[], PyTree], mesh: Mesh, rules: tuple = LOGICAL_RULES) -> list[str]:
    """For people: which logical axes are not cut, since their mesh axis does not divide them.

    Args:
        init, mesh, rules: as for :func:`abstract_sharded`.
    """
    names, found = dict(rules), {}
    boxes = jax.tree.leaves(jax.eval_shape(init), is_leaf=_is_box)
    for box in filter(_is_box, boxes):
        axes, leaf = box.get_partition_spec(), box.unbox()
        for axis, size in zip(axes, getattr(leaf, "shape", ())):
            ways = mesh.shape.get(names.get(axis), 1)
            if size % ways:
                found.setdefault((axis, size, names[axis], ways), []).append(leaf)
    return [
        f"{axis} of size {size} does not divide by {name}={ways}: {len(leaves)} arrays "
        f"({sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 2**20:.1f} MiB) are whole "
        f"along it on every device"
        for (axis, size, name, ways), leaves in sorted(found.items())
    ]


def init_sharded(
    init: Callable[[], PyTree], mesh: Mesh, rules: tuple = LOGICAL_RULES
) -> tuple[PyTree, PyTree]:
    """Runs ``init`` so that every leaf is born where it will live.

    Args:
        init, mesh, rules: as for :func:`abstract_sharded`.

    Returns:
        (values without axis names, their shardings).
    """
    abstract = abstract_sharded(init, mesh, rules)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    values = jax.jit(lambda: nn.meta.unbox(init()), out_shardings=shardings)()
    return values, shardings


def _is_box(node: PyTree) -> bool:
    return isinstance(node, nn.meta.AxisMetadata)


def _fitting(shape: tuple[int, ...], axes: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """``axes`` where they divide ``shape``; nothing is cut that would not come out even."""
    if len(axes) != len(shape):
        return PartitionSpec()

    def fits(size: int, names: str | tuple[str, ...] | None) -> bool:
        names = (names,) if isinstance(names, str) else names or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    return PartitionSpec(*(name if fits(size, name) else None for size, name in zip(shape, axes)))


def sharded_apply(
    apply_fn: Callable[..., Array], mesh: Mesh, rules: tuple[tuple[str, object], ...]
) -> Callable[..., Array]:
    """``apply_fn`` of any network of ours, with its activations laid out over a mesh.

    Args:
        apply_fn: traced under ``jax.jit``, over arrays that live on the mesh.
        mesh: devices.
        rules: logical axis -> mesh axis, or several; ``batch`` is the axis of rows.
    """

    def apply(*args, **options):
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            nn.logical_axis_rules(rules),
        ):
            return apply_fn(*args, **options)

    return apply


def constrain(x: Array, *names: str | None) -> Array:
    """``x`` with its axes laid out as their names say; ``x`` itself outside :func:`sharded_apply`.

    An axis whose size the mesh does not divide is left whole.

    Args:
        x: an activation.
        names: a logical name per axis, None for an axis that is not cut.
    """
    layout = _layout(x.shape, names)
    if layout is None:
        return x
    mesh, spec = layout
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def on_each_part(
    function: Callable[..., Array], names: tuple[tuple[str | None, ...], ...], *arrays: Array
) -> Array:
    """``function(*arrays)``, device by device: for kernels that the compiler cannot cut itself.

    Args:
        function: of the parts of the arrays on one device; its result is cut like the first array.
        names: logical names of every array's axes, cut as by :func:`constrain`.
        arrays: the whole arrays.
    """
    layouts = [_layout(x.shape, axes) for x, axes in zip(arrays, names)]
    if layouts[0] is None:
        return function(*arrays)
    specs = tuple(spec for _, spec in layouts)
    mapped = jax.shard_map(
        function, mesh=layouts[0][0], in_specs=specs, out_specs=specs[0], check_vma=False
    )
    return mapped(*arrays)


def num_parts(size: int, name: str) -> int:
    """Into how many parts an axis of this size and name is cut; 1 outside :func:`sharded_apply`."""
    layout = _layout((size,), (name,))
    return 1 if layout is None else _ways(layout[0], layout[1][0])


def _layout(shape: tuple[int, ...], names: tuple[str | None, ...]):
    rules, mesh = nn.get_logical_axis_rules(), jax.sharding.get_abstract_mesh()
    if not rules or mesh.empty:
        return None
    axes = nn.logical_to_mesh_axes(names, rules)
    fitting = (axis if size % _ways(mesh, axis) == 0 else None for size, axis in zip(shape, axes))
    return mesh, PartitionSpec(*fitting)


def _ways(mesh, axes: str | tuple[str, ...] | None) -> int:
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[axis] for axis in axes)
