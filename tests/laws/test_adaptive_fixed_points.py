"""Where mechanisms that adapt to the loss settle, under exact and under noisy losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adaptive_toys import FINE, SHIFT, density, eps_error, fresh, logsnr_of, x0_error
from variants import slow_except

from mdm_jax import variance
from mdm_jax.draws import DrawSpec, LossStats
from mdm_jax.variance.densities import second_moment
from mdm_jax.variance.learned.curves import logistic_curve

NOISES = {"exact": 0.0, "noisy": 0.5}


def adapt(transform, loss, steps, rows=128, start=None):
    """States after ``steps`` stratified batches of ``loss(u)``, without and with noise: [2, ...].

    Noise is a factor that is uniform on (0.5, 1.5).
    """
    spec = DrawSpec(rows, 1, (1,))
    chain = variance.chain(variance.stratified(), transform)

    def run(state, noise, key):
        def step(state, key):
            draw = variance.draw_batch(key, chain, state, spec)
            raw = loss(draw.u) * (1 + noise * (2 * draw.noise - 1))
            ones = jnp.ones_like(raw)
            return chain.update(state, draw, LossStats(raw, ones, ones, ones)), None

        return jax.lax.scan(step, state, jax.random.split(key, steps))[0]

    empty = chain.init(spec)
    given = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), empty[transform.name])
    noises = jnp.array(list(NOISES.values()))
    many = jax.jit(jax.vmap(lambda state, noise: run(empty | state, noise, jax.random.key(0))))
    return many({transform.name: given if start is None else start}, noises)[transform.name]


def split(states):
    """The states of :func:`adapt` by name."""
    return {n: jax.tree.map(lambda leaf, i=i: leaf[i], states) for i, n in enumerate(NOISES)}


def slope_law(u):
    z = logsnr_of(u) + SHIFT
    return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)


def total_variation(transform, state, target, cells=25):
    found, wanted = density(transform, state, FINE), np.asarray(target(FINE), np.float64)
    found, wanted = (a.reshape(cells, -1).mean(1) for a in (found, wanted))
    return 0.5 * np.abs(found / found.sum() - wanted / wanted.sum()).sum()


FIXED_POINTS = {
    "ema_bins": ([variance.ema_bins(25)], eps_error, eps_error, 500),
    "ema_bins_second": (
        [variance.ema_bins(25, target=second_moment)],
        eps_error,
        eps_error,
        500,
    ),
    "loss_history": ([variance.loss_history(25, 50)], eps_error, eps_error, 500),
    "learned_quantile": ([variance.learned_quantile(16)], eps_error, eps_error, 500),
    "cdcd_warp": (
        [variance.cdcd_warp(25, learning_rate=rate) for rate in (1e-2, 1e-3)],
        x0_error,
        slope_law,
        1500,
    ),
}


@pytest.mark.parametrize(
    "name",
    # The slope that cdcd_warp settles at is followed by test_adaptive_bias, too.
    slow_except({"ema_bins"}, FIXED_POINTS),
)
def test_fixed_point(name):
    """Total variation from W sqrt(E l^2), or from the slope of the clean error, below .05."""
    phases, loss, target, steps = FIXED_POINTS[name]
    state = None
    for transform in phases:
        state = adapt(transform, loss, steps, start=state)
    assert total_variation(transform, fresh(transform), target) > 0.3
    for kind, found in split(state).items():
        assert found.rejected == 0 and found.steps == steps * len(phases)
        assert total_variation(transform, found, target) < 0.05
        if name == "cdcd_warp":  # the loss is flat at the noisy end, where uniform levels have 1
            assert slope_law(FINE)[:800].mean() / slope_law(FINE).mean() < 4e-4
            share = density(transform, found, FINE)[:800].mean()
            assert share < {"exact": 0.01, "noisy": 0.1}[kind]


def test_logistic_curve_finds_its_parameters():
    """F = 2 / (1 + (odds / e^.4)^-3)."""

    def loss(u):
        return 2 * jax.nn.sigmoid(3 * (jnp.log1p(-u) - jnp.log(u) - 0.4))

    transform = variance.cdtd_warp(logistic_curve())
    shape = adapt(transform, loss, 2000).curves
    sharp = 1 + jax.nn.softplus(shape.steepness)
    found = np.stack([shape.middle, sharp, jax.nn.softplus(shape.scale)])[..., 0]
    np.testing.assert_allclose(found[:, 0], [0.4, 3, 2], rtol=2e-2)
    np.testing.assert_allclose(found[:, 1], [0.4, 3, 2], rtol=1e-1)


EDM2_LEVELS = np.array([-6.0, -2, 0, 2, 6])
EDM2_SCALE = [1.3844381721, 1.2926403984, 0.9162907319, 0.3057248919, 0.0073904924]


@pytest.mark.slow
@pytest.mark.parametrize(
    "std, expected",
    [
        pytest.param(1.0, EDM2_SCALE, id="unit"),
        pytest.param(0.5, np.zeros(5), marks=pytest.mark.slow, id="half"),
    ],
)
def test_uncertainty_follows_the_mean_loss(std, expected):
    """EDM's F-loss for unit data and sigma_data = .5; and zero for data of that deviation."""

    def loss(u, std):
        square = jnp.exp(-logsnr_of(u))
        clean = std**2 * square / (std**2 + square)
        return (square + 0.25) / (square * 0.25) * clean

    places = jnp.asarray((EDM2_LEVELS + 10) / 20, jnp.float32)
    transform = variance.uncertainty_weighting(lambda u: -logsnr_of(u) / 8, learning_rate=3e-3)
    np.testing.assert_allclose(np.log(loss(places, 1.0)), EDM2_SCALE, rtol=1e-4)
    states = adapt(transform, lambda u: loss(u, std), 1500)
    found = jax.jit(jax.vmap(lambda state: transform.profile(state, places)))(states)
    np.testing.assert_allclose(-found.log_weight[0], expected, atol=0.03)
    np.testing.assert_allclose(-found.log_weight[1], expected, atol=0.1)
    np.testing.assert_array_equal(found.log_density, 0)
