"""Stratified (jittered) quantiles over the global batch."""

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import GRID_BITS, Draw, DrawSpec, from_grid
from mdm_jax.streams import stream
from mdm_jax.typing import Array
from mdm_jax.variance.transform import Phase, VarianceTransform, stateless


def stratified() -> VarianceTransform:
    """One jittered quantile per cell of width 1/B: ``u_i = (pi(i) + xi_i) / B``.

    ``pi`` is a random permutation of the rows, so every row is uniform whatever order the data
    come in; without it row i would sit in cell i forever. Levels of one row use independent
    permutations and stay independent of each other.

    Keeps: the law of each row. Couples: rows, through the permutation. Costs: one view.
    Removes: the main effect of the level, V_m, up to O(B^-3); not the pattern noise A, nor the
    interaction of level and row. Bias: exact.
    Reference: proportional stratified sampling; called "antithetic sampling" in MDLM, BD3-LM and
    Duo, which leave out the permutation. Paired antithetic draws (u, 1 - u) are something else.
    """

    def draw(key: Array, current: Draw, spec: DrawSpec) -> Draw:
        rows, levels = spec.batch_size, spec.num_levels
        edges = _cell_edges(rows)
        cells = jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, levels))
        cells = jax.random.permutation(stream(key, "cells"), cells, axis=0, independent=True)
        index = jax.random.randint(
            stream(key, "jitter"), cells.shape, edges[cells], edges[cells + 1]
        )
        return current._replace(u=from_grid(index)[None])

    return stateless("stratified", Phase.COUPLE, draw, replaces=frozenset({"u"}))


def _cell_edges(rows: int) -> Array:
    # In integers, so that no cell is lost to rounding; int64 needs NumPy.
    return jnp.asarray((np.arange(rows + 1, dtype=np.int64) << GRID_BITS) // rows, jnp.int32)
