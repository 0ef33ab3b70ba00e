"""Couplings of the level: variances against closed forms, and exact cell counts."""

import functools

import jax
import numpy as np
import pytest
import toy_oracle as oracle
import zoo

from mdm_jax import variance
from mdm_jax.draws import DrawSpec

EPS = 1e-3
NUM_DRAWS = 20_000


def levels(transform, batch_size, count=NUM_DRAWS, seed=0, num_levels=1):
    """Quantiles of independent batches, [count, V, B, S] float64."""
    spec = DrawSpec(batch_size, num_levels, (1,))
    keys = jax.random.split(jax.random.key(seed), count)
    draw = functools.partial(
        variance.draw_batch, transform=transform, state=transform.init(spec), spec=spec
    )
    return np.asarray(zoo.quick(jax.vmap(lambda key: draw(key).u))(keys), np.float64)


def toy_mean(u):
    """gbar at the quantile u of rates uniform on [eps, 1]: a cubic in u, through its values."""
    places = np.linspace(0, 1, 4)
    values = oracle.level_moments(1 - (1 - EPS) * places)[1]
    return np.polyval(np.polyfit(places, values, 3), u)


def strata_variance(cells):
    """Mean over equal cells of the variance of gbar inside."""
    u, du = oracle.gauss(np.linspace(0, 1, cells + 1), 8)
    g, du = toy_mean(u).reshape(cells, -1), du.reshape(cells, -1) * cells
    return np.mean((g**2 * du).sum(1) - (g * du).sum(1) ** 2)


def systematic_variance(rows):
    """Variance over the offset of the mean over the lattice."""
    u, du = oracle.gauss([0, 1 / rows], 12)
    means = toy_mean(u + np.arange(rows)[:, None] / rows).mean(0)
    return rows * (du @ means**2 - rows * (du @ means) ** 2)


