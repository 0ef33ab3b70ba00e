"""Levels stratified over blocks and rows: occupancy, the block toy's bound and variance, refusals.

That each level alone is uniform and free of the noise is tested with the zoo.
"""

import functools

import block_toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from block_toy import BLOCK_NELBO, PROBABILITIES

from mdm_jax import corruption, objectives, variance
from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.testing import toys

ROWS, COUNT = 5, 20_000


@functools.cache
def quantiles(name, blocks, rows=ROWS, count=COUNT):
    """Levels of independent batches, [count, B, S] float64."""
    spec, transform = DrawSpec(rows, blocks, (1,), True), getattr(variance, name)()
    draw = functools.partial(variance.draw_batch, transform=transform, state=(), spec=spec)
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(zoo.quick(jax.vmap(lambda key: draw(key).u[0]))(keys), np.float64)


@pytest.mark.parametrize(
    "rows, blocks",
    [(5, 4), (1, 4), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((3, 2), (6, 1)))],
)
def test_every_cell_is_used_once_and_every_stratum_once_per_block(rows, blocks):
    u = quantiles("stratified_blocks", blocks, rows, 300)
    cells = np.floor(u * rows * blocks + 1e-6).astype(int)
    each = np.sort(cells.reshape(300, -1), axis=1)
    np.testing.assert_array_equal(each, np.tile(np.arange(rows * blocks), (300, 1)))
    strata = np.sort(cells // blocks, axis=1)
    expected = np.broadcast_to(np.arange(rows)[None, :, None], strata.shape)
    np.testing.assert_array_equal(strata, expected)


def test_the_levels_of_a_row_are_not_neighbours():
    """Two blocks of a row meet in one of B strata with probability 1/B, as independent levels do,
    and then in two different cells; 5 standard errors of a share."""
    cells = np.floor(quantiles("stratified_blocks", 2) * 2 * ROWS + 1e-6).astype(int)
    same = (cells[..., 0] // 2 == cells[..., 1] // 2).mean(0)
    assert np.all(np.abs(same - 1 / ROWS) < 5 * (1 / ROWS / COUNT) ** 0.5)
    assert np.all(cells[..., 0] != cells[..., 1])


@functools.cache
def mean_losses(block_size):
    """E[S_b / m | u] of every row and block at u = 0 and u = 1, [2, 3, blocks].

    With Bernoulli masks on blocks of two (or one) it is linear in between: each mask's loss times
    ``m^k (1 - m)^(L' - k) / m``.
    """
    losses = block_toy.block_losses(block_size)
    size = np.array([bin(mask).count("1") for mask in range(2**block_size)])
    return np.stack([losses[..., size == block_size].sum(-1), losses[..., size == 1].sum(-1)])


@pytest.mark.parametrize("block_size", [1, 2])
def test_the_expected_bound_is_the_enumerated_one(block_size):
    """Masks and data integrated exactly, only the levels are drawn; 5 standard errors."""
    blocks = toys.LENGTH // block_size
    u = quantiles("stratified_blocks", blocks)
    start, end = mean_losses(block_size)
    row = np.arange(ROWS) % 3
    bound = (start[row] + u * (end - start)[row]).sum(-1)
    error = bound.std(0) / COUNT**0.5
    expected = np.array(BLOCK_NELBO[block_size])[row]
    assert np.all(np.abs(bound.mean(0) - expected) < 5 * error + 1e-7)


def test_the_objective_s_loss_under_it():
    """Through corruption and objective, masks drawn too; 5 standard errors per row."""
    objective = objectives.block_nelbo(corruption.fixed_count(toys.MASK_ID), 2)
    spec, transform = objective.spec(3, toys.LENGTH), variance.stratified_blocks()
    apply_fn = functools.partial(block_toy.block_apply(2), toys.toy_params())

    @zoo.quick
    @jax.vmap
    def losses(key):
        draw = variance.draw_batch(key, transform, transform.init(spec), spec)
        stats = objective.loss(apply_fn, toys.toy_batch(), draw)
        return jnp.sum(stats.weight * stats.raw, axis=-1)[0]

    values = np.asarray(losses(jax.random.split(jax.random.key(1), 4000)), np.float64)
    error = values.std(0) / len(values) ** 0.5
    assert np.all(np.abs(values.mean(0) - BLOCK_NELBO[2]) < 5 * error) and np.all(error < 0.05)


def slope_variance(name, slopes, rows):
    """Variance of the batch mean of a loss with the given slope in each block's level, exactly.

    Per row and unit of 1/(12 B^2): the squares of the slopes, and for cells shared out among blocks
    their products times -(S + 1)/S^2, the covariance of draws without replacement.
    """
    own, blocks = np.sum(slopes**2), len(slopes)
    crossed = np.sum(slopes) ** 2 - own
    if name == "stratified_blocks":
        own = own - (blocks + 1) / blocks**2 * crossed
    return own / (12 * rows**3)


TOY_SLOPES = PROBABILITIES @ np.diff(mean_losses(2), axis=0)[0]


@pytest.mark.parametrize("slopes", [(1, 1), tuple(TOY_SLOPES), (1, -1), (1, 1, 1, 1), (2, 1, 0, 0)])
def test_variance_of_the_batch_mean(slopes):
    """Against the closed form and against stratified(); 5 standard errors of a variance."""
    slopes, found = np.array(slopes, float), {}
    for name in ("stratified", "stratified_blocks"):
        mean = (quantiles(name, len(slopes)) @ slopes).mean(1)
        squares = (mean - mean.mean()) ** 2
        exact = found[name] = slope_variance(name, slopes, ROWS)
        assert abs(squares.mean() - exact) < 5 * squares.std() / COUNT**0.5
    gain = found["stratified"] / found["stratified_blocks"]
    if np.ptp(slopes) == 0:
        assert gain == pytest.approx(len(slopes) ** 2)
    elif np.sum(slopes) == 0:
        assert gain == pytest.approx(1 / 1.75)  # the worst case, 1 + (S + 1) / S^2


def test_on_the_toy_the_blocks_move_against_each_other():
    """The first block's mean loss falls with its quantile and the second one's rises, so that the
    shared cells cost variance there; four like blocks gain a factor of 16."""
    first, second = TOY_SLOPES
    np.testing.assert_allclose(TOY_SLOPES, [-0.78782048, 0.45111461], rtol=1e-7)
    gain = slope_variance("stratified", TOY_SLOPES, 4)
    gain = gain / slope_variance("stratified_blocks", TOY_SLOPES, 4)
    expected = 1 / (1 - 1.5 * first * second / (first**2 + second**2))
    np.testing.assert_allclose(gain, [expected, 0.60722676], rtol=1e-7)


def test_objectives_whose_levels_see_each_other_are_refused():
    transform = variance.stratified_blocks()
    process = corruption.fixed_count(toys.MASK_ID)
    plain = objectives.masked_nelbo(process, num_levels=2).spec(3, 4)
    uniform = objectives.uniform_nelbo(3, num_levels=2).spec(3, 4)
    start = Draw(jnp.zeros((1, 3, 2)), jnp.zeros((1, 3, 2)), jnp.zeros((1, 3, 4)))
    for spec in (plain, uniform):
        for call in (
            lambda spec=spec: variance.chain(transform, variance.mirror()).init(spec),
            lambda spec=spec: transform.draw(jax.random.key(0), (), start, spec),
        ):
            with pytest.raises(ValueError, match="ties the 2 levels of a row.*block_nelbo"):
                call()
    assert objectives.block_nelbo(process, 2).spec(3, 4).separate_levels
    transform.init(plain._replace(num_levels=1))
    with pytest.raises(ValueError, match="number of cells must be in"):
        jax.eval_shape(
            lambda key: variance.draw_batch(key, transform, (), DrawSpec(2**22, 4, (1,), True)),
            jax.random.key(0),
        )
