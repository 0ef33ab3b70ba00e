"""Replications: several views of every row, with coupled masks (MIRROR, rotations) or levels."""

from typing import Annotated

import jax.numpy as jnp

from mdm_jax.checks import Whole, checked
from mdm_jax.draws import GRID_BITS, Draw, DrawSpec, from_grid, open_uniform
from mdm_jax.rng import stream
from mdm_jax.types import Array
from mdm_jax.variance.couplings import jitter, permuted_rows
from mdm_jax.variance.transform import Phase, VarianceTransform, replicate_views, stateless

Views = Annotated[int, Whole("[1, 1e3]", "views", "forward passes of every row")]


@checked
def repeat(views: Views = 2) -> VarianceTransform:
    """R = ``views`` views of every row at the same level, with independent noise.
    Keeps: the law of each view. Couples: nothing but the shared level. Costs: R forward passes per
    row. Removes: pattern noise A by the factor R (R times the rows would remove B and C too);
    baseline for coupled views. Bias: exact. Reference: Monte Carlo; "MIRROR" in StableDLLM's code.
    """

    def draw(key: Array, current: Draw, _spec: DrawSpec) -> Draw:
        noise = _fresh_noise(stream(key, "noise"), current.noise, views)
        return replicate_views(current, list(jnp.split(noise, views)))

    return stateless("repeat", Phase.REPLICATE, draw, views=views)


def mirror() -> VarianceTransform:
    """MIRROR: a second view of every row at the same level, with base noise ``1 - v``.
    Under Bernoulli masks at rate p the two masked sets are disjoint up to p = 1/2 and cover
    everything above, the most negative correlation possible. Fixed counts reverse the ranks.
    Keeps: the law of each view. Couples: the two views. Costs: two forward passes per row. Removes:
    pattern noise A; better than twice the rows iff |covariance of the views| > B + C. Bias: exact.
    Reference: antithetic variates; arXiv 2511.18159 (its public release draws independent masks).
    """

    def draw(_key: Array, current: Draw, _spec: DrawSpec) -> Draw:
        return replicate_views(current, [current.noise, 1.0 - current.noise])

    return stateless("mirror", Phase.REPLICATE, draw, views=2)


@checked
def rotate(views: Views = 2) -> VarianceTransform:
    """K = ``views`` views of every row at the same level; view j has the noise ``frac(v + j / K)``.

    Under Bernoulli masks at rate p every element is masked in floor(K p) or ceil(K p) views, the
    least spread possible; K = 2 has the joint law of :func:`mirror`. Under fixed counts ranks
    rotate by a random amount of mean n j / K; :func:`rotate_ranks` is sharper there.
    Keeps: the law of each view. Couples: the views of a row. Costs: K forward passes per row.
    Removes: A, for additive losses with weight 1/p up to ``frac(K p) (1 - frac(K p)) / (K p)^2`` of
    it. Bias: exact. Reference: systematic sampling over the views (Cranley and Patterson 1976).
    """

    def draw(_key: Array, current: Draw, _spec: DrawSpec) -> Draw:
        size = 2**GRID_BITS
        # In integers: a float sum beyond 1 would lose the last bit and could wrap to 0.
        index = jnp.floor(current.noise * size).astype(jnp.int32)
        shifts = ((j << GRID_BITS) // views for j in range(views))
        return replicate_views(current, [from_grid((index + shift) % size) for shift in shifts])

    return stateless("rotate", Phase.REPLICATE, draw, views=views)


@checked
def rotate_ranks(views: Views = 2) -> VarianceTransform:
    """K = ``views`` views of every row at the same level, with the noise's ranks rotated.

    The element of rank r among L gets, in view j, the noise of rank ``(r - floor(j L / K)) mod L``,
    so under fixed counts the numbers of views in which two elements are masked differ by at most 1.
    Rows whose S levels divide L rotate by segments. Of n < L eligible elements, ranks rotate by a
    random amount of mean n j / K (still exact).
    Keeps: the law of each view. Couples: a row's views; unlike :func:`rotate` also the counts of
    Bernoulli masks. Costs: K forward passes per row. Removes: A under fixed counts k, all of its
    additive part if L divides K k. Bias: exact. Reference: systematic sampling without replacement.
    """

    def draw(_key: Array, current: Draw, spec: DrawSpec) -> Draw:
        length, shape = spec.event_shape[0], current.noise.shape
        segments = spec.num_levels if length % spec.num_levels == 0 else 1
        size = length // segments
        noise = current.noise.reshape(*shape[:2], segments, size, *shape[3:])
        order = jnp.argsort(noise, axis=3)
        rank = jnp.argsort(order, axis=3)
        ordered = jnp.take_along_axis(noise, order, axis=3)

        def rotated(view: int) -> Array:
            index = (rank - view * size // views) % size
            return jnp.take_along_axis(ordered, index, axis=3).reshape(shape)

        return replicate_views(current, [rotated(j) for j in range(views)])

    return stateless("rotate_ranks", Phase.REPLICATE, draw, views=views)


@checked
def stratified_levels(views: Views = 2) -> VarianceTransform:
    """R = ``views`` views of every row, at levels stratified within the row and over the batch.

    A row gets one of B cells in each of its R strata ``[r/R, (r+1)/R)``; each of the B R cells is
    used once, strata are in random order over a row's views, and views have independent noise.
    Keeps: the law of each view of each row. Couples: the levels of a row's views, and rows. Costs:
    R forward passes per row. Removes: V_m, and the interaction V_xm of level and row between
    strata: for large R better than N R rows of one level iff B > (R - 1) C, stratified ones iff
    V_xm > (R - 1) C. Bias: exact. Reference: nested stratified sampling. ValueError if
    ``B R > 2**23``.
    """

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
            noise=_fresh_noise(stream(key, "noise"), current.noise, views),
        )

    return stateless(
        "stratified_levels", Phase.COUPLE, draw, views=views, replaces=frozenset({"u"})
    )


def _fresh_noise(key: Array, noise: Array, views: int) -> Array:
    """``noise`` [V, B, ...] followed by ``views - 1`` independent copies, [views V, B, ...]."""
    # One stream per copy, so that a row's numbers do not depend on the batch size.
    copies = (open_uniform(stream(key, f"view {i}"), noise.shape) for i in range(1, views))
    return jnp.concatenate([noise, *copies])
