"""Several views with the noise rotated on the circle."""

import jax.numpy as jnp

from mdm_jax.draws import GRID_BITS, Draw, DrawSpec, from_grid
from mdm_jax.typing import Array
from mdm_jax.variance.repeat import check_views
from mdm_jax.variance.transform import Phase, VarianceTransform, replicate_views, stateless


def rotate(views: int = 2) -> VarianceTransform:
    """K views of every row at the same level; view j has the noise ``frac(v + j / K)``.

    Under Bernoulli masks at rate p every element is masked in floor(K p) or ceil(K p) of the views,
    the least spread that any coupling of K views has. Two views have the joint law of
    :func:`mirror`. Under fixed counts the ranks turn by a random amount of mean n j / K; there
    :func:`rotate_ranks` is the sharper choice.

    Keeps: the law of each view: a rotated uniform is uniform. Couples: the views of a row.
    Costs: K forward passes per row. Removes: pattern noise A, of an additive loss with weight 1/p
    all but the share ``frac(K p) (1 - frac(K p)) / (K p)^2``. Bias: exact.
    Reference: systematic sampling of each element over the views (Cranley and Patterson 1976).

    Args:
        views: K.

    Raises:
        ValueError: if ``views`` is not positive.
    """
    check_views("rotate", views)

    def draw(_key: Array, current: Draw, _spec: DrawSpec) -> Draw:
        size = 2**GRID_BITS
        # In integers: a float sum beyond 1 would lose the last bit and could wrap to 0.
        index = jnp.floor(current.noise * size).astype(jnp.int32)
        shifts = ((j << GRID_BITS) // views for j in range(views))
        return replicate_views(current, [from_grid((index + shift) % size) for shift in shifts])

    return stateless("rotate", Phase.REPLICATE, draw, views=views)
