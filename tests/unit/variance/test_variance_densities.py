"""Densities over the level: exact masses and weights, and what they do to the toy's variance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_oracle as oracle
import zoo
from toy_oracle import c, decomposition, drawn, fine_density, g, s, v, warped

from mdm_jax import variance
from mdm_jax.variance.densities import (
    QuantileDensity,
    log_spaced_edges,
    moment_density,
    piecewise_density,
)
from mdm_jax.variance.transform import EmptyState
from mdm_jax.variance.warps import ClippedDensity, LogUniformDensity

pytestmark = pytest.mark.keyless

EPS = 1e-3
GRID = np.array([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])


def floored(density, floor):
    return piecewise_density(np.asarray(density.edges), np.asarray(density.masses), floor)


def test_toy_moments():
    np.testing.assert_allclose(
        g(GRID),
        [3.64258714, 3.69655168, 3.83618124, 4.00281835, 4.19624705, 4.41625134, 4.53615184],
        rtol=1e-8,
    )
    np.testing.assert_allclose(
        v(GRID),
        [519.17072821, 46.44006675, 12.22110700, 5.71662007, 2.84920031, 0.89900367, 0],
        rtol=1e-8,
        atol=1e-12,
    )
    np.testing.assert_allclose(
        c(GRID),
        [1.43546657, 1.28866592, 0.96867146, 0.66850215, 0.40467238, 0.19720688, 0.12191807],
        rtol=1e-7,
    )


def test_optimal_density_on_the_grid():
    density = fine_density(s)
    u = (1 - GRID) / (1 - EPS)
    found = np.exp(density.log_pdf(jnp.asarray(u, jnp.float32))) / (1 - EPS)
    expected = [3.94481806, 1.33772722, 0.90189636, 0.80817563, 0.77981049, 0.77488193, 0.77674369]
    np.testing.assert_allclose(found, expected, rtol=3e-3)  # a bin is 0.5 % wide


@pytest.mark.parametrize(
    "moment, expected, rtol",
    [
        (np.ones_like, (31.17245380, 0.13800469, 0.63643119, 31.94688969), 5e-5),
        # v falls to 0 at m = 1: the integral of E g^2 / sqrt(v) converges slowly there. Its value
        # is from a quadrature with 1 - m = y^2, which takes the singularity away.
        (v, (12.51583872, 21.59617894, 0.63643119, 34.74844885), 2e-3),
        (
            lambda m: g(m) ** 2 + c(m),
            (33.18982106, 0.09457392, 0.63643119, 33.92082617),
            1e-4,
        ),
        (lambda m: v(m) + c(m), (None, None, None, 29.54), 2e-3),
    ],
)
def test_totals_by_quadrature_of_the_density_and_its_weights(moment, expected, rtol):
    found = decomposition(fine_density(moment))
    np.testing.assert_allclose(found.mean, 4.03112015, rtol=1e-6)
    for value, known in zip((*found[1:], found.total), expected):
        if known is not None:
            np.testing.assert_allclose(value, known, rtol=rtol)


def test_totals_at_a_larger_epsilon():
    for moment, total in ((np.ones_like, 12.19947041), (s, 10.89055447)):
        found = decomposition(fine_density(moment, 0.05), 0.05)
        np.testing.assert_allclose(found.total, total, rtol=1e-5)


@pytest.mark.parametrize(
    "spacing, totals",
    [
        (np.geomspace, {5: 18.59073523, 50: 18.13074080}),
        pytest.param(np.geomspace, {10: 18.24390587}, marks=pytest.mark.slow),
        pytest.param(
            np.linspace, {5: 23.15249580, 10: 20.94826890, 50: 18.68298865}, marks=pytest.mark.slow
        ),
    ],
)
def test_few_bins(spacing, totals):
    """5, 10 and 50 bins: log-spaced ones are nearly optimal, equal ones are not."""
    for bins, total in totals.items():
        edges = oracle.rate_bins(EPS, bins, spacing)
        masses = np.diff(edges) * np.sqrt(oracle.mean_over_bins(edges, EPS, s, 60))
        density = piecewise_density(edges, masses)
        order = 40 if spacing is np.linspace else 8
        np.testing.assert_allclose(decomposition(density, order=order).total, total, rtol=3e-5)


def test_bin_masses():
    """P_j ~ d_j sqrt(mean s), from the highest rates down; ppots_binned draws from them."""
    edges = oracle.rate_bins(EPS, 5)
    moments = oracle.mean_over_bins(edges, EPS, s, 40)
    expected = [0.60214782, 0.22073001, 0.10200519, 0.05012055, 0.02499644]
    transform = variance.ppots_binned(edges, moments, 1e-7)

    @zoo.quick
    def run(u):
        density = moment_density(edges, moments, 1e-7)
        drawn = oracle.draw_at(transform, u, jnp.full((2, 1), 0.5))
        return density.masses, density.icdf(u), drawn.u[0, :, 0]

    masses, wanted, found = run(np.array([0.3, 0.999], np.float32))
    np.testing.assert_allclose(masses, expected, atol=1e-6)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("floor, total", [(0.1, 18.16976094), (0.5, 19.53055910)])
def test_uniform_floor_costs_little(floor, total):
    density = floored(fine_density(s), floor)
    np.testing.assert_allclose(decomposition(density).total, total, rtol=1e-5)
    weights = np.exp(-density.log_pdf(density.edges[:-1]))
    assert weights.max() <= 1 / floor * (1 + 1e-6)


@pytest.mark.parametrize(
    "moment, floor, expected",
    [
        (lambda m: v(m) + c(m), 0, (17.0052, 14.0355, 13.4021)),
        pytest.param(
            lambda m: v(m) + c(m), 0.1, (14.8215, 13.5639, 13.4524), marks=pytest.mark.slow
        ),
        pytest.param(s, 0, (15.7303, 15.6757, 15.6749), marks=pytest.mark.slow),
    ],
)
def test_targets_under_stratified_levels(moment, floor, expected):
    """B Var of the mean over B = 8, 64, 512 jittered cells: v + c is the target to take there."""
    density = fine_density(moment)
    density = floored(density, floor) if floor else density
    for rows, known in zip((8, 64, 512), expected):
        cuts = np.asarray(density.points, np.float64) / 2**23
        u, du = oracle.gauss(np.unique(np.concatenate([cuts, np.arange(rows) / rows])), 2)
        m, weight = warped(density, u)
        within = np.bincount((u * rows).astype(int), du * weight * g(m), minlength=rows) * rows
        found = du @ (weight**2 * s(m)) - np.mean(within**2)
        np.testing.assert_allclose(found, known, rtol=2e-4)


@pytest.mark.parametrize(
    "masses",
    [
        np.ones(6),
        [1, 1e-30, 1e-30, 1e-30, 1e-30, 1e30],
        [1e-38] * 6,
        [1e30, 1, 1, 1, 1, 1],
        [1e-12, 1e-12, 1, 1e-12, 1e-12, 1e-12],
    ],
)
def test_weights_average_to_one_exactly_and_nothing_is_out_of_reach(masses):
    """The engine of StableDLLM pays for another density than it samples: E[weight] is not 1."""
    density = piecewise_density(log_spaced_edges(6, 1e-2), masses)
    points, edges = np.asarray(density.points), np.asarray(density.edges, np.float64)
    assert points[0] == 0 and points[-1] == 2**23
    assert np.diff(points).min() >= 1

    @zoo.quick
    def run(u):
        out = density.icdf(u)
        return out, density.cell(out), density.log_pdf(out)

    first = (points[:-1] + 0.5) / 2**23
    last = (points[1:] - 0.5) / 2**23
    for u in (first, last):
        out, cell, log_pdf = (np.asarray(a) for a in run(np.float32(u)))
        np.testing.assert_array_equal(cell, np.arange(6))
        assert np.all((out >= edges[:-1]) & (out < edges[1:]) & (out > 0))
        mean = np.sum(np.diff(points) / 2**23 * np.exp(-log_pdf.astype(np.float64)))
        np.testing.assert_allclose(mean, 1.0, rtol=2e-6)


@pytest.mark.parametrize("floor", [1e-3, 0.01, 0.2, 1.0])
@pytest.mark.parametrize("bins, rate", [(2, 1e-6), (32, 1e-5), (32, 1e-6), (256, 1e-5)])
def test_no_weight_exceeds_the_inverse_floor(bins, rate, floor):
    """In whole grid points, for moments of one bin alone, of all others, and over 20 decades."""
    edges = log_spaced_edges(bins, rate)
    rng = np.random.default_rng(0)
    alone = np.eye(bins)[rng.integers(bins, size=6)]
    moments = np.concatenate([alone, 1 - alone, 10.0 ** rng.uniform(-10, 10, (20, bins))])
    many = zoo.quick(
        jax.vmap(lambda moment, floor: moment_density(edges, moment, floor), (0, None))
    )
    points = np.asarray(many(np.float32(moments), np.float32(floor)).points, np.int64)
    widths = np.diff(np.float64(edges)) * 2**23
    assert np.all(widths == np.round(widths))
    assert np.all(points[:, 0] == 0) and np.all(points[:, -1] == 2**23)
    weights = widths / np.diff(points)
    assert weights.min() > 0 and weights.max() <= 1 / floor * (1 + 1e-6)
    if floor == 1:
        np.testing.assert_array_equal(weights, 1)


@pytest.mark.parametrize("low, high", [(0.3, 1 - 2.9e-6), (2.9e-6, 0.5), (2.9e-6, 0.9999)])
def test_no_weight_of_a_mixture_exceeds_the_inverse_share(low, high):
    transform = variance.clipped_mixture(low, high, 0.1)
    u = jnp.asarray([2.0**-24, 1 - 2.0**-24, 1 - high / 2 - low / 2])
    weights = np.exp(transform.profile(EmptyState(), u).log_weight)
    assert weights.max() <= 10 * (1 + 1e-6)


def test_inverse_and_distribution_function_agree():
    u = np.linspace(0.001, 0.999, 997, dtype=np.float32)
    densities = (
        piecewise_density(log_spaced_edges(6, 1e-2), [1, 2, 3, 3, 2, 1]),
        LogUniformDensity(1e-2),
        ClippedDensity(0.3, 0.8),
    )
    for density in densities:
        assert isinstance(density, QuantileDensity)
        low, high = density.support
        places, weights = oracle.gauss(np.linspace(low, high, 200), 3)

        @zoo.quick
        def run(u, places, density=density):
            return density.cdf(density.icdf(u)), density.log_pdf(places)

        back, log_pdf = run(u, np.float32(places))
        np.testing.assert_allclose(back, u, atol=2e-5)
        mass = weights @ np.exp(np.asarray(log_pdf))
        np.testing.assert_allclose(mass, 1.0, rtol=2e-2 if low == 0 else 1e-6)


def test_masses_may_be_traced():
    edges = log_spaced_edges(4, 1e-2)
    masses = jnp.array([1.0, 2.0, 3.0, 4.0])
    traced = jax.jit(lambda masses: piecewise_density(edges, masses).points)(masses)
    np.testing.assert_array_equal(traced, piecewise_density(edges, masses).points)


def test_log_spaced_edges_cover_the_interval():
    edges = log_spaced_edges(5, 1e-4)
    assert edges[0] == 0 and edges[-1] == 1
    rates = 1 - edges[:-1].astype(np.float64)
    np.testing.assert_allclose(rates, np.geomspace(1, 1e-4, 5), rtol=1e-3)


def test_log_uniform_has_constant_weights_above_its_foot():
    """weight / m = T = 1 + ln(1 / smallest) above; below, the density stays as it is."""
    density = LogUniformDensity(1e-3)
    u = np.linspace(0.0005, 0.9995, 2001)
    m, weight = warped(density, u, 0.0)
    total = 1 + math.log(1e3)
    above = m > 1.001e-3
    np.testing.assert_allclose(weight[above] / m[above], total, rtol=1e-4)
    np.testing.assert_allclose(weight[~above], total * 1e-3, rtol=2e-3)
    np.testing.assert_allclose((~above).mean(), 1 / total, rtol=1e-2)


def test_log_uniform_keeps_the_whole_bound():
    u, du = oracle.gauss(np.concatenate([[0], np.linspace(0.01, 0.99, 60), [1]]), 6)
    m, weight = warped(LogUniformDensity(1e-2), u, 0.0)
    np.testing.assert_allclose(du @ (weight * g(m)), oracle.MEAN, rtol=1e-6)


def test_clipped_pays_for_its_range_and_misses_the_rest():
    """int_low^high g, with the factor high - low that BD3-LM's code leaves out."""
    low, high = 0.3, 0.8
    u, du = oracle.gauss([0, 1], 8)
    m, weight = warped(ClippedDensity(low, high), u, 0.0)
    np.testing.assert_allclose(weight, high - low, rtol=1e-6)
    assert m.min() > low and m.max() < high
    outside = [oracle.gauss(part, 8) for part in ([0, low], [high, 1])]
    missing = sum(weights @ g(places) for places, weights in outside)
    np.testing.assert_allclose(du @ (weight * g(m)), oracle.MEAN - missing, rtol=1e-6)
    assert missing > 1.9
    assert variance.clipped(low, high).bias == "truncated"
    assert variance.clipped(0.0, 1.0).bias == "exact"  # nothing is left out


