"""Laws from tables: piecewise-constant densities, and tabulated functions m(t)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import draws, schedules
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.schedules import masked

pytestmark = pytest.mark.keyless

EXTREMES = np.array([2.0**-24, 3 * 2.0**-24, 1 - 3 * 2.0**-24, 1 - 2.0**-24])
U = np.concatenate([EXTREMES, np.linspace(0.01, 0.99, 99)]).astype(np.float32)


# Piecewise-constant laws


@jax.jit
def at_quantiles(law, u):
    """Level, its log density, and the slope of the quantile function."""
    level, pull_back = jax.vjp(law.icdf, u)
    return level, law.log_pdf(level), *pull_back(jnp.ones_like(level))


def test_piecewise_density_is_exact():
    edges = np.array([-7.0, -2.0, 0.0, 0.5, 9.0])
    masses = np.array([1.0, 0.0, 3.0, 4.0])
    law = schedules.piecewise(masses, edges)
    np.testing.assert_allclose(law.masses, masses / 8)
    u = ((np.arange(4096) + 0.5) / 4096).astype(np.float32)
    level, log_pdf, _ = map(np.asarray, at_quantiles(law, u))
    density = np.array([1 / 8 / 5, 0, 3 / 8 / 0.5, 4 / 8 / 8.5])
    np.testing.assert_allclose(np.exp(log_pdf), density[np.digitize(level, edges) - 1], rtol=1e-6)
    counts, _ = np.histogram(level, edges)
    np.testing.assert_array_equal(counts, [512, 0, 1536, 2048])
    # int f dlambda = E[f / p], here of f = 1 over the cells that hold mass, 5 + 0.5 + 8.5
    np.testing.assert_allclose(np.mean(np.exp(-log_pdf)), 14.0, rtol=1e-5)


def test_piecewise_at_its_own_edges():
    """Quantiles that fall on the table, and their neighbours, never land in an empty cell."""
    law = schedules.piecewise([1.0, 0.0, 0.0, 2.0, 0.0, 1.0], (-6.0, 6.0))
    table = np.asarray(law.cumulative)[1:-1]
    u = np.concatenate([table, np.nextafter(table, 0), np.nextafter(table, 1)]).astype(np.float32)
    level, log_pdf, slope = at_quantiles(law, u)
    assert np.all(np.isfinite(level))
    assert np.all(np.isfinite(log_pdf))
    np.testing.assert_allclose(slope * np.exp(log_pdf), 1, rtol=1e-5)


def test_truncated_piecewise_with_an_empty_last_cell():
    """The mixed tail probability rounds to 1 although the quantile is below 1."""
    base = schedules.piecewise([0.9, 0.1, 0.0], (-3.0, 3.0))
    law = gaussian_schedules.truncated(base, -1.0, 2.5)
    for at in at_quantiles(law, U):
        assert np.all(np.isfinite(at))
    assert np.all(at_quantiles(law, U)[0] <= 1.0)


def test_piecewise_with_traced_masses():
    def level_and_density(masses):
        return at_quantiles(schedules.piecewise(masses, (-5.0, 5.0)), u)

    u = np.float32([0.01, 0.5, 0.99])
    masses = np.float32([0.02, 0.05, 0.1, 0.22, 0.61])
    both = jax.jit(jax.vmap(level_and_density))(np.stack([masses, masses[::-1]]))
    level, log_pdf, _ = map(np.asarray, both)
    known = schedules.piecewise(masses, (-5.0, 5.0))
    for got, want in zip((level[0], log_pdf[0]), at_quantiles(known, u)):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(level[0], -level[1][::-1], rtol=1e-4)
    slopes = jax.jit(jax.jacfwd(level_and_density))(np.float32([1.0, 0.0, 2.0, 0.0, 3.0]))
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
    # also of the density in an empty cell, -inf whatever the other masses are
    empty = jax.jit(jax.grad(lambda m: schedules.piecewise(m, (-1.0, 1.0)).log_pdf(0.5)))
    np.testing.assert_array_equal(empty(np.float32([1.0, 0.0])), 0)


def test_piecewise_of_many_uneven_cells():
    """Rounding in a long sum neither steps back nor leaves a draw without a density."""

    @jax.jit
    def sample(masses, u):
        law = schedules.piecewise(masses, (-12.0, 12.0))
        return law.cumulative, *at_quantiles(law, u)

    rng = np.random.default_rng(3)
    masses = np.exp(rng.normal(size=4000) * 4) * (rng.random(4000) > 0.3)
    u = draws.from_grid(rng.integers(2**23, size=200_000))
    cumulative, level, log_pdf, _ = sample(masses.astype(np.float32), u)
    assert np.all(np.diff(cumulative) >= 0)
    assert np.all(np.isfinite(level))
    assert np.all(np.isfinite(log_pdf))


# Laws from functions


@pytest.mark.parametrize("schedule", [masked.cosine_mdlm(), masked.log()])
def test_tabulated_follows_its_function(schedule):
    law, exact = schedules.tabulated(schedule.masking_rate), schedules.law_of(schedule)
    level, log_pdf, _ = map(np.asarray, at_quantiles(law, U))
    exact_level, exact_log_pdf, _ = map(np.asarray, at_quantiles(exact, U))
    np.testing.assert_allclose(level[4:], exact_level[4:], atol=1e-3)
    np.testing.assert_allclose(log_pdf[4:], exact_log_pdf[4:], atol=0.03)
    np.testing.assert_allclose(level[:4], exact_level[:4], rtol=0.05)
    # The distribution function is that of the schedule at every edge of the table.
    cdf = exact.cdf(law.edges)
    np.testing.assert_allclose(cdf[1:-1], law.cumulative[1:-1], rtol=1e-4)


def test_tabulated_bounded_support():
    law = schedules.tabulated(lambda t: 0.3 + 0.5 * t)
    exact = schedules.law_of(masked.clipped(0.3, 0.8))
    np.testing.assert_allclose(law.support, exact.support, rtol=1e-6)
    level, log_pdf, _ = at_quantiles(law, U)
    exact_level, exact_log_pdf, _ = at_quantiles(exact, U)
    np.testing.assert_allclose(level, exact_level, atol=1e-6)
    np.testing.assert_allclose(log_pdf, exact_log_pdf, atol=0.03)


def test_tabulated_accepts_jax_and_float32_functions():
    exact = schedules.law_of(masked.cosine_squared()).icdf(U)
    knots = np.linspace(0, 1, 2001)
    for rate in (
        lambda t: jnp.sin(jnp.pi / 2 * t) ** 2,
        lambda t: jnp.sin(jnp.pi / 2 * jnp.asarray(t, jnp.float32)) ** 2,
        lambda t: np.interp(t, knots, np.sin(np.pi / 2 * knots) ** 2),
    ):
        level, log_pdf, _ = at_quantiles(schedules.tabulated(rate), U)
        assert np.all(np.isfinite(level))
        assert np.all(np.isfinite(log_pdf))
        np.testing.assert_allclose(level[4:], exact[4:], atol=2e-3)
    assert jax.jit(lambda u: schedules.tabulated(lambda t: t).icdf(u))(0.25).shape == ()


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (lambda t: 1 - t, "must not fall"),
        (lambda t: t + 0.3 * np.sin(6 * np.pi * t) * t * (1 - t) * 2, "must not fall"),
        (lambda t: np.clip(2 * t, 0, 1), "no density"),
        (lambda t: np.clip(2 * t - 1, 0, 1), "no density"),
        (lambda t: np.where(t < 0.4, t, np.maximum(0.4, 2 * t - 0.9)).clip(0, 1), "no density"),
        (lambda t: 0.5 + 0 * t, "no density"),
        (lambda t: 0.5 + 1e-6 * t, "too little"),
        (lambda t: 1.1 * t, r"\[0, 1\]"),
        (lambda t: np.where(t > 0.5, np.nan, t), r"\[0, 1\]"),
        (lambda t: 0.5, "elementwise"),
    ],
)
def test_tabulated_refuses(rate, message):
    with pytest.raises(ValueError, match=message):
        schedules.tabulated(rate)
