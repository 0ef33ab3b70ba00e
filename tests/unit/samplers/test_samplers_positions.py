"""Logits and tokens at the positions that a step reveals, and nowhere else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import slow_except

from mdm_jax import models, samplers
from mdm_jax.samplers.ancestral import fill_positions
from mdm_jax.samplers.filters import draw_tokens, draw_tokens_at
from mdm_jax.schedules import grids

ROWS, LENGTH = 3, 12


@pytest.mark.parametrize("vocab", [5, pytest.param(65, marks=pytest.mark.slow), 150])
def test_drawn_tokens_follow_the_softmax(vocab):
    """Frequencies of every token within 5 standard errors; tokens ruled out never come."""
    logits = np.random.default_rng(vocab).normal(0.0, 1.5, vocab).astype(np.float32)
    logits[[1, -1]] = -np.inf, np.finfo(np.float32).min
    count = 40_000
    shape = (100, count // 100, vocab)
    keys = jax.random.split(jax.random.key(0), shape[0])
    drawn = tiny.jit(lambda k: draw_tokens(k, jnp.broadcast_to(logits[None, None], shape)))(keys)
    probs = np.exp(logits.astype(np.float64) - logits.max())
    probs /= probs.sum()
    found = np.bincount(np.asarray(drawn).ravel(), minlength=vocab) / count
    np.testing.assert_array_less(np.abs(found - probs), 5 * np.sqrt(probs / count) + 1e-9)
    assert drawn.dtype == jnp.int32 and found[1] == found[-1] == 0


def test_a_long_vocabulary_whose_runs_are_all_ruled_out_but_one():
    logits = np.full((2, 3, 400), -np.inf, np.float32)
    logits[..., 333] = -7.0
    drawn = tiny.jit(draw_tokens)(jax.random.split(jax.random.key(0), 2), logits)
    np.testing.assert_array_equal(drawn, 333)


@pytest.mark.parametrize("vocab", [6, 90])
def test_a_position_draws_the_same_whatever_is_drawn_with_it(vocab):
    logits = np.random.default_rng(1).normal(size=(ROWS, LENGTH, vocab)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), ROWS)
    every = np.asarray(tiny.jit(draw_tokens)(keys, logits))
    places = np.asarray([[3, 0], [7, 11], [2, 2]])
    picked = np.take_along_axis(logits, places[..., None], 1)
    some = tiny.jit(draw_tokens_at)(keys, picked, places)
    np.testing.assert_array_equal(some, np.take_along_axis(every, places, 1))


@pytest.mark.parametrize("size", slow_except({5, 100}, [1, 5, 12, 100]))
def test_positions_are_filled_where_asked_and_only_there(size):
    rng = np.random.default_rng(0)
    reveal = rng.random((ROWS, LENGTH)) < 0.6
    reveal[1] = False
    logits = rng.normal(size=(ROWS, LENGTH, 6)).astype(np.float32)
    tokens, reads = np.full((ROWS, LENGTH), -7, np.int32), []

    @tiny.jit
    def run(keys):
        def read(places):
            jax.debug.callback(lambda: reads.append(1))
            return jnp.take_along_axis(logits, places[..., None], axis=1)

        filled = fill_positions(keys, reveal, tokens, samplers.temperature(0.7), read, size)
        return filled, draw_tokens(keys, logits / np.float32(0.7))

    filled, drawn = run(jax.random.split(jax.random.key(0), ROWS))
    np.testing.assert_array_equal(filled, np.where(reveal, drawn, tokens))
    jax.effects_barrier()
    assert len(reads) == -(-reveal.sum(1).max() // min(size, LENGTH))


@functools.cache
def network():
    model = tiny.transformer()
    return model, tiny.parameters(model, LENGTH)


SAMPLERS = {
    "ancestral": samplers.ancestral(),
    "cached_ancestral": samplers.cached_ancestral(2),
    "first_hitting": samplers.first_hitting(),
    "in_blocks": samplers.low_confidence_remasking(5, 3),
    "guided": samplers.wrapped(samplers.ancestral(), samplers.prompt_guidance(1.0)),
}


@functools.cache
def drawn(name, num_steps, readout):
    """Tokens of a sampler from a network that returns a readout, or its logits."""
    model, params = network()
    apply = models.readout_apply(model) if readout else model.apply
    grid = None if num_steps is None else grids.uniform_masking_rate(num_steps)
    generate = samplers.make_generator(apply, SAMPLERS[name], grid, mask_id=tiny.MASK_ID)
    canvas = samplers.blank_canvas(ROWS, LENGTH, tiny.MASK_ID)
    return np.asarray(generate(params, jax.random.key(3), canvas))


@pytest.mark.parametrize(
    "name, num_steps",
    [
        pytest.param("ancestral", 1, marks=pytest.mark.slow),
        pytest.param("ancestral", 3, marks=pytest.mark.slow),
        ("ancestral", 40),
        pytest.param("cached_ancestral", 3, marks=pytest.mark.slow),
        ("first_hitting", None),
        ("in_blocks", None),
    ],
)
def test_a_readout_gives_the_tokens_that_logits_give(name, num_steps):
    tokens = drawn(name, num_steps, True)
    np.testing.assert_array_equal(tokens, drawn(name, num_steps, False))
    assert len(np.unique(tokens)) > 1 and not (tokens == tiny.MASK_ID).any()


def test_wrapped_networks_are_read_at_positions_too():
    """Guidance of scale one is the network itself; a wrapper has all logits at once."""
    np.testing.assert_array_equal(drawn("guided", 40, True), drawn("ancestral", 40, True))


@pytest.mark.parametrize(
    "sampler",
    [
        *(samplers.ancestral(), samplers.cached_ancestral(ROWS), samplers.first_hitting()),
        SAMPLERS["in_blocks"],
    ],
    ids=lambda sampler: sampler.name,
)
def test_a_readout_is_never_projected_at_all_positions(sampler):
    model, params = network()
    canvas = samplers.blank_canvas(ROWS, LENGTH, tiny.MASK_ID)

    def program(apply):
        grid = None if sampler.num_steps else grids.uniform_masking_rate(40)
        generate = samplers.make_generator(apply, sampler, grid, mask_id=tiny.MASK_ID)
        return str(jax.make_jaxpr(generate)(params, jax.random.key(3), canvas))

    every = f"f32[{ROWS},{LENGTH},{tiny.VOCAB}]"
    assert every in program(model.apply)
    assert every not in program(models.readout_apply(model))
