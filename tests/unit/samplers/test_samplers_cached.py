"""Cached ancestral sampling: the same tokens for fewer passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_reverse import BLANK, MASK, draw, draw_with_trace, place_kernel, toy_model, uniform_grid
from variants import slow_except

from mdm_jax import samplers
from mdm_jax.models.transformer import Transformer, TransformerConfig
from mdm_jax.samplers.ancestral import cached_ancestral
from mdm_jax.schedules import grids


def passes_law(steps: int) -> np.ndarray:
    """[steps + 1] law of the number of steps that change a row, by enumeration of the chain."""
    found = np.eye(256)[BLANK][:, None] * np.eye(steps + 1)[0]  # [state, passes so far]
    for i in range(steps):
        kernel = place_kernel(1 / (steps - i))
        same = np.diag(kernel)[:, None] * found
        found = same + np.roll(kernel.T @ found - same, 1, axis=1)
    return found.sum(0)


@pytest.mark.parametrize("steps, expected", [(2, 1.875), (4, 2.734375), (8, 3.31054688)])
def test_expected_passes(steps, expected):
    law = passes_law(steps)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    mean = law @ np.arange(steps + 1)
    assert mean == pytest.approx(expected, abs=6e-9)
    assert mean == pytest.approx(steps * (1 - (1 - 1 / steps) ** 4), abs=1e-12)


def test_passes_of_the_implementation(rows=300, steps=4):
    """Exactly one pass per change of a row, at one row per pass; their mean within 5 errors."""
    calls = []

    def model(inputs, logsnr, documents):
        jax.debug.callback(lambda: calls.append(len(inputs)))
        return toy_model(inputs, logsnr, documents)

    canvas = samplers.blank_canvas(rows, 4, MASK)
    tokens, states = draw_with_trace(
        *(model, cached_ancestral(1), uniform_grid(steps), canvas, 0, lambda state: state.tokens)
    )
    jax.effects_barrier()
    before = np.concatenate([np.asarray(canvas)[None], states[:-1]])
    changes = (before != states).any(-1).sum()
    assert calls == [1] * changes
    law, number = passes_law(steps), np.arange(steps + 1)
    error = np.sqrt((law @ number**2 - (law @ number) ** 2) / rows)
    assert abs(changes / rows - 2.734375) < 5 * error
    np.testing.assert_array_equal(
        tokens, draw(toy_model, samplers.ancestral(), uniform_grid(steps), canvas, seed=0)
    )


@functools.cache
def setting():
    """Model, parameters, canvas and documents: prompts of every length, rows of many lengths."""
    model = Transformer(TransformerConfig(vocab_size=6, width=8, depth=1, num_heads=2))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), params)
    canvas = np.full((8, 8), 5, np.int32)
    canvas[np.arange(8)[:, None] > np.arange(8)[None]] = 1
    documents = np.where(np.arange(8)[None] < 7 - np.arange(8)[:, None] // 3, 1, 0)
    canvas[documents == 0] = 0
    return model, params, canvas, documents


def generated(sampler) -> np.ndarray:
    model, params, canvas, documents = setting()

    def apply_fn(params, inputs, logsnr, docs):
        assert inputs.shape == docs.shape
        # Each row's documents and the level tell rows and steps apart.
        tilt = (jnp.sum(docs, -1)[:, None] + logsnr)[:, None] * jnp.cos(jnp.arange(6.0))[None, None]
        return model.apply(params, inputs, logsnr, docs) + tilt

    grid = grids.uniform_masking_rate(5)
    generate = samplers.make_generator(apply_fn, sampler, grid, mask_id=5)
    return np.asarray(generate(params, jax.random.key(1), canvas, documents))


@pytest.fixture(scope="module")
def ancestral_tokens():
    return generated(samplers.ancestral())


@pytest.mark.parametrize("rows_per_pass", slow_except({3}, [1, 3, 100]))
def test_tokens_are_those_of_ancestral(rows_per_pass, ancestral_tokens):
    """A network that sees the level and its documents."""
    got = generated(cached_ancestral(rows_per_pass))
    np.testing.assert_array_equal(got, ancestral_tokens)
    assert (got != 5).all() and len(np.unique(got)) > 3


def test_bad_settings():
    with pytest.raises(ValueError, match="rows_per_pass must be a whole number .*, got 0"):
        cached_ancestral(0)
