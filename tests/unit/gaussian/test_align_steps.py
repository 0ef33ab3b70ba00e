"""Offline search for sampling grids: interval costs, Align Your Steps, black-box search."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, interpolate
from variants import slow_except

from mdm_jax.gaussian import parameterisations, paths
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.gaussian.samplers import spacings
from mdm_jax.testing import toys

M1 = toys.symmetric_pair()


def softplus(x):
    return np.logaddexp(0, x)


def between(function, inverse, n):
    """Levels in [-8, 8] between which a quantity changes in equal steps, float64."""
    levels = inverse(np.linspace(function(-8.0), function(8.0), n + 1))
    levels[0], levels[-1] = -8.0, 8.0
    return levels


def uniform_softplus(n, std=1.0):
    shift = 2 * np.log(std)
    return between(lambda x: softplus(x + shift), lambda y: y + np.log(-np.expm1(-y)) - shift, n)


def cosine(n):
    return between(lambda x: np.arctan(np.exp(-x / 2)), lambda y: -2 * np.log(np.tan(y)), n)


def edm(n):
    return between(lambda x: np.exp(-x / 14), lambda y: -14 * np.log(y), n)


@functools.cache
def pair_curve():
    """(levels, eps error) of the symmetric pair, fine enough for six digits."""
    knots, levels = np.linspace(-8, 8, 321), np.linspace(-8, 8, 8001)
    with jax.enable_x64():
        exact = np.asarray(M1.eps_mse(knots))
    return levels, interpolate.CubicSpline(knots, exact)(levels)


# KLUB of N(0, std^2), and KL(true || sampled) of the ancestral sampler, by grid.
NORMAL = {
    (1.0, 5): ((19.5364760156, 0.629322578), (149.5393563304, 0.148165723))
    + ((71.6459400038, 0.629876949), (5.8825810610, 1.17389907)),
    (1.0, 10): ((4.8949857799, 0.154406932), (41.7473367133, 0.0409772092))
    + ((10.3864247244, 0.184040403), (2.1277046425, 0.212518686)),
    (0.5, 10): ((3.8776489374, 0.154142859), (37.9100137953, 0.0729930361))
    + ((8.7979383541, 0.220515128), (1.3809660282, 0.138059691)),
    (0.5, 50): ((0.4963242797, 0.00637382551), (2.7109038407, 0.00436065980))
    + ((0.8033891002, 0.00985203394), (0.2287649419, 0.00457445883)),
}


@pytest.mark.parametrize("std, n", NORMAL)
def test_bound_of_normal_data(std, n):
    grids = [np.linspace(-8, 8, n + 1), cosine(n), edm(n), uniform_softplus(n, std)]
    for grid, (bound, divergence) in zip(grids, NORMAL[std, n]):
        found = gaussian_samplers.klub(gaussian_samplers.normal_cost(std), grid)
        np.testing.assert_allclose(found, bound, atol=1e-9)
        # The ancestral sampler's variance, by its recursion in x / alpha.
        variance = std**2 + np.exp(-grid[0])
        for level, step, clean in zip(grid[:-1], np.diff(grid), grid[1:]):
            gain, keep = std**2 / (std**2 + np.exp(-level)), np.exp(-step)
            variance = (keep + (1 - keep) * gain) ** 2 * variance + np.exp(-clean) * (1 - keep)
        ratio = (std**2 + np.exp(-8.0)) / variance
        exact = 0.5 * (ratio - 1 - np.log(ratio))
        np.testing.assert_allclose(exact, divergence, rtol=1e-7)
        assert exact <= bound


def test_cost_of_one_interval_by_quadrature():
    def change(level):  # e^lambda E|D_lambda - D_a|^2 of N(0, 1)
        return np.exp(level) * (1 / (1 + np.exp(-1.0)) - 1 / (1 + np.exp(level)))

    expected = 0.5 * integrate.quad(change, -1, 2, epsabs=1e-13)[0]
    assert expected == pytest.approx(1.659612552103, abs=1e-12)
    found = gaussian_samplers.normal_cost()(np.array([-1.0]), np.array([2.0]))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_the_bound_with_finitely_many_steps_is_the_continuous_one_and_the_cost():
    grid = np.linspace(-8, 8, 11)
    snr = np.exp(grid)
    finite = 0.5 * np.sum(np.diff(snr) / (1 + snr[:-1]))  # mmse = 1 / (1 + snr)
    assert finite == pytest.approx(
        4 + gaussian_samplers.klub(gaussian_samplers.normal_cost(), grid), abs=1e-11
    )
    assert finite == pytest.approx(4 + 4.894985779859, abs=1e-11)


def test_a_tracked_curve_gives_the_exact_cost():
    levels = np.linspace(-8, 8, 3001)
    curve = gaussian_samplers.curve_cost(levels, 1 / (1 + np.exp(-(levels + 2 * np.log(0.5)))))
    rng = np.random.default_rng(0)
    ends = np.sort(rng.uniform(-8, 8, (2, 200)), axis=0)
    expected = gaussian_samplers.normal_cost(0.5)(*ends)
    np.testing.assert_allclose(curve(*ends), expected, rtol=1e-3, atol=1e-5)


M1_COSTS = {  # N: uniform logSNR, cosine, softplus, density rule, optimum
    5: (15.52408547, 87.910762, 5.01767380, 5.06615826, 4.95858471),
    10: (4.04649836, 31.149880, 1.82049611, 1.79890495, 1.79358866),
}
M1_GRIDS = {
    5: [1.22480, 2.98856, 4.86544, 6.46137],
    10: [0.1018, 1.1804, 2.0943, 3.1052, 4.0774, 4.9281, 5.7219, 6.4906, 7.2480],
}


@pytest.mark.parametrize("n", slow_except({5}, M1_COSTS))
def test_costs_and_the_best_grid_of_a_mixture(n):
    levels, curve = pair_curve()
    cost = gaussian_samplers.curve_cost(levels, curve)
    # Large N: density of steps in proportion to sqrt(-dmmse / dlogsnr exp(logsnr)).
    slope = np.gradient(curve * np.exp(-levels), levels, edge_order=2)
    density = np.sqrt(-slope * np.exp(levels))
    cumulative = integrate.cumulative_trapezoid(density, levels, initial=0)
    rule = np.interp(np.linspace(0, cumulative[-1], n + 1), cumulative, levels)
    uniform = np.linspace(-8, 8, n + 1)
    found = [
        gaussian_samplers.klub(cost, g) for g in (uniform, cosine(n), uniform_softplus(n), rule)
    ]
    np.testing.assert_allclose(found, M1_COSTS[n][:-1], rtol=2e-5)
    best = gaussian_samplers.align_steps(cost, uniform)
    np.testing.assert_allclose(best.cost, M1_COSTS[n][-1], rtol=2e-5)
    np.testing.assert_allclose(best.grid[1:-1], M1_GRIDS[n], atol=0.01)
    assert np.all(np.diff(best.trace) <= 0) and best.doubled == []
    assert best.cost == gaussian_samplers.klub(cost, best.grid)


@pytest.mark.parametrize("std, n", [(1.0, 4), (0.5, 7)])
def test_the_best_grid_of_normal_data_is_uniform_in_softplus(std, n):
    start = np.linspace(-8, 8, n + 1)
    best = gaussian_samplers.align_steps(gaussian_samplers.normal_cost(std), start, tolerance=1e-13)
    expected = spacings.uniform_in(lambda x: softplus(x + 2 * np.log(std)), n, -8, 8)
    np.testing.assert_allclose(best.grid, expected, atol=2e-4)
    total = softplus(8 + 2 * np.log(std)) - softplus(-8 + 2 * np.log(std))
    optimum = n / 2 * (math.expm1(total / n) - total / n)
    np.testing.assert_allclose(best.cost, optimum, rtol=1e-8)
    assert best.cost >= optimum * (1 - 1e-12)


def test_doubling_keeps_the_ends_and_finds_the_same_optimum():
    cost, start = gaussian_samplers.normal_cost(), np.linspace(-8, 8, 4)
    best = gaussian_samplers.align_steps(cost, start, doublings=1, tolerance=1e-13)
    assert best.grid.shape == (7,) and best.grid[0] == -8 and best.grid[-1] == 8
    np.testing.assert_allclose(best.grid, uniform_softplus(6), atol=5e-4)
    (place,) = best.doubled
    falls = np.diff(best.trace)
    assert np.all(np.delete(falls, place - 1) <= 0)
    coarse = gaussian_samplers.align_steps(cost, start, tolerance=1e-13)
    assert best.trace[:place] == coarse.trace
    middle = 0.5 * (coarse.grid[1:] + coarse.grid[:-1])
    longer = np.sort(np.concatenate([coarse.grid, middle]))
    assert best.trace[place] == gaussian_samplers.klub(cost, longer)


def network(law, path):
    def model_fn(x, logsnr, documents):
        return law.denoise(x * jnp.exp(-path.log_alpha(logsnr)), logsnr)

    return model_fn


ENDS = np.array([-8.0, -1.0, 0.0, 3.0]), np.array([-2.0, 2.0, 0.5, 8.0])


@pytest.mark.parametrize(
    "name, path_name", [pytest.param("normal", "ve", marks=pytest.mark.slow), ("mixture", "vp")]
)
def test_pairs_estimate_the_cost(name, path_name):
    path, rows, elements = paths.by_name(path_name), 16384, 2
    if name == "normal":
        law, std = toys.normal(0.3, 0.5), 0.5
        expected = gaussian_samplers.normal_cost(std)(*ENDS)
    else:
        law, std = M1, 1.0
        expected = gaussian_samplers.curve_cost(*pair_curve())(*ENDS)
    denoise = gaussian_samplers.bind_denoiser(network(law, path), parameterisations.x0(), path)
    data = law.sample(jax.random.key(0), (rows, elements))
    cost = gaussian_samplers.pair_cost(jax.random.key(1), denoise, data, path=path, data_std=std)
    # For normal data each row's ratio is chi-squared; for the mixture its spread was measured over
    # ten seeds to be at most twice as large.
    error = np.sqrt(2 / (rows * elements)) * (1 if name == "normal" else 2)
    np.testing.assert_allclose(cost(*ENDS) / (elements * expected), 1, atol=5 * error)


def test_a_curve_of_losses_is_measured():
    path, levels = paths.flow(), np.linspace(-6, 6, 7)
    data = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)

    def curve(denoise):
        return gaussian_samplers.loss_curve(jax.random.key(1), denoise, data, levels, path=path)

    zero = curve(lambda x, logsnr: jnp.zeros_like(x))  # x0 = 0, so eps - eps_hat = -x0 alpha/sigma
    np.testing.assert_allclose(zero, np.mean(np.sum(data**2, 1)) * np.exp(levels), rtol=1e-5)
    noisy = curve(lambda x, logsnr: x * jnp.exp(-path.log_alpha(logsnr)))  # eps_hat = 0
    np.testing.assert_allclose(noisy, noisy[0], rtol=1e-4)  # of one noise at all levels
    assert 2 < noisy[0] < 4
    # An error of the data that rises with the logSNR is held at its least.
    rising = curve(lambda x, logsnr: data + jnp.exp(logsnr))
    np.testing.assert_allclose(rising, 3 * np.exp(-12.0 + levels), rtol=1e-3)


def test_the_cost_of_revealing_tokens_in_steps():
    """With l(m) = m^2 a step from rate a to b costs (a - b) a^2 - (a^3 - b^3) / 3."""
    rates = np.linspace(0, 1, 2001)
    cost = gaussian_samplers.unmasking_cost(rates, rates**2)
    ends = np.array([0.9, 0.5, 1.0]), np.array([0.2, 0.4, 0.0])
    noisy, clean = (np.log1p(-end + 1e-12) - np.log(end + 1e-12) for end in ends)
    a, b = ends
    np.testing.assert_allclose(cost(noisy, clean), (a - b) * a**2 - (a**3 - b**3) / 3, atol=1e-6)
    # Two steps that meet at c lose 1 - c + c^3 and a constant, least at c = 3^(-1/2).
    best = gaussian_samplers.align_steps(cost, [-12.0, 0.0, 12.0])
    np.testing.assert_allclose(1 / (1 + np.exp(best.grid[1])), 3**-0.5, atol=1e-3)
    outside = gaussian_samplers.unmasking_cost([0.25, 0.5, 0.75], [2.0, 1.0, 3.0])
    np.testing.assert_allclose(outside([-40.0], [0.0]), 0.5 * 3 - 0.25 * 3 - 0.25 * 2.5)


def test_pairs_of_a_network_that_ignores_its_input_cost_nothing():
    cost = gaussian_samplers.pair_cost(
        jax.random.key(0),
        lambda x, logsnr: jnp.ones_like(x),
        np.zeros((4, 3), np.float32),
        path=paths.flow(),
    )
    np.testing.assert_array_equal(cost(*ENDS), np.zeros(4))


@pytest.mark.slow
def test_align_steps_runs_on_pairs():
    law, path = toys.standard_normal(), paths.vp()
    denoise = gaussian_samplers.bind_denoiser(network(law, path), parameterisations.x0(), path)
    data = law.sample(jax.random.key(0), (2048, 1))
    cost = gaussian_samplers.pair_cost(jax.random.key(1), denoise, data, path=path)
    start = np.linspace(-4, 4, 4)
    best = gaussian_samplers.align_steps(cost, start, refinements=3, max_sweeps=4)
    exact = gaussian_samplers.normal_cost()
    total = softplus(4.0) - softplus(-4.0)
    optimum = 1.5 * (math.expm1(total / 3) - total / 3)
    assert (
        gaussian_samplers.klub(exact, best.grid)
        < 1.05 * optimum
        < 0.7 * gaussian_samplers.klub(exact, start)
    )


def deviation(grid):
    """Minus the standard deviation that DDIM gives N(0, 1), relative to the truth."""
    return -np.prod(np.cos(np.diff(np.arctan(np.exp(-grid / 2)))))


def test_pattern_search_finds_the_best_ddim_grid():
    found = gaussian_samplers.pattern_search(
        deviation, np.linspace(-8, 8, 7), 3000, smallest_step=1e-7
    )
    angle = np.arctan(np.exp(4.0)) - np.arctan(np.exp(-4.0))
    assert np.cos(angle / 6) ** 6 == pytest.approx(0.820111591063, abs=1e-12)
    assert found.value == pytest.approx(-0.820111591063, abs=1e-12)
    # Equal angles; the value is flat there, to second order.
    angles = np.linspace(np.arctan(np.exp(4.0)), np.arctan(np.exp(-4.0)), 7)
    np.testing.assert_allclose(found.grid, -2 * np.log(np.tan(angles)), atol=1e-5)
    np.testing.assert_allclose(found.grid[1:3], [-2.538247, -1.070519], atol=1e-5)
    assert found.converged and found.evaluations < 3000
    values = [entry.value for entry in found.trace]
    assert values == sorted(values, reverse=True) and values[-1] == found.value
    assert [deviation(entry.grid) for entry in found.trace] == values


def test_pattern_search_keeps_to_its_budget_and_order():
    seen = []

    def metric(grid):
        seen.append(grid.copy())
        return deviation(grid)

    found = gaussian_samplers.pattern_search(metric, np.linspace(-8, 8, 7), 50, step=4.0)
    assert found.evaluations == len(seen) == 50 and not found.converged
    assert all(np.all(np.diff(grid) > 0) for grid in seen)
    assert found.value == min(map(deviation, seen))


def test_exhaustive_search_tries_every_grid():
    candidates, calls = np.linspace(-5, 5, 11), []

    def metric(grid):
        calls.append(tuple(grid))
        return deviation(grid) if grid[1] > -5 else math.nan

    found = gaussian_samplers.exhaustive_search(metric, candidates, 3, -8, 8, 165)
    assert found.evaluations == len(calls) == len(set(calls)) == 165
    grids = [np.array([-8, *c, 8]) for c in itertools.combinations(candidates[1:], 3)]
    best = min(grids, key=deviation)
    np.testing.assert_array_equal(found.grid, best)
    assert found.value == deviation(best) and found.converged


@pytest.mark.parametrize("steps", [2, 4, 8, 32])
def test_a_refined_grid_is_nearly_the_best(steps):
    """From rules whose loss of deviation is up to two thirds above the least possible."""
    even = np.linspace(-1, 1, steps + 1)
    starts, calls = [8 * even, 8 * np.sign(even) * np.abs(even) ** 1.5], []

    def metric(grid):
        calls.append(grid)
        return 1 + deviation(grid)

    found = gaussian_samplers.refined_grid(metric, metric, starts, 32)
    assert found[0] == -8 and found[-1] == 8 and np.all(np.diff(found) > 0) and len(calls) < 80
    angle = np.arctan(np.exp(4.0)) - np.arctan(np.exp(-4.0))
    least = 1 - np.cos(angle / steps) ** steps
    assert least - 1e-12 <= metric(found) < 1.18 * least
    if steps > 2:  # there both rules are the best grid
        assert metric(found) < 0.93 * min(map(metric, starts))


def test_a_refined_grid_is_no_lucky_draw():
    """Whatever is not the start looks better by the first numbers; the others decide."""
    start = np.linspace(-8, 8, 5)

    def moved(sign):
        return lambda grid: sign * float(np.any(grid != start))

    for factor, kept in ((0.1, True), (-0.1, False)):
        found = gaussian_samplers.refined_grid(moved(-1.0), moved(factor), [start], 8)
        assert np.array_equal(found, start) == kept


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: gaussian_samplers.refined_grid(deviation, deviation, [[0.0, 1.0]], 9), "2 steps"),
        (lambda: gaussian_samplers.klub(gaussian_samplers.normal_cost(), [0.0]), "n >= 2"),
        (lambda: gaussian_samplers.klub(gaussian_samplers.normal_cost(), [0.0, np.inf]), "finite"),
        (lambda: gaussian_samplers.normal_cost(0.0), "data_std"),
        (lambda: gaussian_samplers.curve_cost([0.0, 1.0], [0.5]), "per level"),
        (lambda: gaussian_samplers.curve_cost([0.0, 1.0], [0.5, -0.1]), "finite error >= 0"),
        (lambda: gaussian_samplers.curve_cost([0.0, 1.0], [0.5, 0.6])([0.5], [1.5]), "covers"),
        (lambda: gaussian_samplers.align_steps(deviation, [1.0, 0.0]), "increasing"),
        (lambda: gaussian_samplers.align_steps(deviation, [0.0, 1.0], candidates=4), "odd"),
        (lambda: gaussian_samplers.align_steps(deviation, [0.0, 1.0], max_sweeps=0), "max_sweeps"),
        (
            lambda: gaussian_samplers.pair_cost(
                jax.random.key(0), jnp.multiply, np.zeros(3), path=paths.vp()
            ),
            "rows, elements",
        ),
        (lambda: gaussian_samplers.pattern_search(deviation, [0.0, 1.0], 0), "budget"),
        (
            lambda: gaussian_samplers.pattern_search(deviation, [0.0, 1.0], 9, step=0.0),
            "smallest_step",
        ),
        (lambda: gaussian_samplers.pattern_search(lambda g: math.nan, [0.0, 1.0], 9), "metric"),
        (
            lambda: gaussian_samplers.exhaustive_search(deviation, range(10), 3, -1, 10, 100),
            "budget",
        ),
        (lambda: gaussian_samplers.exhaustive_search(deviation, [1.0], 2, 0, 2, 100), "num_inner"),
        (lambda: gaussian_samplers.exhaustive_search(deviation, [3.0], 1, 0, 2, 100), "increasing"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
