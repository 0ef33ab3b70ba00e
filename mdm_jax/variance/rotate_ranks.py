"""Several views with the ranks of the noise rotated."""

import jax.numpy as jnp

from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.typing import Array
from mdm_jax.variance.repeat import check_views
from mdm_jax.variance.transform import Phase, VarianceTransform, replicate_views, stateless


def rotate_ranks(views: int = 2) -> VarianceTransform:
    """K views of every row at the same level; view j deals out the same numbers with ranks turned.

    The element of rank r among L gets, in view j, the noise of rank ``(r - floor(j L / K)) mod L``.
    Under fixed counts view j masks k consecutive ranks (in a circle) from floor(j L / K) on, so the
    numbers of views in which two elements are masked differ by at most one.

    A row with S levels that divide its L elements is turned segment by segment, each segment by its
    own length. Where only n < L elements are eligible, their n ranks turn too, by a random amount
    of mean n j / K: the views are then spread evenly on average, and remain exact.

    Keeps: the law of each view: given the L numbers, all their orders are equally likely, and a
    turned uniform order is uniform. Couples: the views of a row, all of which hold the same L
    numbers; Bernoulli masks therefore have the same count in every view, which :func:`rotate`
    avoids. Costs: K forward passes per row.
    Removes: pattern noise A under fixed counts, all of its additive part where K k is a multiple
    of L. Bias: exact.
    Reference: systematic sampling without replacement along a random permutation.

    Args:
        views: K.

    Raises:
        ValueError: if ``views`` is not positive.
    """
    check_views("rotate_ranks", views)

    def draw(_key: Array, current: Draw, spec: DrawSpec) -> Draw:
        length, shape = spec.event_shape[0], current.noise.shape
        parts = spec.num_levels if length % spec.num_levels == 0 else 1
        size = length // parts
        sections = current.noise.reshape(*shape[:2], parts, size, *shape[3:])
        order = jnp.argsort(sections, axis=3)
        rank = jnp.argsort(order, axis=3)
        ordered = jnp.take_along_axis(sections, order, axis=3)

        def turned(view: int) -> Array:
            index = (rank - view * size // views) % size
            return jnp.take_along_axis(ordered, index, axis=3).reshape(shape)

        return replicate_views(current, [turned(j) for j in range(views)])

    return stateless("rotate_ranks", Phase.REPLICATE, draw, views=views)
