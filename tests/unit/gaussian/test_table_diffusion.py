"""Diffusion of rows of tables (CDTD): cells as vectors, losses, samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from mdm_jax.draws import Draw
from mdm_jax.gaussian import categorical, paths
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.gaussian.categorical.sampling import codes_of
from mdm_jax.models import TransformerConfig
from mdm_jax.types import Batch

CELLS = categorical.Cells((2, 0, 3), (0.0, -2.0, 0.0), (1.0, 0.5, 1.0), (0.5, 1.0, 0.9), 9)
CODES = jnp.array([[0, 0, 0], [1, 8, 2], [0, 4, 1], [1, 3, 0]], jnp.int32)


@pytest.fixture(scope="module")
def network():
    config = TransformerConfig(1, width=8, depth=1, num_heads=2, condition_on_logsnr=True)
    model = categorical.TableTransformer(config, CELLS, 4, paths.vp())
    params = jax.jit(model.init)(jax.random.key(0), CODES, jnp.zeros((4, 1)))
    return model, params


def test_cells_are_vectors_and_back(network):
    model, params = network

    @zoo.quick
    def run(codes):
        vectors = model.apply(params, codes, method="clean")
        return vectors, codes_of(model, params, vectors)

    vectors, back = run(CODES)
    np.testing.assert_array_equal(back, CODES)
    np.testing.assert_allclose(vectors[:, 1, 0], [-2, 2, 0, -0.5])  # offset + scale * code
    np.testing.assert_array_equal(vectors[:, 1, 1:], 0)
    np.testing.assert_allclose(np.square(vectors[:, ::2]).sum(-1), 4, rtol=1e-5)
    assert CELLS.own().sum(1).tolist() == [2, 5, 3]
    np.testing.assert_array_equal(run(jnp.full_like(CODES, -1))[0], 0)


def test_losses_begin_at_what_is_known_without_the_row(network):
    """A new network has equal probabilities, and at high noise the mean for a number."""
    model, params = network
    objective = categorical.cdtd_loss(
        gaussian_schedules.uniform_logsnr(-12.0, 8.0), model.noising, CELLS, 4
    )
    spec = objective.spec(4, 3)
    assert spec.num_levels == 3 and spec.event_shape == (3, 4) and objective.bias == "biased"
    with pytest.raises(ValueError, match="3 columns, got 4"):
        objective.spec(4, 4)
    ones = jnp.ones(CODES.shape, jnp.int32)
    batch = Batch(CODES, ones > 0, ones, ones.sum(-1))
    u = jnp.broadcast_to(jnp.array([0.5, 1e-3, 0.2]), (1, 4, 3))
    noise = jax.random.uniform(jax.random.key(1), (1, 4, 3, 4))
    run = categorical.table_apply(model)
    stats = zoo.quick(lambda d: objective.loss(lambda *a: run(params, *a), batch, d))(
        Draw(u, jnp.zeros_like(u), noise)
    )
    raw = np.asarray(stats.raw[0])
    np.testing.assert_allclose(raw[:, 0], np.log(2) / 0.5, rtol=1e-5)
    np.testing.assert_allclose(raw[:, 2], np.log(3) / 0.9, rtol=1e-5)
    np.testing.assert_allclose(raw[:, 1], np.square([-2, 2, 0, -0.5]), atol=0.1)
    # EDM's weight of an error of x0: 1 + SNR.
    np.testing.assert_allclose(stats.weight[0, 0], [1, 1 + np.exp(-11.98), 1], rtol=1e-5)


def test_rows_are_drawn_along_a_grid_of_each_column(network):
    model, params = network
    grid = np.stack([np.linspace(-8, top, 9) for top in (1, 3, 5)], axis=-1)
    grid[-1] = np.inf
    generate = categorical.make_table_generator(model, gaussian_samplers.ddim(), grid)
    canvas = np.zeros((6, 3), np.int32)
    codes = np.asarray(generate(params, jax.random.key(0), canvas, row_offset=0))
    assert codes.shape == (6, 3) and codes.min() >= 0
    assert np.all(codes.max(0) < [2, 9, 3]) and len(np.unique(codes[:, 1])) > 2
    again = generate(params, jax.random.key(0), canvas, row_offset=2)
    np.testing.assert_array_equal(again[:4], codes[2:])


def test_samplers_of_one_level_and_grids_that_fall_are_refused(network):
    model, _ = network
    with pytest.raises(ValueError, match="edm_heun takes one noise level for all columns"):
        categorical.make_table_generator(model, gaussian_samplers.edm_heun(), [0.0, 1.0])
    with pytest.raises(ValueError, match="increases in each column"):
        categorical.make_table_generator(model, gaussian_samplers.ddim(), [1.0, 0.0])
