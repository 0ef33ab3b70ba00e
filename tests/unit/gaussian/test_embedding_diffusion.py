"""Diffusion of token embeddings (CDCD): score interpolation, bound and samples, by enumeration."""

import functools

import embedding_toy as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import zoo

from mdm_jax.draws import Draw
from mdm_jax.gaussian import categorical, paths
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.gaussian.categorical import NoisyTokens
from mdm_jax.gaussian.categorical.objective import cdcd_loss
from mdm_jax.likelihood import make_evaluate
from mdm_jax.models import TransformerConfig
from mdm_jax.types import Batch

LAW = gaussian_schedules.uniform_logsnr(-6.0, 3.0)


def test_embeddings_have_one_norm_and_the_mask_none():
    table = np.array([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0], [5.0, 1.0]], np.float32)

    @zoo.quick
    def run(table):
        vectors, back = jax.vjp(lambda t: categorical.unit_embeddings(t, 3), table)
        return vectors, back(vectors)[0]

    vectors, slope = run(table)
    np.testing.assert_allclose(np.square(vectors).sum(-1), [2, 0, 2, 0], atol=1e-6)
    np.testing.assert_allclose(vectors[0], np.sqrt(2) * np.array([0.6, 0.8]), rtol=1e-6)
    np.testing.assert_allclose(slope, 0, atol=1e-3)  # the norm does not follow the table's


@pytest.mark.parametrize(
    "noising",
    [paths.vp(), pytest.param(paths.ve(), marks=pytest.mark.slow)],
    ids=lambda path: path.name,
)
def test_score_interpolation_is_the_posterior_mean(noising):
    """E[e | x] by enumeration, and by the gradient of log p(x): alpha E[e | x] = x + sigma^2 s."""
    exact, rng = toy.ExactEmbeddings(noising), np.random.default_rng(0)
    x = np.float32(rng.normal(size=(6, 2, toy.SIZE)) * 1.5)
    logsnr = np.linspace(-3, 2, 6, dtype=np.float32)[:, None]
    masked, free = jnp.full((6, 2), toy.MASK), jnp.zeros((6, 2), bool)

    @zoo.quick
    def run(x):
        outputs = exact.run(None, NoisyTokens(masked, x, free), logsnr)

        def log_density(x):
            joint = exact.log_joint(x, free, masked, logsnr)
            return jax.nn.logsumexp(joint, axis=-1).sum(), jax.nn.softmax(joint, axis=-1)

        score, joint = jax.grad(log_density, has_aux=True)(x)
        level = logsnr[..., None]
        by_score = (x + noising.sigma(level) ** 2 * score) / noising.alpha(level)
        by_rows = jnp.einsum("ns,sld->nld", joint, exact.table[toy.ROWS])
        return categorical.posterior_mean(outputs, exact.table), by_rows, by_score

    found, by_rows, by_score = run(x)
    np.testing.assert_allclose(found, by_rows, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found, by_score, rtol=1e-3, atol=1e-3)


def rows_of_the_toy(count):
    tokens = jnp.asarray(np.repeat(toy.ROWS, count, axis=0), jnp.int32)
    ones = jnp.ones(tokens.shape, jnp.int32)
    return Batch(tokens, ones > 0, ones, ones.sum(-1))


def test_the_bound_of_the_exact_model_is_the_entropy():
    """With the posterior mean the reverse process is exact, so that the mean bound is H(rows)."""
    exact = toy.ExactEmbeddings()
    estimator = categorical.embedding_estimator(exact, exact.run, low=-12.0, high=5.0, passes=16)
    rows = rows_of_the_toy(100)
    found = make_evaluate(estimator, 8)(None, jax.random.key(0), [rows])
    nats = found.replicate_row_nats.reshape(8, 5, 100).mean(-1) @ toy.PROBS
    error = nats.std(ddof=1) / 8**0.5
    assert error < 0.02
    assert abs(nats.mean() - toy.ENTROPY) < 4 * error
    # The cross-entropy by level goes from that of the marginals, at high noise, to none.
    marginals = [np.bincount(toy.ROWS[:, i], toy.PROBS, 3) for i in range(2)]
    most = sum(-(m * np.log(m)).sum() for m in marginals) / 2
    weighted = np.average(found.levels.nats[-1:])
    assert found.levels.nats[0] < 0.01 < 0.7 * most < weighted


