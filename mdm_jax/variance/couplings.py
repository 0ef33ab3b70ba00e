"""Couplings of rows: strata, lattices and antithetic pairs of levels; the complementary view.
They are exact: levels and noise within one (view, row) stay i.i.d. uniform.
"""

import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Whole, checked
from mdm_jax.draws import GRID_BITS, Draw, DrawSpec, from_grid, open_uniform
from mdm_jax.rng import stream
from mdm_jax.types import Array
from mdm_jax.variance.transform import EmptyState, Phase, VarianceTransform, stateless


def jitter(key: Array, cells: Array, num_cells: int) -> Array:
    """One uniform per cell ``[j/N, (j+1)/N)``, to 2**-23; ValueError unless 1 <= N <= 2**23."""
    if not 1 <= num_cells <= 2**GRID_BITS:
        raise ValueError(f"the number of cells must be in [1, 2**{GRID_BITS}], got {num_cells}")
    edges = _lattice(num_cells + 1, num_cells)
    return from_grid(jax.random.randint(key, cells.shape, edges[cells], edges[cells + 1]))


def permuted_rows(key: Array, values: Array, levels: int, axis: int = 0) -> Array:
    """``values`` [..., levels], permuted along ``axis`` independently for each level."""
    spread = jnp.broadcast_to(values[..., None], (*values.shape, levels))
    return jax.random.permutation(key, spread, axis=axis, independent=True)


def stratified() -> VarianceTransform:
    """Stratified levels: one jittered quantile per cell of width 1/B, ``u_i = (pi(i) + xi_i) / B``.
    Keeps: the law of each row. Couples: rows, by a random permutation ``pi`` per level. Costs: one
    view. Removes: the level's main effect V_m, up to O(B^-3). Bias: exact. Reference: proportional
    strata; "antithetic sampling" in MDLM, BD3-LM and Duo, without ``pi``.
    """

    def levels(key: Array, spec: DrawSpec) -> Array:
        rows = spec.batch_size
        cells = permuted_rows(stream(key, "cells"), jnp.arange(rows), spec.num_levels)
        return jitter(stream(key, "jitter"), cells, rows)

    return _new_levels("stratified", levels)


def stratified_blocks() -> VarianceTransform:
    """Stratified levels over rows and blocks: one jittered quantile per cell of width 1/(B S).

    Each block takes the B strata of width 1/B in a random order over the rows, and the S blocks in
    a stratum share its S cells at random, so a row's levels spread over all strata.
    Keeps: the law of each level of each row. Couples: rows, and levels of a row. Costs: one view.
    Removes: V_m shared by blocks, up to O((B S)^-3), and differences between them, up to O(B^-3).
    Bias: exact for the objectives accepted. Reference: sliced Latin hypercubes (Qian 2012); BD3-LM
    stratifies blocks in order. Raises: ValueError if S > 1 and the spec lacks ``separate_levels``
    (tied levels would change the law of a level's context), or B S > 2**23 in ``draw``.
    """

    def init(spec: DrawSpec) -> EmptyState:
        _check_separate(spec)
        return EmptyState()

    def levels(key: Array, spec: DrawSpec) -> Array:
        _check_separate(spec)
        rows, blocks = spec.batch_size, spec.num_levels
        strata = permuted_rows(stream(key, "strata"), jnp.arange(rows), blocks)
        order = jnp.broadcast_to(jnp.arange(blocks), (rows, blocks))
        order = jax.random.permutation(stream(key, "cells"), order, axis=1, independent=True)
        cells = strata * blocks + jnp.take_along_axis(order, strata, axis=0)
        return jitter(stream(key, "jitter"), cells, rows * blocks)

    return _new_levels("stratified_blocks", levels)._replace(init=init)


def systematic() -> VarianceTransform:
    """Lattice of levels with one random offset per level of a row: ``u_i = frac(u_0 + i / B)``.
    Keeps: the law of each row. Couples: all rows, through the offset. Costs: one view. Removes: the
    main effect of the level, up to O(B^-2) for a non-periodic loss. Bias: exact. Reference:
    systematic sampling; the low-discrepancy sampler of VDM (Kingma et al. 2021).
    """

    def levels(key: Array, spec: DrawSpec) -> Array:
        rows, size = spec.batch_size, 2**GRID_BITS
        offset = jax.random.randint(stream(key, "offset"), (1, spec.num_levels), 0, size)
        return from_grid((_lattice(rows, rows)[:, None] + offset) % size)

    return _new_levels("systematic", levels)


