"""Jittered points in equal cells of the unit interval, in integers."""

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import GRID_BITS, from_grid
from mdm_jax.typing import Array


def jitter(key: Array, cells: Array, num_cells: int) -> Array:
    """One uniform grid point in each of the given cells, float32 of the shape of ``cells``.

    Cell j of N covers ``[j / N, (j + 1) / N)``. If the cell is uniform on {0..N-1}, the point is
    uniform on the grid up to the rounding of the cells' edges, 2**-23.

    Raises:
        ValueError: if there are more cells than grid points.
    """
    if not 1 <= num_cells <= 2**GRID_BITS:
        raise ValueError(f"the number of cells must be in [1, 2**{GRID_BITS}], got {num_cells}")
    # In integers, so that no cell is lost to rounding; int64 needs NumPy.
    edges = (np.arange(num_cells + 1, dtype=np.int64) << GRID_BITS) // num_cells
    edges = jnp.asarray(edges, jnp.int32)
    return from_grid(jax.random.randint(key, cells.shape, edges[cells], edges[cells + 1]))


def permuted_rows(key: Array, values: Array, levels: int, axis: int = 0) -> Array:
    """``values`` with a last axis of ``levels``, each level permuted along ``axis`` on its own.

    One permutation for all levels would tie the levels of a row to each other.
    """
    spread = jnp.broadcast_to(values[..., None], (*values.shape, levels))
    return jax.random.permutation(key, spread, axis=axis, independent=True)
