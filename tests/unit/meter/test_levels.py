"""Grids of levels, and the densities and bins that follow from a table of moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import slow_except

from mdm_jax import corruption, gaussian, meter, objectives, schedules, variance
from mdm_jax.draws import DrawSpec, iid
from mdm_jax.gaussian import recipes
from mdm_jax.meter import levels, nested
from mdm_jax.schedules import masked
from mdm_jax.testing import toys
from mdm_jax.types import Batch
from mdm_jax.variance.densities import log_spaced_edges, piecewise_density
from mdm_jax.variance.warps import importance


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


LOGSNR = np.linspace(-5.0, 7.0, 25)
HALVES = piecewise_density((0.0, 0.5, 1.0), (1.0, 3.0))
"""Of quantiles: the cleaner half three times as often."""


def heights(law):
    """HALVES over the logSNR, relative to the law."""
    return np.where(np.asarray(law.cdf(LOGSNR)) < 0.5, 0.5, 1.5)


def weighting_of(objective, transform, state=None):
    chain = variance.chain(variance.stratified(), transform)
    state = chain.init(DrawSpec(4, 1, (1,))) if state is None else {"stratified": (), **state}
    found = jax.jit(lambda s: meter.effective_weighting(objective, chain, s, LOGSNR))(state)
    return tuple(np.asarray(a, np.float64) for a in found)


def test_a_weight_that_pays_for_the_density_keeps_the_recipe():
    """EDM's W = N(lambda; 2.4, 2.4^2) (1 + exp(-lambda) / sigma_data^2), whatever is drawn."""
    recipe = recipes.edm()
    law = np.exp(-0.5 * ((LOGSNR - 2.4) / 2.4) ** 2) / (2.4 * np.sqrt(2 * np.pi))
    weight = law * (1 + 4 * np.exp(-LOGSNR))
    objective = gaussian.gaussian_loss(recipe)
    drawn, weighting = weighting_of(objective, variance.mirror())
    np.testing.assert_allclose(drawn, law, rtol=1e-4)
    np.testing.assert_allclose(weighting, weight, rtol=1e-4)
    drawn, weighting = weighting_of(objective, importance(HALVES))
    np.testing.assert_allclose(drawn, law * heights(recipe.law), rtol=1e-4)
    np.testing.assert_allclose(weighting, weight, rtol=1e-4)


def test_without_importance_weight_the_law_times_the_loss_weight_is_minimised():
    """Masked: per rate m the bound weighs 1 and a law's own integrand its density; in logSNR these
    are times m (1 - m)."""
    rate = 1 / (1 + np.exp(LOGSNR))
    law = schedules.law_of(masked.power(2.0))  # density of the rate 1 / (2 sqrt(m))
    bound = toy_objective(law)
    own = objectives.reweighted(bound, objectives.law_factor(law), "law")
    jacobian = rate * (1 - rate)
    for objective, expected in ((bound, 1.0), (own, 0.5 / np.sqrt(rate))):
        drawn, weighting = weighting_of(objective, variance.mirror())
        np.testing.assert_allclose(drawn, 0.5 / np.sqrt(rate) * jacobian, rtol=1e-4)
        np.testing.assert_allclose(weighting, expected * jacobian, rtol=1e-4)


def test_biased_transforms_change_what_is_minimised():
    """By the density that they draw, or by the weight that they learn."""
    objective = gaussian.gaussian_loss(recipes.edm())
    _, kept = weighting_of(objective, variance.mirror())
    warp = variance.cdcd_warp(2)
    fresh = warp.init(DrawSpec(4, 1, (1,)))
    # Over the noise 1 - u: rises of 3 and 1 in cells of one width.
    heights_of = fresh.averages._replace(heights=jnp.log(jnp.array([[3.0, 1.0]])))
    drawn, weighting = weighting_of(
        objective, warp, {"cdcd_warp": fresh._replace(averages=heights_of)}
    )
    factor = heights(objective.law)
    np.testing.assert_allclose(weighting / kept, factor, rtol=1e-4)
    np.testing.assert_allclose(drawn / weighting_of(objective, variance.mirror())[0], factor, 1e-4)
    learned = variance.uncertainty_weighting(lambda u: u, 4)
    state = learned.init(DrawSpec(4, 1, (1,)))._replace(coefficients=jnp.arange(4.0) / 4)
    drawn, weighting = weighting_of(objective, learned, {learned.name: state})
    u = jnp.asarray(objective.law.cdf(LOGSNR))[:, None]
    scale = learned.profile(state, u).log_weight[:, 0]
    assert np.ptp(scale) > 0.5
    np.testing.assert_allclose(weighting / kept, np.exp(scale), rtol=1e-4)


def test_levels_outside_of_the_law_and_unknown_weights():
    law = schedules.law_of(masked.clipped(0.3, 0.8))
    drawn, weighting = weighting_of(toy_objective(law), variance.mirror())
    rate = 1 / (1 + np.exp(LOGSNR))
    outside = (rate < 0.3) | (rate > 0.8)
    assert outside.any() and not np.any(drawn[outside]) and not np.any(weighting[outside])
    assert np.all(weighting[~outside] > 0)
    with pytest.raises(ValueError, match="next_token states no weight by level"):
        weighting_of(objectives.next_token(toys.MASK_ID), variance.mirror())
    hidden = importance(HALVES)._replace(profile=None)
    with pytest.raises(ValueError, match="states no density of its levels"):
        weighting_of(toy_objective(law), hidden)


LAW = schedules.law_of(masked.power(2.0))
STATED = {
    "masked": lambda: toy_objective(LAW),
    "min_snr": lambda: objectives.reweighted(
        toy_objective(LAW), objectives.min_snr_factor(2.0), "min_snr"
    ),
    "block": lambda: objectives.block_nelbo(corruption.fixed_count(3), 2, LAW),
    "partition": lambda: objectives.partition_nelbo(3, LAW),
    "uniform": lambda: objectives.uniform_nelbo(3, LAW),
    "gaussian": lambda: gaussian.gaussian_loss(recipes.sd3(), gaussian.scaled_integers(3)),
}


@pytest.mark.parametrize("name", slow_except({"min_snr", "gaussian"}, STATED))
def test_the_weight_that_an_objective_states_is_that_of_its_losses(name):
    """Weight times the share of target elements, on any draw."""
    objective = STATED[name]()
    tokens = np.array([[0, 1, 2, 1], [2, 2, 0, 1]])
    batch = Batch(tokens, tokens >= 0, np.ones_like(tokens), np.full(2, 4))
    draw = iid(jax.random.key(0), objective.spec(2, 4))

    def network(inputs, logsnr, documents):
        shape = (len(inputs), 4)
        return jnp.zeros(shape if name == "gaussian" else (*shape, 4))

    stats = objective.loss(network, batch, draw)
    found = stats.weight * stats.targets / stats.eligible
    stated = jnp.exp(objective.log_level_weight(objective.law.icdf(draw.u)))
    np.testing.assert_allclose(found, jnp.broadcast_to(stated, found.shape), rtol=1e-5)
