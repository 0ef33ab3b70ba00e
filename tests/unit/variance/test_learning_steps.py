"""What a learner does in a step, by hand: rates and decays, which no expectation depends on."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from adaptive_toys import fresh, one_batch

from mdm_jax import variance
from mdm_jax.launch.config import get_config
from mdm_jax.variance.densities import second_moment, squared_mean

pytestmark = pytest.mark.keyless

LEVELS = np.array([0.3, 0.8])
LOSSES = np.array([[2.0, 0.5], [1.0, 1.5], [0.2, 3.0]])  # of three batches
BATCHES = [one_batch([LEVELS], [row]) for row in LOSSES]


def adam(start, gradient, rate, b1=0.9, b2=0.999):
    """Iterates of Adam (Kingma and Ba 2015, algorithm 1) from the gradient at each."""
    x, first, second = np.asarray(start, np.float64), 0.0, 0.0
    for step in range(len(LOSSES)):
        g = np.asarray(gradient(x, step), np.float64)
        first, second = b1 * first + (1 - b1) * g, b2 * second + (1 - b2) * g**2
        mean, square = first / (1 - b1 ** (step + 1)), second / (1 - b2 ** (step + 1))
        x = x - rate * mean / (np.sqrt(square) + 1e-8)
        yield x


def learnt(transform):
    """State after the three batches."""
    update, state = zoo.quick(transform.update), fresh(transform)
    for batch in BATCHES:
        state = update(state, *batch)
    assert state.steps == 3 and state.rejected == 0
    return state


def test_time_warping():
    """One cell, F = exp(h) xi: steps with b2 = 0.99 down the mean of (F - loss)^2 + 0.0015 F(1)^2,
    and averages."""
    xi = 1 - LEVELS

    def gradient(h, step):
        penalty = 0.003 * np.exp(2 * h)
        return np.mean(2 * (np.exp(h) * xi - LOSSES[step]) * np.exp(h) * xi) + penalty

    average = start = np.log(2 * np.mean(LOSSES[0]))  # F(1) of the line with that mean
    for height in adam(start, gradient, 0.1, b2=0.99):
        average = 0.75 * average + 0.25 * height
    state = learnt(variance.cdcd_warp(1, learning_rate=0.1, decay=0.75))
    np.testing.assert_allclose(state.curves.heights, [[height]], rtol=1e-5)
    np.testing.assert_allclose(state.averages.heights, [[average]], rtol=1e-5)
    np.testing.assert_allclose(state.averages.widths, 0, atol=1e-6)


def test_learned_weighting():
    """One feature, s = c sqrt(2) cos(f u + p): steps down the mean of loss exp(-s) + s."""
    random = np.random.default_rng(5)
    frequency, phase = 2 * np.pi * random.standard_normal(), 2 * np.pi * random.random()
    feature = 2**0.5 * np.cos(frequency * LEVELS + phase)

    def gradient(c, step):
        return np.mean((1 - LOSSES[step] * np.exp(-c * feature)) * feature)

    *_, expected = adam(0.0, gradient, 0.1)
    transform = variance.uncertainty_weighting(lambda u: u, 1, learning_rate=0.1, seed=5)
    np.testing.assert_allclose(learnt(transform).coefficients, [expected], rtol=1e-5)


def test_learned_quantile():
    """Scores times (square / mean square of the past - 1); the first batch is its own past."""
    transform = variance.learned_quantile(1, learning_rate=0.1, decay=0.75)
    leaves, tree = jax.tree.flatten(fresh(transform).net)
    cuts = np.cumsum([leaf.size for leaf in leaves])[:-1]

    @zoo.quick
    def along(flat, change):
        def weighted(flat):
            parts = [jnp.reshape(p, a.shape) for p, a in zip(jnp.split(flat, cuts), leaves)]
            net = jax.tree.unflatten(tree, parts)
            return -jnp.mean(change * net.log_pdf(jnp.asarray(LEVELS, jnp.float32)))

        return jax.grad(weighted)(flat)

    squares = LOSSES**2
    means = squares.mean(1)
    past = [means[0], means[0], (0.75 * means[0] + means[1]) / 1.75]

    def gradient(flat, step):
        return along(np.float32(flat), np.float32(squares[step] / past[step] - 1))

    start = np.concatenate([np.ravel(leaf) for leaf in leaves])
    *_, expected = adam(start, gradient, 0.1)
    found = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(learnt(transform).net)])
    assert np.abs(found - start).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


DEFAULTS = {
    "ppots": {"decay": 0.999, "floor": 0.1, "warmup_steps": 100, "target": second_moment},
    "ppots_slopes": {"decay": 0.99, "floor": 0.2, "warmup_steps": 50, "target": second_moment},
    "ppots_binned": {"floor": 0.1},
    "ppots_parametric": {"floor": 0.1},
    "ema_bins": {"decay": 0.99, "floor": 0.01, "warmup_steps": 100, "target": squared_mean},
    "loss_history": {"num_bins": 32, "length": 10, "floor": 1e-3},
    "learned_quantile": {"learning_rate": 1e-2, "decay": 0.99},
    "cdcd_warp": {"num_bins": 100, "learning_rate": 1e-2, "decay": 0.99},
    "uncertainty_weighting": {"num_features": 128, "learning_rate": 1e-2},
    "clipped_mixture": {"share": 0.1},
    "log_uniform": {"smallest_rate": 1e-3},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_published_results(name):
    """Another default is another method under an old name: change RESULTS.md with it."""
    arguments = inspect.signature(getattr(variance, name)).parameters
    assert {key: arguments[key].default for key in DEFAULTS[name]} == DEFAULTS[name]


def test_the_default_chain():
    config = get_config().variance
    assert config.order == ("stratified", "ppots_slopes")
    assert {key: config.ppots_slopes[key] for key in ("decay", "floor", "warmup_steps")} == {
        "decay": 0.99,
        "floor": 0.2,
        "warmup_steps": 50,
    }
