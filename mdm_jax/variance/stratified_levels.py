"""Several stratified levels of the same row."""

import jax.numpy as jnp

from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.streams import stream
from mdm_jax.typing import Array
from mdm_jax.variance.cells import jitter, permuted_rows
from mdm_jax.variance.repeat import check_views, fresh_noise
from mdm_jax.variance.transform import Phase, VarianceTransform, stateless


def stratified_levels(views: int = 2) -> VarianceTransform:
    """R views of every row, at levels stratified within the row and over the whole batch.

    The interval has B R cells. A row gets one cell in each of its R strata ``[r/R, (r+1)/R)``, and
    every cell is used by exactly one row: within stratum r the rows take the B cells in a random
    order. Which view of a row sits in which stratum is random too. Each view has noise of its own.

    Keeps: the law of each view of each row. Couples: the levels of a row's views, and rows.
    Costs: R forward passes per row.
    Removes: the main effect V_m of the level and, unlike strata over rows alone, what varies of the
    interaction V_xm of level and row between the strata of a row. For large R and N rows
    C/N + A/(N R) remains, against (A + B + C)/(N R) for N R rows with one independent level each,
    so it wins iff B > (R - 1) C; against N R *stratified* rows iff V_xm > (R - 1) C. Bias: exact.
    Reference: stratified sampling nested in rows.

    Args:
        views: R.

    Raises:
        ValueError: if ``views`` is not positive, or B R exceeds 2**23 when drawing.
    """
    check_views("stratified_levels", views)

    def draw(key: Array, current: Draw, spec: DrawSpec) -> Draw:
        rows, levels = spec.batch_size, spec.num_levels
        grid = (views, rows)
        strata = jnp.broadcast_to(jnp.arange(views)[:, None], grid)
        strata = permuted_rows(stream(key, "strata"), strata, levels, axis=0)
        order = jnp.broadcast_to(jnp.arange(rows)[None], grid)
        order = permuted_rows(stream(key, "cells"), order, levels, axis=1)
        cells = strata * rows + jnp.take_along_axis(order, strata, axis=0)
        return Draw(
            u=jitter(stream(key, "jitter"), cells, views * rows),
            log_weight=jnp.broadcast_to(current.log_weight, cells.shape),
            noise=fresh_noise(stream(key, "noise"), current.noise, views),
        )

    return stateless(
        "stratified_levels", Phase.COUPLE, draw, views=views, replaces=frozenset({"u"})
    )
