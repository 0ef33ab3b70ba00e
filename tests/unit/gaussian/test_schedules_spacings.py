"""Spacings of sampling grids on the Gaussian side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from mdm_jax import schedules
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.gaussian.samplers import spacings
from mdm_jax.schedules import grids

pytestmark = pytest.mark.keyless


def sigma(grid):
    return np.exp(-np.asarray(grid, np.float64) / 2)


def test_edm():
    """The published 18 steps: 18 values of sigma, and zero."""
    grid = spacings.edm(18)
    assert (grid.shape, grid.dtype) == ((19,), jnp.float32)
    known = [80.0, 57.5859847212, 3.2568215198, 0.0075280200, 0.002]
    np.testing.assert_allclose(sigma(grid)[[0, 1, 8, 16, 17]], known, rtol=1e-6)
    assert grid[-1] == np.inf
    # between the ends it is the law edm_rho
    np.testing.assert_allclose(
        grid[:-1], grids.from_law(gaussian_schedules.edm_rho(), 17), rtol=2e-6, atol=2e-6
    )
    np.testing.assert_allclose(sigma(spacings.edm(2, 0.1, 2.0)), [2.0, 0.1, 0.0], rtol=1e-6)


def test_uniform_time():
    law = gaussian_schedules.cosine()
    grid = spacings.uniform_time(law, 8, clean=1e-3, noisy=1e-5)
    time = np.linspace(1 - 1e-5, 1e-3, 9)
    np.testing.assert_allclose(grid, -2 * np.log(np.tan(np.pi * time / 2)), rtol=2e-6, atol=1e-6)
    whole = spacings.uniform_time(law, 8)
    np.testing.assert_array_equal(whole, grids.from_law(law, 8))
    np.testing.assert_array_equal(whole[jnp.array([0, -1])], [-np.inf, np.inf])
    built = jax.jit(lambda: spacings.uniform_time(gaussian_schedules.flow(), 4, 0.1, 0.1))()
    np.testing.assert_allclose(built, spacings.uniform_time(gaussian_schedules.flow(), 4, 0.1, 0.1))


def test_uniform_logsnr():
    np.testing.assert_allclose(spacings.uniform_logsnr(4, -6.0, 2.0), [-6, -4, -2, 0, 2], atol=1e-6)


@pytest.mark.parametrize("name", sorted(spacings.QUANTITIES))
def test_uniform_in_a_quantity(name, n=10, low=-6.0, high=7.0):
    grid = spacings.uniform_in(name, n, low, high)
    np.testing.assert_array_equal(grid[jnp.array([0, -1])], [low, high])
    steps = np.diff(spacings.QUANTITIES[name](np.asarray(grid, np.float64)))
    np.testing.assert_allclose(steps, steps.mean(), rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "law"),
    [
        ("logsnr", lambda: gaussian_schedules.uniform_logsnr(-50.0, 50.0)),
        ("ou_time", lambda: gaussian_schedules.ou_time(10.0)),
        ("variance", gaussian_schedules.variance_linear),
        ("correlation", gaussian_schedules.amplitude_linear),
        ("fisher", gaussian_schedules.cosine),
        ("sigma", lambda: gaussian_schedules.edm_sigma(0.0, 1e3)),
    ],
)
def test_a_quantity_is_the_time_of_a_schedule(name, law):
    """Written twice, once as a function and once as a law."""
    grid = spacings.uniform_in(name, 12, -5.0, 4.0)
    cut = gaussian_schedules.truncated(law(), -5.0, 4.0)
    np.testing.assert_allclose(grid, grids.from_law(cut, 12), rtol=1e-4, atol=1e-5)


def test_uniform_in_any_monotone_function():
    """Such as the distribution function of a law, rising, or its complement, falling."""
    cut = gaussian_schedules.truncated(schedules.logistic(), -4.0, 4.0)
    for function in (expit, lambda x: -expit(x)):
        np.testing.assert_allclose(
            spacings.uniform_in(function, 6, -4.0, 4.0), grids.from_law(cut, 6), atol=1e-5
        )


def test_learned_laws():
    """A histogram that has learned nothing spaces uniformly in the logSNR."""
    grid = grids.from_law(schedules.piecewise(np.ones(50), (-10.0, 10.0)), 8)
    np.testing.assert_allclose(grid, spacings.uniform_logsnr(8, -10.0, 10.0), atol=2e-5)


def test_uniform_information():
    """Data N(0, s^2): the noise error is sigmoid(logsnr'), the information softplus(logsnr') / 2.

    logsnr' = logsnr + 2 log s. This is also the optimal grid of Align Your Steps for such data.
    """
    edges, shift = np.linspace(-8, 8, 401), 2 * np.log(0.5)
    loss = expit((edges[1:] + edges[:-1]) / 2 + shift)
    grid = spacings.uniform_information(loss, (-8.0, 8.0), 10)
    information = np.logaddexp(0, np.asarray(grid, np.float64) + shift) / 2
    np.testing.assert_allclose(np.diff(information), np.ptp(information) / 10, rtol=1e-3)
    np.testing.assert_array_equal(grid, spacings.uniform_information(loss, edges, 10))
    np.testing.assert_array_equal(grid, spacings.uniform_information(7 * loss, edges, 10))


def test_uniform_mmse():
    """The same data: its error s^2 sigmoid(-logsnr'), so logistic quantiles; and a noisy curve."""
    level, shift = np.linspace(-8, 8, 401), 2 * np.log(0.5)
    grid = spacings.uniform_mmse(expit(-level - shift) / 4, level, 10)
    error = expit(-np.asarray(grid, np.float64) - shift)
    np.testing.assert_allclose(np.diff(error), -np.ptp(error) / 10, rtol=1e-3)
    rough = spacings.uniform_mmse([1.0, 0.5, 0.25, 0.3, 0.0], np.arange(5.0), 4)
    np.testing.assert_allclose(rough, [0, 0.5, 1, 3, 4], atol=1e-5)  # held at 0.25 until 3


@pytest.mark.parametrize(
    ("spacing", "indices"),
    [
        ("leading", [0, 3, 6]),
        ("linspace", [0, 4, 9]),
        ("trailing", [2, 6, 9]),
    ],
)
def test_table_indices(spacing, indices):
    """Of 3 steps out of 10."""
    np.testing.assert_array_equal(spacings.table_indices(10, 3, spacing), indices)
    np.testing.assert_array_equal(spacings.table_indices(10, 10, spacing), np.arange(10))


def test_only_trailing_and_linspace_meet_the_zero_terminal_snr():
    table = gaussian_schedules.zero_terminal_table(gaussian_schedules.ddpm_table())
    starts = {}
    for spacing in ("leading", "linspace", "trailing"):
        grid = spacings.from_table(table, 10, spacing)
        assert grid.shape == (11,)
        assert grid[-1] == np.inf
        indices = spacings.table_indices(1000, 10, spacing)
        np.testing.assert_allclose(grid[:-1], table[indices][::-1], rtol=1e-6)
        starts[spacing] = float(grid[0])
    assert starts["trailing"] == starts["linspace"] == -np.inf
    np.testing.assert_allclose(starts["leading"], table[900], rtol=1e-6)
    # one step from noise, the case that "linspace" gets wrong
    assert spacings.from_table(table, 1, "trailing")[0] == -np.inf
    assert spacings.from_table(table, 1, "linspace")[0] > 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spacings.edm(1), "n >= 2"),
        (lambda: spacings.edm(4, 0.0), "0 < sigma_min"),
        (lambda: spacings.edm(4, rho=0.0), "rho > 0"),
        (lambda: spacings.uniform_time(gaussian_schedules.flow(), 0), "n >= 1"),
        (lambda: spacings.uniform_time(gaussian_schedules.flow(), 4, 0.5, 0.5), "leave time"),
        (lambda: spacings.uniform_time(gaussian_schedules.flow(), 4, -0.1), "offsets >= 0"),
        (lambda: spacings.uniform_logsnr(4, 1.0, 1.0), "low < high"),
        (lambda: spacings.uniform_logsnr(4, -np.inf, 1.0), "finite"),
        (lambda: spacings.uniform_in("entropy", 4, -1.0, 1.0), "known: correlation"),
        (lambda: spacings.uniform_in(np.square, 4, -1.0, 1.5), "rise or fall"),
        (lambda: spacings.uniform_in(lambda x: 0 * x, 4, -1.0, 1.0), "rise or fall"),
        (lambda: spacings.uniform_information([1.0, 1.0], [0.0, 1.0, 2.0, 3.0], 2), "edges"),
        (lambda: spacings.uniform_information([1.0, -1.0], (0.0, 1.0), 2), "non-negative"),
        (lambda: spacings.uniform_mmse([1.0], [0.0], 2), "K >= 2"),
        (lambda: spacings.uniform_mmse([1.0, 2.0], [0.0, 1.0], 2), "not all 0"),
        (lambda: spacings.table_indices(10, 11, "leading"), "n <= 10"),
        (lambda: spacings.table_indices(10, 2, "even"), "known: leading"),
        (lambda: spacings.from_table([1.0, 2.0], 1, "leading"), "fall strictly"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_traced_laws_are_refused():
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda r: spacings.uniform_time(gaussian_schedules.flow_shifted(r), 4, 0.1, 0.1))(
            2.0
        )
