"""Antithetic pairs of rows."""

import jax
import jax.numpy as jnp

from mdm_jax.draws import Draw, DrawSpec, open_uniform
from mdm_jax.streams import stream
from mdm_jax.typing import Array
from mdm_jax.variance.transform import Phase, VarianceTransform, stateless


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
