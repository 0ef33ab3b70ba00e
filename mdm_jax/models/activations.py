"""Where activations lie on a device mesh: named axes, which mean nothing where there is no mesh.

Names are those of parameters (``heads``, ``mlp``) and ``batch``, the rows of a global batch. What
mesh axis a name stands for is said by rules such as ``training.LOGICAL_RULES``.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mdm_jax.typing import Array


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