def test_the_loss_is_the_cross_entropy_of_what_is_not_given():
    exact, count = toy.ExactEmbeddings(), 40
    rows = rows_of_the_toy(count)
    objective = cdcd_loss(
        LAW, exact.noising, toy.SIZE, toy.MASK, given=0.5, self_conditioning=False
    )
    spec = objective.spec(5 * count, 2)
    assert spec.event_shape == (2, toy.SIZE + 1) and objective.bias == "biased"
    noise = jax.random.uniform(jax.random.key(0), (2, 5 * count, 2, toy.SIZE + 1))
    u = jnp.full((2, 5 * count, 1), 0.3)
    stats = zoo.quick(lambda draw: objective.loss(functools.partial(exact.run, None), rows, draw))(
        Draw(u, jnp.zeros_like(u), noise)
    )
    assert set(np.unique(stats.eligible)) == {1, 2}
    np.testing.assert_array_equal(stats.eligible, stats.targets)
    np.testing.assert_array_equal(stats.weight, 1)
    assert stats.raw.shape == (2, 5 * count, 1) and np.all(np.asarray(stats.raw) >= 0)


def test_samples_of_the_exact_model_have_the_law_of_the_data():
    """Frequencies of 4000 rows along 64 steps; given tokens stay, and are conditioned on."""
    exact = toy.ExactEmbeddings()
    grid = np.append(np.linspace(-12, 4, 64), np.inf)
    generate = categorical.make_embedding_generator(
        exact, exact.run, gaussian_samplers.ddim(), grid
    )
    canvas = np.full((4000, 2), toy.MASK, np.int32)
    canvas[2000:, 0] = 2
    tokens = np.asarray(generate(None, jax.random.key(0), canvas, row_offset=0))
    free = (tokens[:2000, None] == toy.ROWS).all(-1)
    error = np.sqrt(toy.PROBS * (1 - toy.PROBS) / 2000)
    assert np.all(abs(free.mean(0) - toy.PROBS) < 4 * error + 0.01), free.mean(0)
    given = tokens[2000:]
    assert np.all(given[:, 0] == 2)
    assert abs(np.mean(given[:, 1] == 0) - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 2000) + 0.01
    again = np.asarray(generate(None, jax.random.key(0), np.roll(canvas, -5, 0), row_offset=5))
    np.testing.assert_array_equal(again[:-5], tokens[5:])


def small_model(self_conditioning):
    config = TransformerConfig(
        6,
        width=8,
        depth=1,
        num_heads=2,
        condition_on_logsnr=True,
        self_conditioning=self_conditioning,
    )
    model = categorical.EmbeddingTransformer(config, 4, 5, paths.ve())
    tokens = jnp.array([[0, 1, 4], [2, 2, 3]])
    noise = jax.random.normal(jax.random.key(1), (2, 3, 4))
    given = jnp.array([[True, False, False]] * 2)
    return model, NoisyTokens(tokens, noise, given), jnp.zeros((2, 1))


@pytest.mark.parametrize("slopes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_self_conditioning_is_two_passes_of_the_rows_that_are_asked_for(slopes):
    """Logits; with ``slopes`` gradients at the noise, of which none goes through the estimate."""
    model, inputs, level = small_model(True)
    run, params = categorical.embedding_apply(model), tiny.parameters(model, 3)

    @zoo.quick
    def all_ways():
        table = model.apply(params, method="embeddings")
        once = run(params, inputs, level)
        mean = categorical.posterior_mean(once, table)
        mean = jnp.where(inputs.given[..., None], table[inputs.tokens], mean)

        def of_noise(inputs):
            def logits(noise):
                return run(params, inputs._replace(noise=noise), level).logits()

            return (
                jax.grad(lambda n: logits(n).sum())(inputs.noise)
                if slopes
                else logits(inputs.noise)
            )

        first = of_noise(inputs._replace(twice=jnp.array([True, False])))
        return once.logits(), first, of_noise(inputs._replace(estimate=mean))

    once, first, by_hand = all_ways()
    assert once.shape == (2, 3, 6)
    np.testing.assert_allclose(first[0], by_hand[0], rtol=1e-3, atol=1e-3)
    if not slopes:
        np.testing.assert_allclose(first[1], once[1], rtol=1e-5, atol=1e-5)
        assert np.abs(first[0] - once[0])[..., :5].max() > 5e-3


def test_without_self_conditioning_there_is_no_estimate():
    model, inputs, level = small_model(False)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), inputs, level))
    assert "estimate" not in shapes["params"]
    outputs = jax.eval_shape(model.apply, shapes, inputs, level)
    assert outputs.shape == (2, 3, 6)
