"""Fewer strata than rows."""

import math

import jax
import jax.numpy as jnp

from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.streams import stream
from mdm_jax.typing import Array
from mdm_jax.variance.cells import jitter, permuted_rows
from mdm_jax.variance.transform import Phase, VarianceTransform, stateless


def coarse_strata(cells: int | None = None) -> VarianceTransform:
    """J equal cells with ``floor(B / J)`` rows each; the rows left over go to distinct random ones.

    With B cells it is :func:`stratified`, with one cell it is independent sampling.

    Keeps: the law of each row: rows are assigned to cells by a random permutation, and every cell
    is equally likely to get a row more. Couples: rows, through the assignment. Costs: one view.
    Removes: the main effect of the level V_m between cells; inside a cell it stays as it was, so
    what is left falls as J^-2 / B. Bias: exact.
    Reference: stratified sampling with proportional allocation. floor(sqrt(B)) strata, the default,
    is what a training script of the StableDLLM repository does; that it is the StraTS of
    arXiv 2511.18159 is our inference.

    Args:
        cells: J, at least 1; floor(sqrt(B)) if not given.

    Raises:
        ValueError: if ``cells`` is not positive.
    """
    if cells is not None and cells < 1:
        raise ValueError(f"coarse_strata needs at least 1 cell, got {cells}")

    def draw(key: Array, current: Draw, spec: DrawSpec) -> Draw:
        rows, levels = spec.batch_size, spec.num_levels
        num_cells = math.isqrt(rows) if cells is None else cells
        each, left_over = divmod(rows, num_cells)
        full = jnp.broadcast_to(
            jnp.tile(jnp.arange(num_cells), each)[:, None], (each * num_cells, levels)
        )
        extra = permuted_rows(stream(key, "extra"), jnp.arange(num_cells), levels)[:left_over]
        assigned = jax.random.permutation(
            stream(key, "rows"), jnp.concatenate([full, extra]), axis=0, independent=True
        )
        return current._replace(u=jitter(stream(key, "jitter"), assigned, num_cells)[None])

    return stateless("coarse_strata", Phase.COUPLE, draw, replaces=frozenset({"u"}))
