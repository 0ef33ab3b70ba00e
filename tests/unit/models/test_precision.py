"""Training with bfloat16 products follows training in float32."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny


def curve(dtype, steps, rows=16, length=12, seed=0):
    """Losses of a small network on rows that count up by one or two, at random, [steps]."""
    model = tiny.transformer(dtype=dtype, depth=2, width=32, qk_norm=True, scan_layers=True)
    rng = np.random.default_rng(seed)
    counts = np.cumsum(rng.integers(1, 3, (steps, rows, length)), axis=-1)
    tokens = jnp.asarray(counts % tiny.VOCAB, jnp.int32)
    hidden = jnp.asarray(rng.random((steps, rows, length)) < 0.5)
    params = nn.meta.unbox(tiny.jit(model.init)(jax.random.key(seed), tokens[0]))
    optimizer = optax.adamw(3e-3)

    def loss(params, tokens, hidden):
        logits = model.apply(params, jnp.where(hidden, tiny.MASK_ID, tokens))
        each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return jnp.sum(each * hidden) / jnp.sum(hidden)

    def step(carry, batch):
        params, state = carry
        value, slope = jax.value_and_grad(loss)(params, *batch)
        change, state = optimizer.update(slope, state, params)
        return (optax.apply_updates(params, change), state), value

    run = tiny.jit(functools.partial(jax.lax.scan, step))
    (params, _), losses = run((params, optimizer.init(params)), (tokens, hidden))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    return np.asarray(losses)


def check(steps, seed=0):
    exact, other = curve(jnp.float32, steps, seed=seed), curve(jnp.float32, steps, seed=seed + 1)
    narrow = curve(jnp.bfloat16, steps, seed=seed)
    assert exact[-5:].mean() < 0.95 * exact[0]  # it learns
    np.testing.assert_allclose(narrow[:10], exact[:10], rtol=0.02)
    noise = np.sqrt(np.mean((exact - other) ** 2))  # other batches and another start
    assert 0 < np.sqrt(np.mean((narrow - exact) ** 2)) < 0.8 * noise
    return exact, narrow


@pytest.mark.slow
def test_the_loss_curve_is_within_noise_of_float32():
    check(40)


@pytest.mark.slow
def test_long_loss_curves_are_within_noise_of_float32():
    """And end at the same loss."""
    for seed in (10, 20):
        exact, narrow = check(600, seed)
        np.testing.assert_allclose(narrow[-100:].mean(), exact[-100:].mean(), rtol=0.05)
