"""Grids of levels, and the densities and bins that follow from a table of moments."""

import numpy as np
import pytest

from mdm_jax import corruption, meter, objectives, schedules
from mdm_jax.meter import levels, nested
from mdm_jax.schedules import masked
from mdm_jax.testing import toys
from mdm_jax.variance.densities import log_spaced_edges


def toy_objective(law):
    return objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID), law)


def test_optimal_density_is_proportional_to_the_root_of_the_second_moment():
    """With the exact moments of the toy on the grid, ratios of the published p*."""
    rates = np.array([0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
    g = [3.64258714, 3.69655168, 3.83618124, 4.00281835, 4.19624705, 4.41625134, 4.53615184]
    v = [519.17072821, 46.44006675, 12.22110700, 5.71662007, 2.84920031, 0.89900367, 0]
    c = [1.43546657, 1.28866592, 0.96867146, 0.66850215, 0.40467238, 0.19720688, 0.12191807]
    best = [3.94481806, 1.33772722, 0.90189636, 0.80817563, 0.77981049, 0.77488193, 0.77674369]
    table = meter.LevelTable(
        rates,
        1 - rates,
        np.ones(7),
        None,
        None,
        np.zeros(7),
        rows=1,
        masks_per_level=2,
        passes=1,
        rows_left_out=0,
    )
    target = np.array(v) + np.square(g) + np.array(c)
    found = meter.optimal_density(table, target)
    np.testing.assert_allclose(found / found[-1], np.array(best) / best[-1], rtol=1e-7)
    np.testing.assert_allclose(np.trapezoid(found, rates), 1)
    with pytest.raises(ValueError, match="zero everywhere"):
        meter.optimal_density(table, -target)


def test_grid_and_rates_are_checked():
    grid = meter.rate_grid(16)
    assert len(grid) == 16
    assert grid[0] == pytest.approx(1e-3)
    assert grid[-1] == 1
    assert np.all(np.diff(meter.rate_grid(8, 0.3, 0.8)) > 0)
    with pytest.raises(ValueError, match="rate_grid needs"):
        meter.rate_grid(3)
    objective = toy_objective(law=schedules.law_of(masked.clipped(0.3, 0.8)))
    for outside in ([0.1, 0.2, 0.5], [0.1, 0.5, 0.9], [0.1, 0.5], [0.3, 0.81]):
        with pytest.raises(ValueError, match="beyond those of the law, which covers 0.3 to 0.8"):
            levels.quantiles_of(objective, np.array(outside))
    ends = levels.quantiles_of(objective, np.array([0.3, 0.55, 0.8]))
    np.testing.assert_allclose(ends, [1, 0.5, 0], atol=1e-6)
    with pytest.raises(ValueError, match="not told apart by the law, which covers 0.3 to 0.8"):
        levels.quantiles_of(objective, np.array([0.5, 0.5 + 1e-9]))
    with pytest.raises(ValueError, match="must increase"):
        levels.quantiles_of(objective, np.array([0.5, 0.4]))


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_binned_moments_are_those_of_the_bins_of_the_quantile(exponent):
    """Moments that are powers of 1 - u, so that interpolation of their logarithm's argument is
    exact on a fine table, whatever rates the law has there."""
    objective = toy_objective(law=schedules.law_of(masked.power(exponent)))
    noise = np.geomspace(1e-3, 1, 400)  # 1 - u
    rates = noise**exponent
    quantiles = levels.quantiles_of(objective, rates)
    np.testing.assert_allclose(1 - quantiles, noise, rtol=1e-3)
    moments = nested.CrossedMoments(*(noise**p for p in (-1.0, 0.0, -0.5, 1.0, 0.5)))
    both = levels.Moments(moments, moments)
    table = meter.LevelTable(
        rates, quantiles, noise, both, None, noise, rows=1, masks_per_level=2, passes=1,
        rows_left_out=0,
    )  # fmt: skip
    edges = log_spaced_edges(8, 1e-2)
    found = meter.binned_moments(table, both, edges)
    middle = np.sqrt((1 - edges[1:-1]) * (1 - edges[:-2]))
    for values, power in ((found.second, 1.0), (found.data, -0.5), (found.mean, 0.25)):
        np.testing.assert_allclose(values[:-1], middle**power, rtol=2e-3)
