"""Level and noise reflected together."""

import jax.numpy as jnp

from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.typing import Array
from mdm_jax.variance.transform import Phase, VarianceTransform, stateless


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
