"""Gaussian samplers without noise against the probability flow: known values, ratios, orders."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_runs import (
    GRID_12,
    M2,
    SAMPLERS,
    START,
    constant,
    cosine,
    draw_from,
    edm,
    flow_time,
    oracle,
    uniform_logsnr,
    uniform_sigma,
    uniform_softplus,
    walk,
)
from scipy import optimize, stats
from variants import slow_except

from mdm_jax.gaussian import parameterisations, paths
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.testing import toys


def test_euler_methods_are_one_and_known_values():
    with jax.enable_x64():
        path = paths.vp()
        run = functools.partial(draw_from, START, oracle("mixture", path), grid=GRID_12, path=path)
        ddim = run(sampler=gaussian_samplers.ddim())
        np.testing.assert_allclose(ddim[0, 0], 0.365203269239, atol=1e-12)
        for other in (
            gaussian_samplers.euler_flow(),
            gaussian_samplers.edm_heun(second_order=False),
        ):
            np.testing.assert_allclose(run(sampler=other), ddim, atol=1e-12)
        second = run(sampler=gaussian_samplers.dpm_solver_pp_2m(lower_order_final=False))
        np.testing.assert_allclose(second[0, 0], 0.397492194534, atol=1e-12)


def test_ddim_on_normal_data_over_the_whole_cosine_schedule():
    # On the variance-preserving path the ideal v for N(0, 1) is zero, also at logSNR -inf.
    network, sampler, v = constant(0.0), gaussian_samplers.ddim(), parameterisations.v()
    for n in (1, 2, 5, 10, 50):
        with np.errstate(divide="ignore"):
            grid = -2 * np.log(np.tan(np.pi / 2 * np.arange(n, -1, -1) / n))
        grid[0] = -np.inf
        with jax.enable_x64():
            ratio = walk(np.ones((1, 1)), network, sampler, grid, paths.vp(), v)
        np.testing.assert_allclose(ratio, math.cos(math.pi / 2 / n) ** n, atol=1e-12)


@pytest.mark.parametrize(
    "grid, ratio",
    [
        (cosine(), 0.888564255099),
        (flow_time(), 0.884686108036),
        (uniform_logsnr(), 0.818849450506),
        (edm(), 0.808434751412),
        (uniform_softplus(), 0.644700441902),
        (uniform_sigma(), 0.196701131802),
    ],
)
def test_standard_deviation_of_ddim_by_spacing(grid, ratio):
    angles = np.arctan(np.exp(-grid / 2))
    np.testing.assert_allclose(np.prod(np.cos(np.diff(angles))), ratio, atol=1e-12)
    path = paths.flow()
    with jax.enable_x64():
        model = oracle("standard", path)
        start = np.full((1, 1), np.sqrt(1 + np.exp(8.0)))
        out = draw_from(start, model, gaussian_samplers.ddim(), grid, path)
        np.testing.assert_allclose(out, ratio * np.sqrt(1 + np.exp(-8.0)), atol=1e-12)


def test_ddim_ratio_of_narrow_data():
    path = paths.vp()
    with jax.enable_x64():
        start = np.full((1, 1), np.sqrt(0.25 + np.exp(6.0)))
        out = draw_from(start, oracle("narrow", path), gaussian_samplers.ddim(), GRID_12, path)
        np.testing.assert_allclose(out / np.sqrt(0.25 + np.exp(-6.0)), 0.883626130044, atol=1e-11)


# Relative errors for N(0, 0.5^2) and absolute ones for M2 from z = 9, for N steps on [-6, 6].
ERRORS = {
    "ddim": (
        {64: -2.2926165940e-02, 128: -1.1529483698e-02},
        {64: -5.14378749e-03, 128: -2.56356598e-03},
    ),
    "2m": (
        {64: 5.0987590861e-04, 128: 1.2834651825e-04},
        {64: 2.31307102e-04, 128: 5.64427073e-05},
    ),
    "2s": (  # from this code; the order is what is tested
        {64: -5.3477123717e-04, 128: -1.3480839845e-04},
        {64: -7.83333749e-05, 128: -1.96142731e-05},
    ),
    "3m": (  # likewise, on steps that grow: the first two are of lower orders
        {128: -1.6581949428e-05, 256: -2.1972193989e-06},
        {128: -1.61364588e-05, 256: -1.92736933e-06},
    ),
    "edm": (
        {64: 1.1234611157e-03, 128: 2.7754037914e-04},
        {64: 2.95799672e-04, 128: 7.21102147e-05},
    ),
    "heun_flow": (
        {64: 3.1368903498e-04, 128: 7.9067605599e-05},
        {64: 5.19095320e-05, 128: 1.26593937e-05},
    ),
}


@functools.cache
def flow_end(z=9.0):
    """Where the probability flow of M2 takes z from logSNR -6 to 6: to the same quantile."""

    def cdf(z, logsnr):
        return float(np.sum(M2.weights * stats.norm.cdf(z, M2.means, scale(logsnr))))

    def scale(logsnr):
        return np.sqrt(M2.std**2 + np.exp(-logsnr))

    return optimize.brentq(lambda end: cdf(end, 6.0) - cdf(z, -6.0), -10, 10, xtol=1e-14)


@pytest.mark.parametrize("name", slow_except({"2m", "3m", "heun_flow"}, ERRORS))
def test_errors_and_orders_of_convergence(name):
    path = paths.vp()
    order = {"ddim": 1, "3m": 3}.get(name, 2)
    assert flow_end() == pytest.approx(0.520053494000, abs=1e-11)

    def both(x, logsnr, documents):
        z = x * jnp.exp(-path.log_alpha(logsnr))
        return jax.vmap(lambda law, z, level: law.denoise(z, level))(laws, z, logsnr)

    laws = toys.GaussianMixture(
        np.array([[0.5, 0.5], M2.weights]), np.array([[0.0, 0.0], M2.means]), np.array([0.5, 0.25])
    )
    exact = math.sqrt((0.25 + math.exp(-6)) / (0.25 + math.exp(6)))
    plain = {"2m": gaussian_samplers.dpm_solver_pp_2m, "3m": gaussian_samplers.dpm_solver_pp_3m}
    sampler = plain[name](False) if name in plain else SAMPLERS[name]
    with jax.enable_x64():
        errors, start = {}, np.asarray(path.alpha(-6.0)) * np.array([[1.0], [9.0]])
        for n in ERRORS[name][0]:
            done = np.linspace(0, 1, n + 1) ** (2 if name == "3m" else 1)
            end = walk(start, both, sampler, -6 + 12 * done, path)[:, 0]
            errors[n] = end[0] / exact - 1, end[1] - flow_end()
    for kind in (0, 1):
        for n, expected in ERRORS[name][kind].items():
            np.testing.assert_allclose(errors[n][kind], expected, atol=2e-10, err_msg=str(n))
        coarse, fine = ERRORS[name][kind]
        measured = math.log2(errors[coarse][kind] / errors[fine][kind])
        assert measured == pytest.approx(order, abs=0.1)
