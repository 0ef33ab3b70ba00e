"""MIRROR: a second view with reflected noise."""

from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.typing import Array
from mdm_jax.variance.transform import Phase, VarianceTransform, replicate_views, stateless


def mirror() -> VarianceTransform:
    """Adds a second view of every row at the same level, with base noise ``1 - v``.

    For Bernoulli masks at rate p the two masked sets are disjoint up to p = 1/2, complementary at
    1/2, and jointly cover everything above it; their correlation is the most negative one that two
    Bernoulli(p) variables can have. Under fixed counts the reflection reverses the ranks.

    Keeps: the law of each view, since ``1 - v`` is uniform too. Couples: the two views.
    Costs: two forward passes per row. Removes: pattern noise A; at equal compute it wins over twice
    the rows iff the views' covariance, taken absolutely, exceeds B + C. Bias: exact.
    Reference: antithetic variates; MIRROR in arXiv 2511.18159, whose public release draws the
    second mask independently, which is not this method.
    """

    def draw(_key: Array, current: Draw, _spec: DrawSpec) -> Draw:
        return replicate_views(current, [current.noise, 1.0 - current.noise])

    return stateless("mirror", Phase.REPLICATE, draw, views=2)
