"""Jittered points in equal cells of the unit interval, in integers.

Stratified (jittered) quantiles over the global batch.

Levels stratified over all blocks of all rows together.

Systematic quantiles: one shared offset.

Antithetic pairs of rows.

Fewer strata than rows.

Level and noise reflected together.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import GRID_BITS, Draw, DrawSpec, from_grid, open_uniform
from mdm_jax.rng import stream
from mdm_jax.types import Array
from mdm_jax.variance.transform import EmptyState, Phase, VarianceTransform, stateless


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
        rows = spec.batch_size
        cells = permuted_rows(stream(key, "cells"), jnp.arange(rows), spec.num_levels)
        return current._replace(u=jitter(stream(key, "jitter"), cells, rows)[None])

    return stateless("stratified", Phase.COUPLE, draw, replaces=frozenset({"u"}))


def stratified_blocks() -> VarianceTransform:
    """One jittered quantile per cell of width 1/(B S), for B rows of S blocks.

    Every cell is used once by the whole batch, and every block still uses each of the B strata of
    width 1/B once over the rows: block b of row i gets the stratum ``pi_b(i)``, ``pi_b`` a random
    permutation, and the S blocks that meet in a stratum share its S cells out at random. So the
    levels of one row are spread as those of :func:`stratified` are, over all strata.

    Keeps: the law of each level of each row. Couples: rows, and the levels of one row (two of them
    in one stratum are never in one cell). Costs: one view. Removes: the main effect V_m of the
    level, which blocks share, up to O((B S)^-3); what differs between blocks up to O(B^-3), as
    :func:`stratified`, whose remainder is S^2 times as large where the blocks' losses depend on
    their levels alike (and by up to 1 + (S + 1)/S^2 smaller where these dependences cancel).
    Bias: exact for the objectives that it accepts.
    Reference: sliced Latin hypercubes (Qian 2012); BD3-LM stratifies over batch and blocks, too,
    but in order, so that a row's levels stay next to each other.

    Raises:
        ValueError: from ``init`` and ``draw``, if there are several levels and the spec does not
            say that they are separate (see :class:`~mdm_jax.draws.DrawSpec`): where one level's
            loss sees the tokens that another level masked, tied levels change the law of its
            context. From ``draw``, if B S exceeds 2**23.
    """

    def init(spec: DrawSpec) -> EmptyState:
        _check_separate(spec)
        return EmptyState()

    def draw(key: Array, current: Draw, spec: DrawSpec) -> Draw:
        _check_separate(spec)
        rows, blocks = spec.batch_size, spec.num_levels
        strata = permuted_rows(stream(key, "strata"), jnp.arange(rows), blocks)
        order = jnp.broadcast_to(jnp.arange(blocks), (rows, blocks))
        order = jax.random.permutation(stream(key, "cells"), order, axis=1, independent=True)
        cells = strata * blocks + jnp.take_along_axis(order, strata, axis=0)
        return current._replace(u=jitter(stream(key, "jitter"), cells, rows * blocks)[None])

    transform = stateless("stratified_blocks", Phase.COUPLE, draw, replaces=frozenset({"u"}))
    return transform._replace(init=init)


def _check_separate(spec: DrawSpec) -> None:
    if spec.num_levels > 1 and not spec.separate_levels:
        raise ValueError(
            f"stratified_blocks ties the {spec.num_levels} levels of a row to each other, which is "
            "exact only where the loss of each depends on its own level and noise alone, as in "
            "objectives.block_nelbo, whose spec says so (separate_levels=True); for other "
            "objectives use stratified()"
        )


def systematic() -> VarianceTransform:
    """A lattice with one random offset: ``u_i = frac(u_0 + i / B)`` over the global batch.

    Each of a row's levels has an offset of its own, so levels of one row stay independent.

    Keeps: the law of each row. Couples: all rows, through the offset. Costs: one view.
    Removes: most of the main effect of the level, up to O(B^-2) for a non-periodic loss; jittered
    cells (:func:`stratified`) reach O(B^-3). Bias: exact.
    Reference: systematic sampling; Kingma et al. 2021, VDM, section on the low-discrepancy sampler.
    """

    def draw(key: Array, current: Draw, spec: DrawSpec) -> Draw:
        rows, size = spec.batch_size, 2**GRID_BITS
        # In integers: exactly B distinct points for every B, which a float step does not give.
        lattice = jnp.asarray((np.arange(rows, dtype=np.int64) << GRID_BITS) // rows, jnp.int32)
        offset = jax.random.randint(stream(key, "offset"), (1, spec.num_levels), 0, size)
        return current._replace(u=from_grid((lattice[:, None] + offset) % size)[None])

    return stateless("systematic", Phase.COUPLE, draw, replaces=frozenset({"u"}))


def antithetic_pairs() -> VarianceTransform:
    """Two rows share one quantile and its reflection: ``u`` and ``1 - u``.

    Who is paired with whom is drawn anew every step, for each level of a row on its own. With an
    odd number of rows one of them, chosen at random, is left without partner.

    Keeps: the law of each row, uniform because the pairing does not look at the rows' order.
    Couples: rows in pairs. Costs: one view.
    Removes: the part of the level's main effect V_m that is odd about u = 1/2: the batch mean keeps
    ``(V_m / B) (1 + corr(g(u), g(1 - u)))``, so a monotone loss profits and a symmetric one loses.
    Bias: exact.
    Reference: antithetic variates (Hammersley and Morton 1956). What MDLM, BD3-LM and Duo call
    "antithetic sampling" is :func:`stratified` without its permutation.
    """

    def draw(key: Array, current: Draw, spec: DrawSpec) -> Draw:
        rows, levels = spec.batch_size, spec.num_levels
        half = rows // 2
        first = open_uniform(stream(key, "level"), (rows - half, levels))
        values = jnp.concatenate([first, 1.0 - first[:half]])
        paired = jax.random.permutation(stream(key, "pairs"), values, axis=0, independent=True)
        return current._replace(u=paired[None])

    return stateless("antithetic_pairs", Phase.COUPLE, draw, replaces=frozenset({"u"}))


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


def complement() -> VarianceTransform:
    """Adds a second view of every row with the level ``1 - u`` and the noise ``1 - v``.

    For a uniform masking rate m the second view masks at the rate 1 - m exactly what the first one
    left visible, so under Bernoulli masks (plain or Rao-Blackwell weights) every token is predicted
    exactly once per pair; under fixed counts k_1 + k_2 = n + 1 and one token is predicted twice.
    A warp, or a law of the objective that is not symmetric about logSNR 0, leaves the estimator
    exact and the two masks reflected, but no longer complementary.

    Keeps: the law of each view, since ``1 - u`` and ``1 - v`` are uniform too and independent.
    Couples: the two views, in level and noise. Costs: two forward passes per row.
    Removes: part of A and B, depending on the model; the sign of the covariance of the two views is
    not known in advance, and it can lose against two independent views. Bias: exact, because each
    view carries its own weight: the two have different levels.
    Reference: antithetic variates over level and noise; complementary masking in LaViDa (Li et al.
    2025). It is not MIRROR, whose two views share their level.
    """

    def draw(_key: Array, current: Draw, _spec: DrawSpec) -> Draw:
        return Draw(
            u=jnp.concatenate([current.u, 1.0 - current.u]),
            log_weight=jnp.concatenate([current.log_weight, current.log_weight]),
            noise=jnp.concatenate([current.noise, 1.0 - current.noise]),
        )

    return stateless("complement", Phase.COUPLE, draw, views=2)
