"""Likelihood of Gaussian diffusion: the bound in its parts, and the probability flow's density."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import special, stats

from mdm_jax import gaussian
from mdm_jax.gaussian import parameterisations, paths
from mdm_jax.gaussian.likelihood import PARTS, prior_divergence
from mdm_jax.testing import toys
from mdm_jax.types import Batch

X0, VP = parameterisations.x0(), paths.vp()
LAWS = {
    "narrow": toys.narrow_normal(),
    "pair": toys.symmetric_pair(),
    "skewed": toys.skewed_pair(),
}


def constant_half(x, logsnr, documents):
    return jnp.full_like(x, 0.5)


def oracle(law, path, output=X0):
    """The ideal network for independent elements; it ignores its parameters."""

    def apply_fn(params, x, logsnr, documents):
        z = x * jnp.exp(-path.log_alpha(logsnr))
        return parameterisations.convert(law.denoise(z, logsnr), x, path, logsnr, X0, output)

    return apply_fn


def exact_decoder(law):
    """The posterior p(x0 | z) of a mixture."""

    def decoder(x0, z, logsnr):
        level = jnp.full_like(z, logsnr)
        noise = gaussian.normal_decoder()(x0, z, logsnr)  # symmetric in x0 and z
        return law.log_density(x0) + noise - law.noisy_log_density(z, level)

    return decoder


def batch_of(data, eligible=None):
    rows = len(data)
    eligible = np.ones(data.shape, bool) if eligible is None else eligible
    return Batch(data, eligible, np.ones(data.shape, np.int32), np.full(rows, data.shape[1]))


def estimate(apply_fn, data, seed=0, batch_size=64, eligible=None, **settings):
    settings = {"output": X0, "path": VP, "passes": 4, "replicates": 4} | settings
    evaluate = gaussian.make_gaussian_likelihood(apply_fn, **settings)
    batches = [
        batch_of(
            data[i : i + batch_size], None if eligible is None else eligible[i : i + batch_size]
        )
        for i in range(0, len(data), batch_size)
    ]
    return evaluate(None, jax.random.key(seed), batches)


PARTS_ON_TEN = {  # entropy, exact bound and its three parts with ends [-10, 10], per element
    "narrow": (0.725791352645, 0.725793395839, -3.581152258411, 4.306937936097, 0.000007718153),
    "pair": (0.838239397968, 0.838239397969, -3.581347730103, 4.419564428622, 0.000022699450),
    "skewed": (0.640005315611, 0.640005372469, -3.581412185575, 4.221405356853, 0.000012201192),
}


@pytest.mark.parametrize("name", ["skewed"])  # one program is enough; all three hold
def test_the_bound_of_known_laws_in_three_parts(name):
    law, (entropy, bound, *parts) = LAWS[name], PARTS_ON_TEN[name]
    data = np.asarray(law.sample(jax.random.key(5), (512, 32)))
    settings = {"decoder": exact_decoder(law), "batch_size": 512}
    found = estimate(oracle(law, VP), data, low=-10.0, high=10.0, **settings)
    rows = found.replicate_row_parts.mean(1) / 32  # [3, N], nats per element
    error = rows.std(1, ddof=1) / np.sqrt(rows.shape[1])
    assert np.all(np.abs(rows.mean(1) - parts) < 5 * error + 2e-7)
    assert np.all(error < [2e-3, 0.15, 1e-6])
    # Noise and data are independent of each other in every row.
    assert abs(found.nats_per_dimension - bound) < 5 * found.data_standard_error_nats_per_dimension
    assert found.standard_error_nats_per_dimension < 0.15
    assert bound >= entropy


def test_the_prior_term():
    data = np.array([-1.2, 0.0, 0.7])
    with jax.enable_x64():
        for level in (-10.0, -3.0, 2.0):
            kept = special.expit(level)
            mean, variance = np.sqrt(kept) * data, 1 - kept
            expected = 0.5 * (variance + mean**2 - 1 - np.log(variance))
            np.testing.assert_allclose(prior_divergence(jnp.asarray(data), level), expected)
        # Averaged over N(0.3, 0.5^2).
        square = jnp.sqrt(jnp.asarray(0.34))
        expected = PARTS_ON_TEN["narrow"][-1]
        np.testing.assert_allclose(prior_divergence(square, -10.0), expected, atol=1e-12)


@pytest.mark.slow
def test_the_bound_does_not_depend_on_the_path_or_the_output():
    law = LAWS["skewed"]
    data = np.asarray(law.sample(jax.random.key(1), (4, 3)), np.float64)
    kinds = [("vp", "edm"), ("ve", "eps")]
    found = []
    with jax.enable_x64():
        for path_name, output_name in kinds:
            path, output = paths.by_name(path_name), parameterisations.by_name(output_name)
            settings = {"path": path, "output": output, "low": -6.0, "high": 6.0}
            settings |= {"decoder": gaussian.normal_decoder(), "replicates": 2, "passes": 2}
            found.append(estimate(oracle(law, path, output), data, **settings))
    for other in found[1:]:
        np.testing.assert_allclose(
            other.replicate_row_parts, found[0].replicate_row_parts, rtol=1e-9
        )


def test_the_diffusion_part_is_an_integral_over_levels():
    # A network whose noise is off by exp(lambda / 8) everywhere: 1/2 int exp(lambda / 4) dlambda.
    def apply_fn(params, x, logsnr, documents):
        return (x - jnp.sqrt(jax.nn.sigmoid(logsnr)) * 0.5) / jnp.sqrt(
            jax.nn.sigmoid(-logsnr)
        ) + jnp.exp(logsnr / 8)

    settings = {"output": parameterisations.eps(), "decoder": gaussian.normal_decoder()}
    data = np.full((8, 2), 0.5, np.float32)
    found = estimate(apply_fn, data, low=-4.0, high=4.0, passes=64, **settings)
    diffusion = found.replicate_row_parts[1] / 2
    exact = 2 * (math.exp(1) - math.exp(-1))
    # Stratified: each cell has width 1 / 8, and the integrand is smooth.
    np.testing.assert_allclose(diffusion.mean(), exact, rtol=1e-3)
    np.testing.assert_allclose(diffusion, exact, rtol=0.02)


GREYS = toys.GaussianMixture(np.full(4, 0.25), np.array([-1, -1 / 3, 1 / 3, 1]), 1e-3)


def test_the_bound_of_uniform_grey_values_is_tight():
    # The grey decoder is then the exact posterior, so the bound is log 4 at any cleanest level.
    tokens = np.random.default_rng(0).integers(0, 4, (128, 16))
    found = estimate(
        oracle(GREYS, VP),
        tokens,
        decoder=gaussian.grey_value_decoder(4),
        values=gaussian.scaled_integers(4),
        low=-12.0,
        high=1.0,
        batch_size=128,
        passes=8,
    )
    error = found.data_standard_error_bits_per_dimension
    assert abs(found.bits_per_dimension - 2.0) < 5 * error and error < 0.05
    assert found.parts_bits_per_dimension["reconstruction"] > 0.5


@pytest.mark.parametrize("num_values, logsnr", [(2, -3.0), (4, 1.0), (256, 13.0)])
def test_the_grey_decoder_is_a_softmax_over_values(num_values, logsnr):
    values = np.asarray(gaussian.scaled_integers(num_values)(np.arange(num_values)))
    z = np.linspace(-1.3, 1.3, 7).astype(np.float32)
    decoder = jax.jit(gaussian.grey_value_decoder(num_values))
    found = np.stack([decoder(jnp.full_like(z, v), z, logsnr) for v in values])
    logits = -0.5 * np.exp(logsnr) * np.square(z.astype(np.float64) - values[:, None])
    expected = special.log_softmax(logits, axis=0)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(np.exp(found.astype(np.float64)).sum(0), 1, rtol=2e-4)


def test_rows_are_keyed_by_number_and_padding_is_skipped():
    data = np.random.default_rng(2).normal(size=(6, 3)).astype(np.float32)
    eligible = np.ones((6, 3), bool)
    eligible[1, 2] = eligible[4] = False
    settings = {"decoder": gaussian.normal_decoder(), "low": -6.0, "high": 6.0}
    settings |= {"eligible": eligible, "passes": 2}
    run = functools.partial(estimate, lambda _, *args: constant_half(*args), data, **settings)
    found, pieces = run(batch_size=6), run(batch_size=2)
    np.testing.assert_allclose(
        pieces.replicate_row_parts, found.replicate_row_parts, rtol=1e-5, atol=1e-6
    )
    assert found.replicate_row_parts.shape == (3, 4, 5)
    np.testing.assert_array_equal(found.row_index, [0, 1, 2, 3, 5])
    np.testing.assert_array_equal(found.row_elements, [3, 2, 3, 3, 3])
    assert (found.rows_seen, found.rows, found.elements) == (6, 5, 14)
    np.testing.assert_array_equal(found.replicate_row_parts[2, 0], found.replicate_row_parts[2, 1])


def result(parts, elements):
    rows = len(elements)
    return gaussian.GaussianLikelihood(
        np.asarray(parts, float), np.asarray(elements), np.arange(rows), rows + 1, 3
    )


def test_what_is_reported():
    parts = [[[1.0, 2.0], [1.0, 4.0]], [[3.0, 5.0], [5.0, 5.0]], [[0.5, 0.5], [0.5, 0.5]]]
    found = result(parts, [2, 3])
    bits = 5 * math.log(2)
    assert found.nats == pytest.approx(14.0)
    assert found.bits_per_dimension == pytest.approx(14 / bits)
    expected = dict(zip(PARTS, np.array([4, 9, 1]) / bits))
    assert found.parts_bits_per_dimension == pytest.approx(expected)
    assert found.standard_error_nats == pytest.approx(2.0)  # totals 12 and 16
    assert found.standard_error_bits_per_dimension == pytest.approx(2 / bits)
    expected = dict(zip(PARTS, np.array([1, 1, 0]) / bits))
    assert found.standard_error_parts_bits_per_dimension == pytest.approx(expected)
    residual = np.array([5.5, 8.5]) - 14 / 5 * np.array([2, 3])
    error = np.sqrt(2 * np.sum(residual**2)) / 5
    assert found.data_standard_error_nats_per_dimension == pytest.approx(error)
    assert json.loads(json.dumps(found.to_dict()))["nats"] == 14.0
    assert "diffusion" in found.summary() and "1 rows without" in found.summary()
    single = result(np.ones((3, 1, 1)), [2])
    assert math.isnan(single.standard_error_nats)
    assert single.to_dict()["standard_error_nats"] is None
    assert single.to_dict()["data_standard_error_bits_per_dimension"] is None


def likelihood(**changes):
    settings = {"output": X0, "path": VP, "decoder": gaussian.normal_decoder()}
    settings |= {"low": -5.0, "high": 5.0, "passes": 1} | changes
    return gaussian.make_gaussian_likelihood(oracle(GREYS, VP), **settings)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"passes": 0}, "passes"),
        ({"replicates": 0}, "replicates"),
        ({"low": 5.0}, "low < high"),
        ({"high": math.inf}, "finite high"),
    ],
)
def test_settings_are_checked(changes, words):
    with pytest.raises(ValueError, match=words):
        likelihood(**changes)


def test_batches_are_checked():
    evaluate, key = likelihood(), jax.random.key(0)
    floats = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate(None, key, [batch_of(floats, np.zeros((2, 3), bool))])
    with pytest.raises(ValueError, match="values="):
        evaluate(None, key, [batch_of(np.zeros((2, 3), int))])
    with pytest.raises(ValueError, match="shape of the first"):
        blank = np.zeros((2, 3), bool)
        evaluate(None, key, [batch_of(floats, blank), batch_of(floats[:, :2], blank[:, :2])])
    with pytest.raises(ValueError, match="num_values"):
        gaussian.grey_value_decoder(1)


@functools.cache
def flow_program(apply_fn, path, output, probes):
    def run(key, data, grid, row_offset):
        return gaussian.ode_likelihood(
            key,
            lambda *args: apply_fn(None, *args),
            data,
            grid,
            path=path,
            output=output,
            probes=probes,
            row_offset=row_offset,
        )

    return tiny.jit(run)


def flow_density(apply_fn, data, grid, path=VP, output=X0, probes=None, row_offset=0):
    run = flow_program(apply_fn, path, output, probes)
    return jax.tree.map(np.asarray, run(jax.random.key(0), data, grid, row_offset))


LOG_DENSITIES = {  # at -1, 0.2 and 0.9
    "narrow": (-3.605791352645, -0.245791352645, -0.945791352645),
    "pair": (-0.349324119561, -4.015359413123, -0.362079221357),
    "skewed": (-0.736616940874, -0.609310373417, -1.169319116023),
}


@pytest.mark.parametrize(
    "name, path_name",
    [
        pytest.param("narrow", "ve", marks=pytest.mark.slow),
        pytest.param("pair", "flow", marks=pytest.mark.slow),
        ("skewed", "vp"),
    ],
)
def test_log_density_by_the_probability_flow(name, path_name):
    law, points = LAWS[name], np.array([-1.0, 0.2, 0.9])
    path = paths.by_name(path_name)
    with jax.enable_x64():
        grid = np.linspace(-28, 20, 481)
        output = parameterisations.v()
        model = oracle(law, path, output)
        found = flow_density(model, points[:, None], grid, path=path, output=output)
    np.testing.assert_allclose(found.log_density, LOG_DENSITIES[name], atol=5e-6)
    np.testing.assert_array_equal(found.standard_error, 0)
    # The flow in one dimension preserves quantiles.
    quantiles = np.sum(law.weights * stats.norm.cdf(points[:, None], law.means, law.std), axis=1)
    np.testing.assert_allclose(stats.norm.cdf(found.latent[:, 0]), quantiles, atol=2e-5)


COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])


def correlated(params, x, logsnr, documents):
    """The ideal denoiser of N(0, COVARIANCE) on the variance-preserving path."""
    z, extra = x * jnp.exp(-VP.log_alpha(logsnr)), jnp.exp(-logsnr)
    (a, b), (_, d) = COVARIANCE
    determinant = (a + extra) * (d + extra) - b**2
    inverse = (
        jnp.concatenate(
            [(d + extra) * z[:, :1] - b * z[:, 1:], (a + extra) * z[:, 1:] - b * z[:, :1]], axis=1
        )
        / determinant
    )
    return inverse @ jnp.asarray(COVARIANCE, x.dtype)


def test_exact_and_estimated_divergence_of_correlated_data():
    data = np.array([[0.3, -0.2], [1.0, 1.1], [-0.5, 0.6]])
    expected = stats.multivariate_normal(cov=COVARIANCE).logpdf(data)
    grid = np.linspace(-16, 16, 161)
    with jax.enable_x64():
        exact = flow_density(correlated, data, grid)
        probed = flow_density(correlated, data, grid, probes=64)
        moved = flow_density(correlated, data[[2, 0, 1]], grid, probes=64, row_offset=2)
    np.testing.assert_allclose(exact.log_density, expected, atol=2e-5)
    assert np.all(probed.standard_error > 1e-3)
    error = np.abs(probed.log_density - expected)
    assert np.all(error < 5 * probed.standard_error) and np.any(error > 1e-4)
    np.testing.assert_allclose(probed.latent, exact.latent, rtol=1e-12)
    np.testing.assert_allclose(moved.log_density[0], probed.log_density[2], rtol=1e-10)


@pytest.mark.slow
def test_the_flow_in_float32_and_its_order():
    model, points = oracle(LAWS["skewed"], VP), np.array([[-1.0], [0.2], [0.9]])
    with jax.enable_x64():
        coarse, middle, fine = (
            flow_density(model, points, np.linspace(-16, 16, n + 1)).log_density
            for n in (80, 160, 640)
        )
    order = np.log2(np.linalg.norm(coarse - fine) / np.linalg.norm(middle - fine))
    assert order == pytest.approx(4, abs=0.5)
    # One probe is exact in one dimension, but cannot know it.
    single = flow_density(model, np.float32(points), np.linspace(-16, 16, 161), probes=1)
    assert np.all(np.isnan(single.standard_error))
    assert single.log_density.dtype == np.float32
    np.testing.assert_allclose(single.log_density, middle, atol=5e-5)


@pytest.mark.parametrize(
    "data, grid, probes, words",
    [
        (np.zeros((1, 1)), [0.0, 1.0], 0, "probes"),
        (np.zeros(3), [0.0, 1.0], None, "float data"),
        (np.zeros((2, 2), int), [0.0, 1.0], None, "float data"),
        (np.zeros((2, 2)), [1.0, 0.0], None, "increasing"),
        (np.zeros((2, 2)), [0.0, np.inf], None, "finite"),
    ],
)
def test_the_flow_refuses(data, grid, probes, words):
    def run(key):
        return gaussian.ode_likelihood(
            key, constant_half, data, grid, path=VP, output=X0, probes=probes
        )

    with pytest.raises(ValueError, match=words):
        jax.eval_shape(run, jax.random.key(0))
