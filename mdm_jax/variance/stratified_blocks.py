"""Levels stratified over all blocks of all rows together."""

import jax
import jax.numpy as jnp

from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.streams import stream
from mdm_jax.typing import Array
from mdm_jax.variance.cells import jitter, permuted_rows
from mdm_jax.variance.transform import EmptyState, Phase, VarianceTransform, stateless


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
