"""The network for pictures: patches, conditioning, errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mdm_jax import gaussian, models


def network(shape=(4, 6, 1), patch_size=2, **settings):
    chosen = {"vocab_size": 1, "width": 16, "depth": 1, "num_heads": 2} | settings
    return gaussian.PictureTransformer(models.TransformerConfig(**chosen), shape, patch_size)


def variables(model, length, seed=0):
    init = (model.init, jax.random.key(0), jnp.zeros((1, length)), jnp.zeros((1, 1)))
    shapes = nn.meta.unbox(jax.eval_shape(*init))
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    return tiny.perturbed(zeros, seed)


def test_a_new_network_outputs_zero_in_the_shape_of_its_input():
    model, levels = network((4, 4, 3)), np.zeros((5, 1), np.float32)
    inputs = np.random.default_rng(0).normal(size=(5, 48)).astype(np.float32)
    output, _ = jax.jit(model.init_with_output)(jax.random.key(1), inputs, levels)
    np.testing.assert_array_equal(output, np.zeros((5, 48)))


def test_patches_are_put_back_where_they_were_taken():
    """Without blocks that mix, a pixel's derivative stays within its own patch."""
    model = network(width=8, depth=1)
    params = variables(model, 24)
    blocks = params["params"]["block_0"]
    for name in ("attention", "mlp"):
        blocks[name] = jax.tree.map(jnp.zeros_like, blocks[name])
    inputs = np.random.default_rng(2).normal(size=24).astype(np.float32)
    apply = lambda x: model.apply(params, x[None], jnp.zeros((1, 1)))[0]  # noqa: E731
    jacobian = jax.jit(jax.jacobian(apply))(inputs)
    reached = np.abs(np.asarray(jacobian)) > 1e-9
    row, column = np.divmod(np.arange(24), 6)
    patch = row // 2 * 3 + column // 2
    np.testing.assert_array_equal(reached, patch[:, None] == patch[None])


def test_the_output_depends_on_the_level_and_the_position():
    model = network()
    params = variables(model, 24)
    levels = np.array([[-3.0], [3.0]], np.float32)
    outputs = np.asarray(jax.jit(model.apply)(params, np.ones((2, 24), np.float32), levels))
    assert np.max(np.abs(outputs[0] - outputs[1])) > 1e-3
    assert np.std(outputs[0].reshape(2, 2, 3, 2).mean((1, 3))) > 1e-3


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="patches of side 4 do not divide pictures of 4 x 6"):
        variables(network(patch_size=4), 24)
    with pytest.raises(ValueError, match="rows must have 24 numbers"):
        variables(network(), 25)
    model = network()
    with pytest.raises(ValueError, match="one noise level per row"):
        model.apply(variables(model, 24), jnp.ones((1, 24)), jnp.zeros((1, 2)))