def antithetic_variance(rows):
    u, du = oracle.gauss([0, 1], 12)
    pair = (toy_mean(u) + toy_mean(1 - u)) / 2
    return (du @ pair**2 - (du @ pair) ** 2) / (rows // 2)


EXPECTED = {
    ("identity", 4): (strata_variance(1) / 4, 0.01699663),
    ("stratified", 4): (strata_variance(4) / 4, 0.00109767),
    ("systematic", 4): (systematic_variance(4), 0.00420886),
    ("antithetic_pairs", 4): (antithetic_variance(4), 0.00031028),
    ("stratified", 8): (strata_variance(8) / 8, 1.37429507e-4),
    ("systematic", 8): (systematic_variance(8), 1.051710565e-3),
    # Two strata of four rows; eight cells, four rows with one level in each half.
    ("coarse_strata", 8): (strata_variance(2) / 8, None),
    ("stratified_levels", 4): (strata_variance(8) / 8, 1.37429507e-4),
}


LARGER_BATCHES = (("stratified", 8), ("systematic", 8))
"""Of couplings that have another size, too."""


@pytest.mark.parametrize(
    "name, rows",
    [pytest.param(*case, marks=[pytest.mark.slow] * (case in LARGER_BATCHES)) for case in EXPECTED],
)
def test_variance_of_the_batch_mean_on_the_toy(name, rows):
    """Var of the mean of gbar: closed form against known values, draws against the closed form.

    The standard error of the variance comes from the draws' fourth moments.
    """
    exact, known = EXPECTED[name, rows]
    if known is not None:
        np.testing.assert_allclose(exact, known, rtol=2e-5)
    mean = toy_mean(levels(getattr(variance, name)(), rows)[..., 0]).mean((1, 2))
    squares = (mean - mean.mean()) ** 2
    error = squares.std(ddof=1) / NUM_DRAWS**0.5
    assert abs(squares.mean() - exact) < 5 * error


def test_asymptotics():
    """(1/12 B^3) int g'^2 for jittered cells, (g(1) - g(0))^2 / 12 B^2 for one offset."""
    u, du = oracle.gauss(np.linspace(0, 1, 9), 4)
    slope = (toy_mean(u + 1e-5) - toy_mean(u - 1e-5)) / 2e-5
    np.testing.assert_allclose(slope**2 @ du / (12 * 8**3), 1.37503219e-4, rtol=1e-6)
    ends = toy_mean(np.array([0.0, 1.0]))
    np.testing.assert_allclose((ends[1] - ends[0]) ** 2 / (12 * 64), 1.051542656e-3, rtol=1e-6)


def test_total_batch_variances():
    """With the toy's A, V_xm and C: strata alone change the total by 0.2 %, because A dominates."""
    rest = 31.17245380 + 0.07001818 + 0.63643119
    known = (7.98672242, 7.97082346, 7.97393465, 7.97003608)
    names = ("identity", "stratified", "systematic", "antithetic_pairs")
    for name, total in zip(names, known):
        np.testing.assert_allclose(rest / 4 + EXPECTED[name, 4][0], total, rtol=1e-7)


@pytest.mark.parametrize("rows", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 8))])
def test_antithetic_pairs(rows):
    """floor(B/2) pairs that sum to 1 exactly, a row alone if B is odd; nobody is tied for good."""
    u = levels(variance.antithetic_pairs(), rows, 600, num_levels=2)[:, 0]
    for level in range(2):
        partner = np.abs(u[:, :, None, level] + u[:, None, :, level] - 1) == 0
        np.testing.assert_array_equal(partner.sum((1, 2)), 2 * (rows // 2))
        if rows > 2:
            often = partner.mean(0)[~np.eye(rows, dtype=bool)]
            chance = 2 * (rows // 2) / (rows * (rows - 1))
            assert np.all(np.abs(often - chance) < 5 * (chance / 600) ** 0.5)
    if rows > 2:  # each level has partners of its own
        first, second = (np.abs(u[:, :, None, i] + u[:, None, :, i] - 1) == 0 for i in range(2))
        assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    "rows, cells",
    [
        (7, None),
        (5, 8),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((1, None), (7, 3), (8, 4), (6, 1))),
    ],
)
def test_coarse_strata_counts_and_marginals(rows, cells):
    """Every cell gets floor(B/J) rows or one more; every row reaches every cell equally often."""
    u = levels(variance.coarse_strata(cells), rows, 3000)[:, 0, :, 0]
    size = cells or int(rows**0.5)
    cell = np.floor(u * size).astype(int)
    counts = np.stack([(cell == j).sum(1) for j in range(size)])
    assert counts.min() >= rows // size and counts.max() <= -(-rows // size)
    for row in range(rows):
        share = np.bincount(cell[:, row], minlength=size) / 3000
        assert np.all(np.abs(share - 1 / size) < 5 * (1 / size / 3000) ** 0.5 + 1e-9)


@pytest.mark.parametrize(
    "rows, views",
    [(1, 4), (5, 3), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((5, 1), (8, 2)))],
)
def test_stratified_levels_use_every_cell_once_and_every_stratum_per_row(rows, views):
    u = levels(variance.stratified_levels(views), rows, 400, num_levels=2)
    cells = np.floor(u * rows * views + 1e-6).astype(int)  # [count, V, B, S]
    flat = np.sort(cells.reshape(400, -1, 2), axis=1)
    np.testing.assert_array_equal(
        flat, np.broadcast_to(np.arange(rows * views)[:, None], flat.shape[1:])[None].repeat(400, 0)
    )
    strata = np.sort(cells // rows, axis=1)
    np.testing.assert_array_equal(
        strata, np.broadcast_to(np.arange(views)[:, None, None], (400, views, rows, 2))
    )


def test_stratified_levels_remove_the_row_level_interaction():
    """One row's mean over R = 4 views has the variance of jittered cells, (1/R) mean within."""
    u = levels(variance.stratified_levels(4), 3)[..., 0]
    for row in range(3):
        mean = toy_mean(u[:, :, row]).mean(1)
        squares = (mean - mean.mean()) ** 2
        error = squares.std(ddof=1) / NUM_DRAWS**0.5
        assert abs(squares.mean() - strata_variance(4) / 4) < 5 * error


def test_bad_arguments():
    with pytest.raises(ValueError, match="cells must be a whole number .*, got 0"):
        variance.coarse_strata(0)
    transform, spec = variance.stratified_levels(2), DrawSpec(2**22 + 1, 1, (1,))
    with pytest.raises(ValueError, match="number of cells must be in"):
        jax.eval_shape(
            lambda key: variance.draw_batch(key, transform, transform.init(spec), spec),
            jax.random.key(0),
        )
