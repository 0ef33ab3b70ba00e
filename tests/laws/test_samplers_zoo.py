"""What must hold for every sampler, whatever the canvas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampler_zoo as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mdm_jax import samplers
from mdm_jax.samplers.sampler import SAMPLER_LABELS

ROWS, LENGTH, WORDS, MASK = 8, 6, 8, 5


def eager_model(inputs, logsnr, documents):
    """Eight tokens, of which 5 is the mask; its logit is by far the highest. Sees everything."""
    context = jnp.sum(jnp.where(inputs == MASK, 0, inputs + 1), -1) + jnp.sum(documents, -1)
    angle = context[:, None] + jnp.arange(LENGTH)[None] + 0.1 * logsnr
    logits = 2 * jnp.cos(angle[..., None] * (1.0 + jnp.arange(WORDS))[None, None])
    return logits.at[..., MASK].set(50.0)


def runner(name):
    """``run(key, canvas, documents, row_offset) -> (tokens, states)``, compiled once per shape."""
    sampler, grid = zoo.ZOO[name]

    @jax.jit
    def run(key, canvas, documents, row_offset):
        return samplers.sample_with_trace(
            *(key, eager_model, sampler, grid, canvas, lambda state: state.tokens),
            mask_id=MASK,
            documents=documents,
            row_offset=row_offset,
        )

    return lambda *args: jax.tree.map(np.asarray, run(*args))


# Prompts, gaps, full rows and blank ones: half of the tokens drawn are masks.
CANVASES = st.one_of(
    arrays.arrays(np.int32, (ROWS, LENGTH), elements=st.sampled_from([0, 1, 3, 7] + [MASK] * 4)),
    st.integers(0, LENGTH).map(
        lambda length: np.where(np.arange(LENGTH)[None] < length, np.arange(ROWS)[:, None] % 5, 5)
    ),
).map(lambda canvas: canvas.astype(np.int32))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in zoo.SIBLINGS else [])
        for name in zoo.ZOO
    ],
)
def test_every_sampler_keeps_its_promises(name):
    """Over prompts, gaps, padding and seeds.

    Given tokens stay. Generated ones stay, too, until they are masked again by a sampler that
    remasks. No mask is left. Row i depends on its number, its canvas and the key alone.
    """
    run = runner(name)

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(CANVASES, st.integers(0, 2**31 - 1), st.integers(0, ROWS - 1), st.integers(0, 2))
    def check(canvas, seed, row, padding):
        key = jax.random.key(seed)
        documents = np.ones((ROWS, LENGTH), np.int32)
        if padding:
            documents[row, -padding:], canvas[row, -padding:] = 0, 0
        tokens, states = run(key, canvas, documents, 0)
        given_places = canvas != MASK
        assert (tokens[given_places] == canvas[given_places]).all()
        assert (tokens != MASK).all() and (tokens >= 0).all() and (tokens < WORDS).all()
        assert (states[-1] == tokens).all()
        before = np.concatenate([canvas[None], states[:-1]])
        changed = (before != MASK) & (states != before)
        assert not (changed & given_places[None]).any()
        assert (states[changed] == MASK).all()
        assert name in zoo.REMASKING or not changed.any()
        # The row in another batch, of the same size: one program less.
        others, rest = canvas[::-1].copy(), documents[::-1].copy()
        others[0], rest[0] = canvas[row], documents[row]
        moved, path = run(key, others, rest, row)
        np.testing.assert_array_equal(moved[0], tokens[row])
        np.testing.assert_array_equal(path[:, 0], states[:, row])

    check()
    # The key decides, and equal canvases draw different numbers.
    blank, documents = np.full((ROWS, LENGTH), MASK, np.int32), np.ones((ROWS, LENGTH), np.int32)
    first, states = run(jax.random.key(0), blank, documents, 0)
    assert (run(jax.random.key(0), blank, documents, 0)[0] == first).all()
    if name not in zoo.DETERMINISTIC:
        assert len(np.unique(first, axis=0)) > 1
        assert (run(jax.random.key(1), blank, documents, 0)[0] != first).any()
    put_back = (states[:-1] != MASK) & (states[1:] == MASK)
    assert put_back.any() == (name in zoo.REMASKING)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_labels(name):
    sampler, _ = zoo.ZOO[name]
    expected = {
        **dict.fromkeys(zoo.EXACT, "exact"),
        **dict.fromkeys(zoo.DISCRETISED, "discretised"),
    }
    assert sampler.bias == expected.get(name, "biased") and sampler.bias in SAMPLER_LABELS
