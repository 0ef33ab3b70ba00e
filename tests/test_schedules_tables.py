"""Laws from tables: piecewise-constant densities, and tabulated functions m(t)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import draws, schedules
from mdm_jax.schedules import masked

EXTREMES = np.array([2.0**-24, 3 * 2.0**-24, 1 - 3 * 2.0**-24, 1 - 2.0**-24])


# Piecewise-constant laws


def test_piecewise_density_is_exact():
    edges = np.array([-7.0, -2.0, 0.0, 0.5, 9.0])
    masses = np.array([1.0, 0.0, 3.0, 4.0])
    law = schedules.piecewise(masses, edges)
    np.testing.assert_allclose(law.masses, masses / 8)
    middle = (edges[1:] + edges[:-1]) / 2
    expected = np.array([1 / 8 / 5, 0, 3 / 8 / 0.5, 4 / 8 / 8.5])
    np.testing.assert_allclose(np.exp(law.log_pdf(middle)), expected, rtol=1e-6)
    u = (np.arange(4096) + 0.5) / 4096
    level = np.asarray(law.icdf(u))
    counts, _ = np.histogram(level, edges)
    np.testing.assert_array_equal(counts, [512, 0, 1536, 2048])
    # int f dlambda = E[f / p], here of f = 1 over the cells that hold mass, 5 + 0.5 + 8.5
    np.testing.assert_allclose(np.mean(np.exp(-law.log_pdf(level))), 14.0, rtol=1e-5)


def test_piecewise_at_its_own_edges():
    """Quantiles that fall on the table, and their neighbours, never land in an empty cell."""
    law = schedules.piecewise([1.0, 0.0, 0.0, 2.0, 0.0, 1.0], (-6.0, 6.0))
    table = np.asarray(law.cumulative)[1:-1]
    u = np.concatenate([table, np.nextafter(table, 0), np.nextafter(table, 1)]).astype(np.float32)
    level = law.icdf(u)
    assert np.all(np.isfinite(law.log_pdf(level)))
    slope = jax.grad(lambda x: jnp.sum(law.icdf(x)))(jnp.asarray(u))
    np.testing.assert_allclose(slope * np.exp(law.log_pdf(level)), 1, rtol=1e-5)


def test_piecewise_with_traced_masses():
    def level_and_density(masses):
        law = schedules.piecewise(masses, (-5.0, 5.0))
        level = law.icdf(u)
        return level, law.log_pdf(level)

    u = jnp.array([0.01, 0.5, 0.99])
    masses = jnp.array([0.02, 0.05, 0.1, 0.22, 0.61])
    level, density = jax.jit(jax.vmap(level_and_density))(jnp.stack([masses, masses[::-1]]))
    law = schedules.piecewise(masses, (-5.0, 5.0))
    np.testing.assert_allclose(level[0], law.icdf(u), rtol=1e-5)
    np.testing.assert_allclose(density[0], law.log_pdf(level[0]), rtol=1e-5)
    np.testing.assert_allclose(level[0], -level[1][::-1], rtol=1e-4)
    slopes = jax.jit(jax.jacfwd(level_and_density))(jnp.array([1.0, 0.0, 2.0, 0.0, 3.0]))
    assert all(np.all(np.isfinite(slope)) for slope in slopes)


def test_piecewise_of_many_uneven_cells():
    """Rounding in a long sum neither steps back nor leaves a draw without a density."""
    rng = np.random.default_rng(3)
    masses = np.exp(rng.normal(size=4000) * 4) * (rng.random(4000) > 0.3)
    law = schedules.piecewise(masses, (-12.0, 12.0))
    assert np.all(np.diff(law.cumulative) >= 0)
    u = draws.open_uniform(jax.random.key(5), (200_000,))
    assert np.all(np.isfinite(law.log_pdf(jax.jit(law.icdf)(u))))


# Laws from functions


@pytest.mark.parametrize(
    "schedule",
    [masked.cosine_md4(), masked.cosine_mdlm(), masked.power(2.0), masked.linear(), masked.log()],
    ids=lambda schedule: type(schedule).__name__,
)
def test_tabulated_follows_its_function(schedule):
    law, exact = schedules.tabulated(schedule.masking_rate), schedules.law_of(schedule)
    u = np.linspace(0.01, 0.99, 99).astype(np.float32)
    np.testing.assert_allclose(law.icdf(u), exact.icdf(u), atol=1e-3)
    np.testing.assert_allclose(law.log_pdf(exact.icdf(u)), exact.log_pdf(exact.icdf(u)), atol=0.01)
    np.testing.assert_allclose(law.icdf(EXTREMES), exact.icdf(EXTREMES), rtol=0.05)


def test_tabulated_bounded_support():
    law, exact = (
        schedules.tabulated(lambda t: 0.3 + 0.5 * t),
        schedules.law_of(masked.clipped(0.3, 0.8)),
    )
    np.testing.assert_allclose(law.support, exact.support, rtol=1e-6)
    np.testing.assert_allclose(law.icdf(EXTREMES), exact.icdf(EXTREMES), atol=1e-6)


def test_tabulated_accepts_jax_and_float32_functions():
    exact = schedules.law_of(masked.cosine_squared())
    u = np.linspace(0.05, 0.95, 19)
    for rate in (
        lambda t: jnp.sin(jnp.pi / 2 * t) ** 2,
        lambda t: jnp.sin(jnp.pi / 2 * jnp.asarray(t, jnp.float32)) ** 2,
        lambda t: np.interp(
            t, np.linspace(0, 1, 2001), np.sin(np.linspace(0, np.pi / 2, 2001)) ** 2
        ),
    ):
        law = schedules.tabulated(rate)
        np.testing.assert_allclose(law.icdf(u), exact.icdf(u), atol=1e-3)
        assert np.all(np.isfinite(law.log_pdf(law.icdf(EXTREMES))))
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
