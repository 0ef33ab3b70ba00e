"""Gaussian runs that know the class of a picture: data, training, guidance, restored pictures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import slow_except

from mdm_jax import gaussian, variance
from mdm_jax.gaussian import parameterisations, paths, recipes
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.presets import digits_gaussian, digits_masked
from mdm_jax.types import Batch

pytestmark = pytest.mark.usefixtures("one_device")


def conditional(**sample):
    config = digits_gaussian("smoke")
    config.gaussian.update(conditional=True, output="x0")
    config.sample.update(sampler="ddim", grid="uniform_logsnr", num_steps=2, **sample)
    return config


@pytest.fixture(scope="module")
def experiment(one_device):
    return make_experiment(conditional())


@pytest.fixture(scope="module")
def params(experiment):
    shapes = experiment.abstract_state().params
    return tiny.perturbed(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))


def test_the_network_reads_the_class_alone(experiment, params):
    x, level = jnp.ones((4, 64)), jnp.zeros((4, 1))

    @tiny.jit
    def outputs():
        documents = jnp.broadcast_to(jnp.array([1, 2, 11, 2])[:, None], (4, 64))
        return [experiment.apply_fn(params, x, level, known) for known in (documents, None)]

    found, unknown = map(np.asarray, outputs())
    np.testing.assert_allclose(found[1], found[3], rtol=1e-5)
    assert min(np.abs(found[0] - found[1]).max(), np.abs(found[1] - found[2]).max()) > 1e-3
    np.testing.assert_allclose(unknown, np.broadcast_to(found[:1], (4, 64)), rtol=1e-5)


def test_classes_are_hidden_at_the_stated_rate():
    """In each view of each row by itself; the loss is otherwise that of the documents seen."""
    recipe = recipes.Recipe(
        recipes.vdm().law, gaussian.weightings.elbo(), parameterisations.x0(), paths.vp()
    )
    objective = gaussian.gaussian_loss(recipe, class_dropout=0.3)
    rows, length = 4000, 2

    documents = jnp.repeat(2 + jnp.arange(rows)[:, None] % 3, length, axis=1)
    whole = jnp.ones((rows, length), bool)
    batch = Batch(jnp.zeros((rows, length)), whole, documents, jnp.ones(rows, jnp.int32))
    chain, spec = variance.repeat(2), objective.spec(rows, length)
    assert spec.event_shape == (3,)

    @tiny.jit
    def run():
        seen = []

        def model_fn(inputs, logsnr, documents):
            seen.append(documents)
            return 0.1 * documents.astype(float)

        draw = variance.draw_batch(jax.random.key(0), chain, chain.init(spec), spec)
        return draw, objective.loss(model_fn, batch, draw), seen[0]

    draw, stats, shown = run()
    shown = np.asarray(shown).reshape(rows, 2, length)  # the views of a row are adjacent
    assert (shown[..., 0] == shown[..., 1]).all()
    hidden = shown[..., 0] == 1
    np.testing.assert_array_equal(hidden.T, np.asarray(draw.noise[..., 2]) < np.float32(0.3))
    np.testing.assert_array_equal(
        shown[~hidden], np.asarray(documents)[:, None].repeat(2, 1)[~hidden]
    )
    assert abs(hidden.mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / hidden.size)
    assert abs(np.corrcoef(hidden.T)[0, 1]) < 4 / np.sqrt(rows)
    factor = np.exp(-np.asarray(recipe.output.log_eps_weight(recipe.path, recipe.law.icdf(draw.u))))
    expected = (0.01 * shown.astype(float) ** 2).sum(-1).T[..., None] * factor
    np.testing.assert_allclose(stats.raw, expected, rtol=1e-4)
    assert gaussian.gaussian_loss(recipe).spec(rows, length).event_shape == (2,)
    with pytest.raises(ValueError, match="class_dropout in"):
        gaussian.gaussian_loss(recipe, class_dropout=1.0)


@pytest.mark.slow
def test_samples_are_of_the_classes_asked_for_and_guided_ones_differ(experiment, params):
    jobs = make_experiment(conditional(classes=(3, 7))).jobs
    assert [set(job.documents) for job in jobs] == [{5}, {9}, {5}, {9}]
    canvas, documents = (
        np.stack([getattr(job, n) for job in jobs]) for n in ("canvas", "documents")
    )

    def drawn(**sample):
        generate = make_experiment(conditional(**sample)).generate
        return np.asarray(generate(params, jax.random.key(0), canvas, documents))

    plain, guided = drawn(), drawn(guidance=4.0)
    np.testing.assert_array_equal(plain, drawn(guidance=1.0))
    assert np.any(plain != guided)
    nowhere = {"low": 50.0, "high": 60.0, "rescale": 0.0}
    np.testing.assert_array_equal(plain, drawn(guidance=4.0, class_guidance=nowhere))


REFUSED = {
    "guidance": (
        {"sample.guidance": 2.0, "gaussian.conditional": False},
        "train with gaussian.con",
    ),
    "classes": ({"sample.classes": (1,), "gaussian.conditional": False}, "sample.classes=.1,."),
    "no class": ({"sample.classes": (10,)}, "10 is none of the classes 0 to 9"),
    "no dropout": ({"sample.guidance": 2.0, "gaussian.class_dropout": 0.0}, "without classes too"),
    "range": ({"sample.class_guidance.low": 200.0}, "class_guidance.low"),
    "interval": (
        {"sample.class_guidance": {"low": 3.0, "high": 2.0, "rescale": 0.0}},
        "low < high",
    ),
    "noise_by": ({"train.noise_by": "example"}, "noise_by=slot"),
    "masked": ({"process": "masked", "sample.classes": (1,)}, "sample.classes is for process=gau"),
    "masked 0": ({"process": "masked", "sample.restore_from": 0.0}, "sample.restore_from is for"),
}


@pytest.mark.parametrize("case", slow_except({"guidance", "masked 0"}, REFUSED))
def test_settings_that_do_not_fit_are_refused(case):
    changes, words = REFUSED[case]
    config = conditional() if "process" not in changes else digits_masked("smoke")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=words):
        make_experiment(config)


@pytest.mark.slow
def test_a_restored_picture_begins_at_its_noisy_version():
    """At a high logSNR it is nearly the original, and a row does not depend on its batch."""
    config = conditional(restore_from=7.0)
    experiment = make_experiment(config)
    levels = experiment.family.levels("uniform_logsnr", 2)
    assert levels[0] == 7 and levels[-1] == np.inf
    jobs = experiment.jobs
    canvas = np.stack([job.canvas for job in jobs])
    np.testing.assert_array_equal(canvas, [job.original for job in jobs])
    key = jax.random.key(1)
    degraded = experiment.family.degraded(key, canvas)
    assert 0 < np.std(degraded - canvas) < 8 * 3 * np.exp(-3.5)
    zero = experiment.initial_state().params  # x0 = 0 everywhere: grey
    np.testing.assert_array_equal(experiment.generate(zero, key, canvas), 8)
    np.testing.assert_array_equal(experiment.family.degraded(key, canvas[2:], 2), degraded[2:])
