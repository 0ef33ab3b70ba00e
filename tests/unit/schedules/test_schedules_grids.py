"""Sampling grids over the logSNR."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import slow_except

from mdm_jax import draws, schedules, variance
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.schedules import grids, masked
from mdm_jax.variance.densities import piecewise_density
from mdm_jax.variance.ppots import epr_density
from mdm_jax.variance.warps import ClippedDensity

pytestmark = pytest.mark.keyless

FULL_RANGE = ["linear", "cosine_md4", "cosine_mdlm", "sqrt"]


@pytest.mark.parametrize("n", [1, 2, 7, 49, 98, 4096])
def test_uniform_masking_rate(n):
    """n + 1 levels for every n: accumulating 1/n in floats gives one more for n = 49, 98, ..."""
    grid = grids.uniform_masking_rate(n)
    assert grid.shape == (n + 1,)
    assert grid.dtype == jnp.float32
    assert grid[0] == -np.inf
    assert grid[-1] == np.inf
    rate = 1 - np.arange(n + 1) / n
    np.testing.assert_allclose(schedules.masking_rate(grid), rate, rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(schedules.survival_probability(grid), 1 - rate, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", slow_except({"cosine_md4", "sqrt"}, FULL_RANGE))
def test_from_schedule(name, n=64):
    schedule = masked.by_name(name)
    grid = grids.from_schedule(schedule, n)
    assert (grid.shape, grid.dtype) == ((n + 1,), jnp.float32)
    assert (grid[0], grid[-1]) == (-np.inf, np.inf)
    with jax.enable_x64(True):
        exact = schedule.masking_rate(1 - np.arange(n + 1) / n)
    np.testing.assert_allclose(schedules.masking_rate(grid), exact, rtol=1e-5, atol=1e-7)
    by_law = grids.from_law(schedules.law_of(schedule), n)
    np.testing.assert_allclose(by_law, grid, rtol=1e-5, atol=1e-6)


def test_one_step():
    np.testing.assert_array_equal(grids.from_schedule(masked.linear(), 1), [-np.inf, np.inf])
    np.testing.assert_array_equal(grids.from_law(schedules.uniform(-1.0, 2.0), 1), [-1, 2])


def test_bounded_schedules_keep_their_ends():
    grid = grids.from_schedule(masked.clipped(0.3, 0.8), 4)
    np.testing.assert_allclose(
        schedules.masking_rate(grid), [0.8, 0.675, 0.55, 0.425, 0.3], rtol=1e-6
    )
    opened = grids.open_ends(grid)
    np.testing.assert_array_equal(np.asarray(schedules.masking_rate(opened))[[0, -1]], [1, 0])
    np.testing.assert_array_equal(np.asarray(opened)[1:-1], np.asarray(grid)[1:-1])


def test_from_law_of_every_kind():
    for law in (
        schedules.uniform(-6.0, 4.0),
        gaussian_schedules.truncated(schedules.logistic(), -5.0, 5.0),
        schedules.piecewise([1.0, 2.0, 1.0], (-3.0, 3.0)),
    ):
        grid = grids.from_law(law, 10)
        np.testing.assert_allclose(tiny.jit(law.cdf)(grid), np.arange(11) / 10, atol=1e-6)
        np.testing.assert_allclose(np.asarray(grid)[[0, -1]], law.support)
    np.testing.assert_allclose(
        grids.from_law(schedules.uniform(-6.0, 4.0), 10), np.linspace(-6, 4, 11), atol=1e-6
    )


def test_cosine_grid():
    """Times cos(pi/2 (1 - t)): over the linear schedule that is the sine schedule of MD4."""
    grid = grids.cosine(masked.linear(), 8)
    np.testing.assert_allclose(grid, grids.from_schedule(masked.cosine_md4(), 8), rtol=1e-5)
    t = np.cos(np.pi / 2 * (np.arange(9) / 8))
    schedule = masked.cosine_mdlm()
    np.testing.assert_allclose(
        schedules.masking_rate(grids.cosine(schedule, 8)),
        schedule.masking_rate(t),
        rtol=1e-5,
        atol=1e-12,
    )
    steps = -np.diff(schedules.masking_rate(grid))
    assert np.all(np.diff(steps) > 0)  # the noisy end in the smallest steps


LEARNED = {
    "flat": piecewise_density((0.0, 1.0), (1.0,)),
    "bins": piecewise_density((0.0, 0.25, 0.5, 1.0), (1.0, 4.0, 5.0)),
    "parametric": epr_density((0.5, 2.0, 0.6, 1.5, 3.0, 1.2, 2.0), 0.1),
    "clipped": ClippedDensity(0.3, 0.8),
}


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize(
    "law",
    [schedules.logistic(), pytest.param(schedules.uniform(-5.0, 7.0), marks=pytest.mark.slow)],
    ids=repr,
)
def test_from_log_density(name, law, n=16):
    """Equal shares under the density's own distribution function; its support's ends at the ends.

    The cells are 1/4096 wide at most, and a density's edge may lie within one.
    """
    density = LEARNED[name]
    grid = grids.from_log_density(density.log_pdf, n, law)
    assert (grid.shape, grid.dtype) == ((n + 1,), jnp.float32)
    quantiles, shares = tiny.jit(lambda grid: (law.cdf(grid), density.cdf(law.cdf(grid))))(grid)
    np.testing.assert_allclose(shares, np.arange(n + 1) / n, atol=6e-4)
    np.testing.assert_allclose(np.asarray(quantiles)[[0, -1]], density.support, atol=3e-4)
    if density.support == (0, 1):
        np.testing.assert_array_equal(np.asarray(grid)[[0, -1]], law.support)


def test_from_log_density_of_what_training_learned():
    """A transform's profile; a constant does not count, a flat density is the law's own grid."""
    transform = variance.ppots(num_bins=4, warmup_steps=0)
    state = transform.init(draws.DrawSpec(4, 1, (1,)))
    state = state._replace(second=jnp.array([1.0, 4.0, 16.0, 900.0]), weight=jnp.ones(4))
    learned = tiny.jit(lambda u: transform.profile(state, u).log_density)
    grid = grids.from_log_density(learned, 12)
    shifted = grids.from_log_density(lambda u: np.asarray(learned(u)) + 90, 12)
    np.testing.assert_allclose(shifted, grid, rtol=1e-4)
    plain = grids.from_log_density(lambda u: np.zeros_like(u), 12)
    np.testing.assert_allclose(plain, grids.uniform_masking_rate(12), rtol=1e-5, atol=1e-6)
    # The more is drawn at low masking rates, the more steps go there.
    assert np.sum(schedules.masking_rate(grid) < 0.05) > np.sum(
        schedules.masking_rate(plain) < 0.05
    )


def test_from_log_density_resolves_both_ends():
    """Density 1 / (2 sqrt(u)) and its mirror image: quantiles (i / n)^2."""
    share = np.arange(9) / 8
    rising = grids.from_log_density(lambda u: -0.5 * np.log(u), 8)
    falling = grids.from_log_density(lambda u: -0.5 * np.log1p(-u), 8)
    np.testing.assert_allclose(schedules.survival_probability(rising), share**2, atol=2e-4)
    np.testing.assert_allclose(schedules.masking_rate(falling), share[::-1] ** 2, atol=2e-4)


@pytest.mark.parametrize(
    "log_density",
    [
        lambda u: np.full_like(u, -np.inf),
        lambda u: np.full_like(u, np.nan),
        lambda u: np.where(u < 0.5, np.inf, 0.0),
        lambda u: 0.0,
    ],
)
def test_bad_densities_are_refused(log_density):
    with pytest.raises(ValueError, match="from_log_density needs an elementwise log density"):
        grids.from_log_density(log_density, 4)


def test_traced_densities_are_refused():
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda a: grids.from_log_density(lambda u: a * u, 4))(1.0)


def test_explicit_and_check():
    grid = grids.explicit([-np.inf, -1, 0.5, np.inf])
    assert grid.dtype == jnp.float32
    np.testing.assert_array_equal(grids.check_grid(grid), grid)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0], "n >= 1"),
        ([[0.0, 1.0]], "shape"),
        ([0.0, 0.0], "levels 0 and 1"),
        ([1.0, 0.0], "reverse"),
        ([0.0, np.nan, 1.0], "level 1"),
        ([0.0, np.inf, np.inf], "levels 1 and 2"),
        ([0.0, -np.inf, 1.0], "levels 0 and 1"),
        ([1.0, 1.0 + 1e-9], "float32"),
    ],
)
def test_bad_grids_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        grids.explicit(values)


def test_bad_step_counts_are_refused():
    for make in (
        grids.uniform_masking_rate,
        lambda n: grids.from_schedule(masked.linear(), n),
        lambda n: grids.cosine(masked.linear(), n),
        lambda n: grids.from_law(schedules.logistic(), n),
        lambda n: grids.from_log_density(np.zeros_like, n),
    ):
        for n in (0, -3):
            with pytest.raises(ValueError, match="n >= 1"):
                make(n)
        with pytest.raises(TypeError):
            make(2.5)
    with pytest.raises(ValueError, match="fewer steps"):
        grids.from_law(schedules.uniform(1.0, 1.00001), 1000)


def test_grids_under_jit():
    """Known grids may be built while tracing; traced ones are refused with the reason."""

    @jax.jit
    def steps(x):
        grid = grids.from_schedule(masked.cosine_md4(), 4)
        inner = grids.from_law(schedules.logistic(), 4)
        return x + jnp.diff(schedules.masking_rate(grid)).sum() + inner[1]

    np.testing.assert_allclose(steps(1.0), -np.log(3), rtol=1e-6)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(grids.check_grid)(jnp.array([0.0, 1.0]))
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda low: grids.from_law(schedules.uniform(low, 1.0), 4))(0.0)