def antithetic_pairs() -> VarianceTransform:
    """Antithetic levels: rows in random pairs with quantiles ``u`` and ``1 - u``.
    Keeps: the law of each row. Couples: pairs of rows, drawn per level; an odd row stays alone.
    Costs: one view. Removes: the part of V_m, the level's main effect, odd about u = 1/2; the batch
    mean keeps ``(V_m / B) (1 + corr(g(u), g(1 - u)))``, so a symmetric loss is worse off. Bias:
    exact. Reference: antithetic variates (Hammersley and Morton 1956); not the "antithetic
    sampling" of MDLM, BD3-LM and Duo, see :func:`stratified`.
    """

    def levels(key: Array, spec: DrawSpec) -> Array:
        half = spec.batch_size // 2
        first = open_uniform(stream(key, "level"), (spec.batch_size - half, spec.num_levels))
        values = jnp.concatenate([first, 1.0 - first[:half]])
        return jax.random.permutation(stream(key, "pairs"), values, axis=0, independent=True)

    return _new_levels("antithetic_pairs", levels)


@checked
def coarse_strata(
    cells: Annotated[int, Whole("[1, 4194304]", "cells", "equal ones; None: root of B")]
    | None = None,
) -> VarianceTransform:
    """J equal strata with ``floor(B / J)`` rows each; left-over rows go to distinct random strata.
    Keeps: the law of each row. Couples: rows, by random assignment. Costs: one view. Removes: V_m,
    the level's main effect, between cells (the rest falls as ``J^-2 / B``). Bias: exact. Reference:
    proportional allocation; the default J = ``cells`` = floor(sqrt(B)) is from a StableDLLM script
    (by our inference StraTS, arXiv 2511.18159). ValueError unless positive.
    """

    def levels(key: Array, spec: DrawSpec) -> Array:
        num_cells = math.isqrt(spec.batch_size) if cells is None else cells
        each, left_over = divmod(spec.batch_size, num_cells)
        full = jnp.tile(jnp.arange(num_cells), each)[:, None]
        full = jnp.broadcast_to(full, (each * num_cells, spec.num_levels))
        extra = permuted_rows(stream(key, "extra"), jnp.arange(num_cells), spec.num_levels)
        assigned = jax.random.permutation(
            stream(key, "rows"),
            jnp.concatenate([full, extra[:left_over]]),
            axis=0,
            independent=True,
        )
        return jitter(stream(key, "jitter"), assigned, num_cells)

    return _new_levels("coarse_strata", levels)


def complement() -> VarianceTransform:
    """A second view of every row with the level ``1 - u`` and the noise ``1 - v``.

    For a uniform masking rate it masks what the first view left visible: Bernoulli masks predict
    every token once per pair, fixed counts have k_1 + k_2 = n + 1. Not so after a warp, or if the
    law is asymmetric about logSNR 0.
    Keeps: the law of each view. Couples: the two views, in level and noise. Costs: two forward
    passes per row. Removes: part of A and B, depending on the model; can lose to two independent
    views. Bias: exact, with a weight per view. Reference: antithetic variates over level and noise;
    LaViDa (Li et al. 2025), complementary masking. Unlike MIRROR, whose views share their level.
    """

    def draw(_key: Array, current: Draw, _spec: DrawSpec) -> Draw:
        return Draw(
            u=jnp.concatenate([current.u, 1.0 - current.u]),
            log_weight=jnp.concatenate([current.log_weight, current.log_weight]),
            noise=jnp.concatenate([current.noise, 1.0 - current.noise]),
        )

    return stateless("complement", Phase.COUPLE, draw, views=2)


def _new_levels(name: str, levels: Callable[[Array, DrawSpec], Array]) -> VarianceTransform:
    """A coupling that draws the levels anew: ``levels(key, spec) -> u [B, S]``."""

    def draw(key: Array, current: Draw, spec: DrawSpec) -> Draw:
        return current._replace(u=levels(key, spec)[None])

    return stateless(name, Phase.COUPLE, draw, replaces=frozenset({"u"}))


def _lattice(count: int, cells: int) -> Array:
    """The first ``count`` edges of equal cells, as exact integer grid indices."""
    return jnp.asarray((np.arange(count, dtype=np.int64) << GRID_BITS) // cells, jnp.int32)


def _check_separate(spec: DrawSpec) -> None:
    if spec.num_levels > 1 and not spec.separate_levels:
        raise ValueError(
            f"stratified_blocks ties the {spec.num_levels} levels of a row to each other, which is "
            "exact only where the loss of each depends on its own level and noise alone, as in "
            "objectives.block_nelbo, whose spec says so (separate_levels=True); for other "
            "objectives use stratified()"
        )
