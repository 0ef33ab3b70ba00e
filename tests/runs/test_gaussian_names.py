"""Every name that a config of a Gaussian run can choose, with its defaults: built, and one step.

The network is affine, of two parameters. The slow suite has all names, which take half a minute.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import slow_except

from mdm_jax import gaussian, variance
from mdm_jax.data.images import picture_dataset
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.launch import config as launch_config
from mdm_jax.launch import names
from mdm_jax.launch.gaussian_family import gaussian_levels, gaussian_recipe
from mdm_jax.types import Batch

pytestmark = pytest.mark.keyless  # nothing is drawn but the levels of a step

ROWS, LENGTH = 4, 2
WHOLE = np.ones((ROWS, LENGTH), bool)
DATA = np.linspace(-1, 1, ROWS * LENGTH, dtype=np.float32).reshape(ROWS, LENGTH)
BATCH = Batch(DATA, WHOLE, WHOLE.astype(np.int32), np.ones(ROWS, np.int32))
PARAMS = np.array([0.3, 0.1], np.float32)
PICTURES = picture_dataset(
    dict.fromkeys(("train", "valid", "test"), np.arange(32, dtype=np.uint8).reshape(8, 4) % 7),
    num_levels=7,
    event_shape=(2, 2),
    settings={},
    headline="",
)
SETTINGS = launch_config.get_config()

CHOICES = {
    **{f"recipe {name}": {"recipe": name} for name in names.RECIPES},
    **{f"law {name}": {"law": name} for name in names.GAUSSIAN_LAWS},
    **{
        f"modifier {name}": {"modifiers": (name,), "recipe": "v_prediction"}
        for name in names.GAUSSIAN_MODIFIERS
    },
    **{f"weighting {name}": {"weighting": name} for name in names.GAUSSIAN_WEIGHTINGS},
    **{f"output {name}": {"output": name} for name in names.OUTPUTS},
    **{f"path {name}": {"path": name} for name in names.PATHS},
}
CHOICES["modifier zero_terminal"]["weighting"] = "unit_output"  # else W is zero at pure noise
GRIDS = ("", *names.GAUSSIAN_GRIDS, *names.GAUSSIAN_LAWS)


def recipe_of(choice):
    section = SETTINGS.gaussian.copy_and_resolve_references()
    section.update(CHOICES[choice])
    return gaussian_recipe(section, PICTURES)


def trained(recipe):
    """``params, key -> (loss, parameters after a step of gradient descent)``."""
    objective, chain = gaussian.gaussian_loss(recipe), variance.identity()
    spec = objective.spec(ROWS, LENGTH)

    def step(params, key):
        draw = variance.draw_batch(key, chain, chain.init(spec), spec)

        def loss(params):
            stats = objective.loss(lambda x, *_: params[0] * x + params[1], BATCH, draw)
            return jnp.mean(stats.weight * stats.raw)

        value, gradient = jax.value_and_grad(loss)(params)
        return value, params - 0.01 * gradient

    return step


def sampled(sampler):
    """``levels [3] -> state`` after the first of two steps, from x0 half of what is seen."""

    def step(levels):
        context = gaussian_samplers.GaussianContext(
            keys=jax.random.split(jax.random.key(1), ROWS),
            index=jnp.int32(0),
            num_steps=2,
            previous_logsnr=levels[0],
            logsnr=levels[0],
            next_logsnr=levels[1],
            path=gaussian.paths.vp(),
        )
        x = jnp.asarray(DATA)
        state = gaussian_samplers.GaussianState(x, jnp.zeros_like(x), sampler.init(x))
        return sampler.step(context, lambda x, _: 0.5 * x, state)

    return step


def sampler_of(name):
    return names.GAUSSIAN_SAMPLERS[name](**names.settings(SETTINGS.sample, name))


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_a_training_step(choice):
    recipe, key = recipe_of(choice), jax.random.key(0)
    value, params = trained(recipe)(PARAMS, key)
    assert value > 0 and np.all(np.isfinite(params)) and np.all(params != PARAMS)
    # As compiled steps have it: the numbers of the recipe are arguments.
    traced = jax.jit(lambda recipe: trained(recipe)(PARAMS, key)[0])
    np.testing.assert_allclose(traced(jax.tree.map(np.float32, recipe)), value, rtol=1e-3)


@pytest.mark.parametrize("name", slow_except((), names.GAUSSIAN_SAMPLERS))
def test_a_step_of_a_sampler(name):
    state = sampled(sampler_of(name))(np.array([-2.0, 0.5, 3.0], np.float32))
    assert np.all(np.isfinite(state.x)) and np.any(state.x != DATA)
    np.testing.assert_allclose(state.x0, 0.5 * DATA, rtol=1e-6)


@pytest.mark.parametrize("name", slow_except({"edm"}, GRIDS))
def test_a_grid(name):
    section = SETTINGS.gaussian
    levels = gaussian_levels(name, 4, section, gaussian_recipe(section).law)
    assert levels.shape == (5,) and np.all(np.diff(levels) > 0) and levels[-1] == np.inf
    assert np.isfinite(levels[0]) and levels[0] >= section.low - 1e-3
