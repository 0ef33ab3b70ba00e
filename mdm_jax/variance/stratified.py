"""Stratified (jittered) quantiles over the global batch."""

import jax.numpy as jnp

from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.streams import stream
from mdm_jax.typing import Array
from mdm_jax.variance.cells import jitter, permuted_rows
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
        rows = spec.batch_size
        cells = permuted_rows(stream(key, "cells"), jnp.arange(rows), spec.num_levels)
        return current._replace(u=jitter(stream(key, "jitter"), cells, rows)[None])

    return stateless("stratified", Phase.COUPLE, draw, replaces=frozenset({"u"}))
