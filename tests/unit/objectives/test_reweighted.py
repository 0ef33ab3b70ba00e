"""Objectives with a factor on the weight of their levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import toy_oracle as oracle

from mdm_jax import corruption, gaussian, objectives, schedules, variance
from mdm_jax.draws import LossStats
from mdm_jax.gaussian import recipes, weightings
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.schedules import masked
from mdm_jax.testing import toys
from mdm_jax.variance.ppots import EprParameters, epr_curve

FACTORS = {
    "min_snr": (
        lambda: objectives.min_snr_factor(5.0),
        lambda level: np.minimum(1, 5 * np.exp(-level)),
    ),
    "p2": (
        lambda: objectives.p2_factor(2.0, 0.5),
        lambda level: (2 + np.exp(level)) ** -0.5,
    ),
    "flat": (objectives.p2_factor, lambda level: 1 / (1 + np.exp(level))),
    "law": (
        lambda: objectives.law_factor(masked.logit_normal(0.6, 0.8)),
        lambda level: (
            np.exp(-0.5 * ((level + np.log(1.5)) / 0.8) ** 2)
            / (0.8 * np.sqrt(2 * np.pi))
            * (2 + np.exp(level) + np.exp(-level))
        ),
    ),
    "entropy_rise": (
        lambda: objectives.entropy_rise_factor((1.0, 1.2, 1.1, 1.3, 3.0), floor=0.2),
        # Rises 0.2, -0.1, 0.2, 1.7 of mean 0.5; the second counts as 0.1. Their mean over rates is
        # (1.5 * 0.2 + 0.1 + 0.2 + 1.5 * 1.7) / 5.
        lambda level: (
            np.interp(1 / (1 + np.exp(level)), [0.2, 0.4, 0.6, 0.8], [0.2, 0.1, 0.2, 1.7]) / 0.63
        ),
    ),
    "sigmoid": (
        lambda: weightings.sigmoid(1.0).log_weight,
        lambda level: 1 / (1 + np.exp(level - 1)),
    ),
}


@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.slow), 2.0])
def test_masked_bound_with_a_factor(scale):
    """E over the law of weight times loss is int g(m) factor(m) dm, whatever the law.

    Under fixed counts the mean over masks is a function of the count; its levels are integrated.
    """
    law = schedules.logistic(0.0, scale)
    base = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID), law)
    u, du = oracle.gauss(np.linspace(0, 1, 61), 2)
    draws = oracle.fixed_count_draws(variance.identity(), u)
    batch = jax.tree.map(lambda a: jnp.repeat(a, 24 * len(u), axis=0), toys.toy_batch())
    draws = jax.tree.map(lambda a: jnp.tile(a, (1, 3, 1)), draws)
    all_objectives = {
        name: objectives.reweighted(base, FACTORS[name][0](), name) for name in FACTORS
    }

    @tiny.jit
    def run(draws):
        return [o.loss(oracle.model_fn, batch, draws) for o in (base, *all_objectives.values())]

    before, *others = run(draws)
    level = np.asarray(law.icdf(draws.u), np.float64)
    rates, dm = oracle.gauss(np.linspace(0, 1, 401), 4)
    count = np.ceil(rates * 4).astype(int)
    mean = np.stack([oracle.loss_table()[:, k == oracle.SIZE].mean(1) * 4 / k for k in range(1, 5)])
    for (name, objective), after in zip(all_objectives.items(), others, strict=True):
        factor = FACTORS[name][1]
        assert objective.bias == "biased" and name in objective.name and objective.law is law
        np.testing.assert_allclose(after.weight, before.weight * factor(level), rtol=2e-5)
        for field in ("raw", "eligible", "targets"):
            np.testing.assert_array_equal(getattr(after, field), getattr(before, field))
        found = np.asarray(after.weight * after.raw, np.float64).reshape(3, len(u), 24).mean(2) @ du
        factors = factor(np.log1p(-rates) - np.log(rates))
        expected = (mean[count - 1] * (dm * factors)[:, None]).sum(0)
        np.testing.assert_allclose(found, expected, rtol=2e-2 if scale > 1 else 1e-3)
        assert np.abs(expected / oracle.NELBO - 1).max() > 0.02


def test_rising_bits_weigh_levels_by_the_rise():
    """Alike on a straight line; 2 (1 - m), the derivative, of 1 - (1 - m)^2; none without rise."""
    rates = np.linspace(0.06, 0.94, 23)
    level = np.log1p(-rates) - np.log(rates)
    line = objectives.entropy_rise_factor(tuple(np.linspace(1, 2, 10)))(level)
    np.testing.assert_allclose(line, 0, atol=1e-5)
    middles = (np.arange(200) + 0.5) / 200
    curve = objectives.entropy_rise_factor(tuple(1 - (1 - middles) ** 2), floor=1e-3)(level)
    np.testing.assert_allclose(np.exp(curve), 2 * (1 - rates), rtol=1e-3)
    for bits in ((), (1.0, 2.0), (2.0, 3.0, 2.0), (1.0, float("nan"), 2.0)):
        with pytest.raises(ValueError, match="bits"):
            objectives.entropy_rise_factor(bits)


def test_unweighted_ppots_trains_the_clamped_losses_under_its_density():
    """int p(m) E min(f, limit n) dm, p the normalised curve; with the weight, the bound."""
    curve = EprParameters(0.5, 0.2, 0.6, 1.5, 3.0, 2.0, 2.0)
    bound = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID))
    u, du = oracle.gauss(np.linspace(0, 1, 241), 2)
    batch = jax.tree.map(lambda a: jnp.repeat(a, 24 * len(u), axis=0), toys.toy_batch())
    rates, dm = oracle.gauss(np.linspace(0, 1, 401), 4)
    density = epr_curve(curve, rates)
    share = np.bincount(np.ceil(rates * 4).astype(int), dm * density / (dm @ density))[1:]

    @tiny.jit
    def run(draws, limit):
        objective = objectives.clamped(bound, limit)
        assert objective.bias == "biased" and "clamped" in objective.name
        return objective.loss(oracle.model_fn, batch, draws)

    def mean(transform, limit):
        draws = oracle.fixed_count_draws(transform, u)
        draws = jax.tree.map(lambda a: jnp.tile(a, (1, 3, 1)), draws)
        stats = run(draws, limit)
        value = np.exp(draws.log_weight) * np.asarray(stats.weight * stats.raw, np.float64)
        return value.reshape(3, len(u), 24).mean(2) @ du

    for limit in (1e6, 1.2):
        by_count = [
            np.minimum(oracle.loss_table()[:, k == oracle.SIZE] * 4 / k, 4 * limit).mean(1)
            for k in range(1, 5)
        ]
        unweighted, expected = mean(variance.ppots_unweighted(curve), limit), share @ by_count
        np.testing.assert_allclose(unweighted, expected, rtol=3e-3)
        exact = mean(variance.ppots_parametric(curve), limit)
        np.testing.assert_allclose(exact, np.mean(by_count, axis=0), rtol=3e-3)
        assert np.all(np.abs(expected / oracle.NELBO - 1) > 0.01)
        assert (limit > 1e3) == np.allclose(exact, oracle.NELBO, rtol=3e-3)


def test_a_clamped_row_has_no_gradient():
    """At 10 nats for each of 4 eligible tokens; a row that reaches them just so keeps its own."""
    weight, eligible = jnp.full((1, 4, 1), 2.0), jnp.array([4.0, 4.0, 4.0, 0.0]).reshape(1, 4, 1)

    def loss(raw, _batch, _draw):
        return LossStats(raw, weight, eligible, eligible)

    def total(raw):
        stats = objectives.clamped(tiny.objective()._replace(loss=loss)).loss(raw, None, None)
        return jnp.sum(stats.weight * stats.raw), stats

    raw = jnp.array([19.0, 20.0, 21.0, 0.0]).reshape(1, 4, 1)
    slope, stats = jax.grad(total, has_aux=True)(raw)
    np.testing.assert_array_equal(slope.ravel(), [2, 2, 0, 2])
    np.testing.assert_array_equal(stats.raw.ravel(), [19, 20, 20, 0])


def test_factor_on_a_gaussian_loss_is_that_of_its_weighting():
    """min-SNR on the eps loss of the cosine law is the weighting of that name."""
    law, level = gaussian_schedules.cosine(), np.linspace(-6, 6, 13)
    for factor, weighting in (
        (objectives.min_snr_factor(3.0), weightings.min_snr(law, 3.0)),
        (objectives.p2_factor(2.0, 0.5), weightings.p2(law, 2.0, 0.5)),
    ):
        found = np.asarray(factor(level)) + np.asarray(law.log_pdf(level))
        np.testing.assert_allclose(found, weighting.log_weight(level), rtol=1e-6)
    objective = objectives.reweighted(
        gaussian.gaussian_loss(recipes.iddpm()), objectives.min_snr_factor(), "min-SNR"
    )
    assert objectives.describe(objective) == "gaussian_loss, min-SNR over gaussian_vp [biased]"
