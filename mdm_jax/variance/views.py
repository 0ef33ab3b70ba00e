"""Independent masks of the same row at the same level.

MIRROR: a second view with reflected noise.

Several views with the noise rotated on the circle.

Several views with the ranks of the noise rotated.

Several stratified levels of the same row.
"""

import jax.numpy as jnp

from mdm_jax.draws import GRID_BITS, Draw, DrawSpec, from_grid, open_uniform
from mdm_jax.rng import stream
from mdm_jax.types import Array
from mdm_jax.variance.couplings import jitter, permuted_rows
from mdm_jax.variance.transform import Phase, VarianceTransform, replicate_views, stateless


def repeat(views: int = 2) -> VarianceTransform:
    """R views of every row at the same level, each with independent noise.

    Keeps: the law of each view. Couples: nothing; the views of a row share its level.
    Costs: R forward passes per row. Removes: pattern noise A by the factor R, which R times the
    rows would do too, along with B and C: it is the baseline that coupled views have to beat.
    Bias: exact.
    Reference: plain Monte Carlo. The public StableDLLM release does this under the name MIRROR.

    Args:
        views: R.

    Raises:
        ValueError: if ``views`` is not positive.
    """
    check_views("repeat", views)

    def draw(key: Array, current: Draw, _spec: DrawSpec) -> Draw:
        noise = fresh_noise(stream(key, "noise"), current.noise, views)
        return replicate_views(current, list(jnp.split(noise, views)))

    return stateless("repeat", Phase.REPLICATE, draw, views=views)


def fresh_noise(key: Array, noise: Array, views: int) -> Array:
    """``noise`` [V, B, ...] followed by ``views - 1`` independent copies, [views V, B, ...].

    One stream per copy, so that a row's numbers do not depend on the batch size.
    """
    copies = (open_uniform(stream(key, f"view {i}"), noise.shape) for i in range(1, views))
    return jnp.concatenate([noise, *copies])


def check_views(name: str, views: int) -> None:
    """Raises ValueError unless ``views`` is positive."""
    if views < 1:
        raise ValueError(f"{name} needs at least 1 view, got {views}")


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