def test_clipped_mixture_is_exact():
    for low, high in ((0.3, 0.8), (0.0, 0.5), (0.5, 1.0), (0.0, 1.0)):
        transform = variance.clipped_mixture(low, high, 0.1)
        inside = 0.1 + 0.9 / (high - low)
        cuts = np.unique([0, 0.1 * (1 - high), 0.1 * (1 - high) + inside * (high - low), 1])
        u, du = oracle.gauss(cuts, 12)
        m, weight = drawn(transform, u)
        np.testing.assert_allclose(du @ (weight * g(m)), oracle.MEAN, rtol=1e-5)
        np.testing.assert_allclose(weight[(m > low) & (m < high)], 1 / inside, rtol=1e-5)
        outside = weight[(m < low) | (m > high)]
        np.testing.assert_allclose(outside, 10, rtol=1e-4)


@pytest.mark.parametrize(
    "low, high", [(1e-7, 1.0), (0.0, 1 - 1e-7), (1e-7, 0.5), (0.5, 1 - 1e-9), (0.3, 0.3 + 1e-6)]
)
def test_clipped_mixture_takes_ends_that_float32_cannot_tell_from_0_and_1(low, high):
    transform = variance.clipped_mixture(low, high, 0.1)
    assert transform.bias == "exact"
    u = jnp.asarray([2.0**-24, 0.5, 1 - 2.0**-24])
    profile = transform.profile(EmptyState(), u)
    assert np.all(np.isfinite(profile.log_density))
    np.testing.assert_array_equal(profile.log_density, -profile.log_weight)
    if low < 1e-6 and high == 1.0:
        np.testing.assert_allclose(profile.log_density, 0, atol=1e-6)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: piecewise_density([0, 0.5, 1], [1, 2, 3]),
            "3 edges need 2 masses",
        ),
        (lambda: piecewise_density([0.1, 1], [1]), "from 0 to 1"),
        (
            lambda: piecewise_density([0, 0.5, 0.5, 1], [1, 1, 1]),
            "edges 1 and 2",
        ),
        (lambda: piecewise_density([0, 0.5, 1], [1, 0]), "positive and finite"),
        (
            lambda: piecewise_density([0, 0.5, 1], [1, np.nan]),
            "positive and finite",
        ),
        (lambda: log_spaced_edges(5000, 1e-6), "fewer bins or a larger"),
        (lambda: variance.clipped(0.8, 0.3), "0 <= low < high <= 1"),
        (
            lambda: variance.clipped_mixture(0.3, 0.3 + 1e-8),
            "clipped_mixture needs a range .* wide",
        ),
        (
            lambda: variance.ppots_binned([0, 0.5, 1], [1, 2], 0.0),
            "floor must be a number in",
        ),
        (lambda: variance.ppots_binned([0, 0.5, 1], [1, -2]), "not negative"),
        (lambda: variance.ppots_binned([0, 0.5, 1], [1, np.inf]), "finite"),
    ],
)
def test_errors_say_what_is_allowed(call, words):
    with pytest.raises(ValueError, match=words):
        call()
