"""The cache: a ring of the latest tokens, and logits that are the same with it and without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax.models import kv_cache as caches
from mdm_jax.models.decoders import (
    block_apply,
    cached_block_decoder,
    cached_causal_decoder,
    causal_apply,
    recomputing_block_decoder,
    recomputing_causal_decoder,
)
from mdm_jax.models.kv_cache import KeyValues

pytestmark = pytest.mark.keyless

ROWS, LENGTH, SIZE = 3, 12, 2
MODELS = {
    "plain": {},
    "unrolled": {"depth": 2},
    "scanned": {"depth": 2, "scan_layers": True},
    "conditioned": {"condition_on_logsnr": True, "self_conditioning": True, "qk_norm": True},
}
DOCUMENTS = np.asarray(
    [[1] * 12, [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 0, 0]],
    np.int32,
)

appended = tiny.jit(caches.append)

# --- the ring -----------------------------------------------------------------------------------


@given(sizes=st.lists(st.sampled_from([1, 2, 9]), max_size=5))
@settings(max_examples=15, deadline=None)
def test_the_ring_holds_the_latest_tokens(sizes):
    """Against a list, for chunks smaller and larger than the ring; token p carries the number p."""
    config = tiny.transformer(depth=2).config
    cache, written = caches.new_cache(config, 2, 5), 0
    for size in sizes:
        number = np.arange(written, written + size, dtype=np.int32)
        spread = np.broadcast_to(number[None, None, :, None, None], (2, 2, size, 2, 8))
        values = KeyValues(spread.astype(np.float32), -spread.astype(np.float32))
        cache = appended(cache, values, np.broadcast_to(number[None] + 1, (2, size)))
        written += size
    positions = np.asarray(caches.cached_positions(cache))
    cache = jax.device_get(cache)
    kept = list(range(max(0, written - 5), written))
    assert cache.capacity == 5 and int(cache.written) == written
    assert sorted(positions[positions >= 0].tolist()) == kept
    for slot in np.flatnonzero(positions >= 0):
        assert positions[slot] % 5 == slot
        np.testing.assert_array_equal(cache.key_values.keys[:, :, slot], positions[slot])
        np.testing.assert_array_equal(cache.key_values.values[:, :, slot], -positions[slot])
        np.testing.assert_array_equal(cache.documents[:, slot], positions[slot] + 1)


def test_rows_are_taken_whole():
    config = tiny.transformer(depth=2).config
    keys = np.broadcast_to(np.arange(3, dtype=np.float32)[:, None, None, None], (2, 3, 2, 2, 8))

    @tiny.jit
    def run():
        cache = caches.new_cache(config, 3, 4)
        cache = caches.append(cache, KeyValues(keys, keys + 5), np.arange(6).reshape(3, 2))
        return caches.take_rows(cache, np.array([2, 0, 2, 1]))

    taken = jax.device_get(run())
    assert taken.key_values.keys[1, :, 0, 0, 0].tolist() == [2.0, 0.0, 2.0, 1.0]
    assert taken.key_values.values[1, :, 1, 0, 0].tolist() == [7.0, 5.0, 7.0, 6.0]
    assert taken.documents[:, :2].tolist() == [[4, 5], [0, 1], [4, 5], [2, 3]]
    assert int(taken.written) == 2


def test_empty_caches_and_wrong_blocks_are_refused():
    config = tiny.transformer().config
    with pytest.raises(ValueError, match="at least one row and slot, got 0 and 4"):
        caches.new_cache(config, 0, 4)
    with pytest.raises(ValueError, match="blocks of 5 tokens do not divide a row of 12"):
        cached_block_decoder(tiny.transformer(), 5).init(2, 12)
    with pytest.raises(ValueError, match="at least 1 block .its own., got 0"):
        cached_causal_decoder(tiny.transformer(), 6, window=0).init(2, 12)


# --- logits with and without it -----------------------------------------------------------------


@functools.cache
def made(name):
    model = tiny.transformer(**MODELS[name])
    return model, tiny.parameters(model, LENGTH)


def rows(seed=0):
    """(noised, clean) rows, [3, 12] each."""
    rng = np.random.default_rng(seed)
    clean = rng.integers(0, tiny.MASK_ID, (ROWS, LENGTH))
    noised = np.where(rng.random(clean.shape) < 0.6, tiny.MASK_ID, clean)
    return noised.astype(np.int32), clean.astype(np.int32)


LEVELS = np.random.default_rng(2).normal(size=(ROWS, LENGTH // SIZE)).astype(np.float32)


@functools.cache
def decoding(name, window, first):
    """Block by block through a decoder, ``first`` places of the clean row written in one go."""
    model, params = made(name)
    decoder = cached_block_decoder(model, SIZE, window)

    @tiny.jit
    def run(noised, clean, documents):
        memory = decoder.init(ROWS, LENGTH)
        if first:
            memory = decoder.append(params, memory, clean[:, :first], documents[:, :first])

        def block(memory, each):
            noised, clean, documents, levels = each
            logits = decoder.logits(params, memory, noised, levels[:, None], documents)
            return decoder.append(params, memory, clean, documents), logits

        def cut(a, size):
            return jnp.moveaxis(a.reshape(ROWS, -1, size), 1, 0)

        each = (*(cut(a[:, first:], SIZE) for a in (noised, clean, documents)),)
        _, logits = jax.lax.scan(block, memory, (*each, LEVELS[:, first // SIZE :].T))
        return jnp.moveaxis(logits, 0, 1).reshape(ROWS, LENGTH - first, -1)

    return run


@pytest.mark.parametrize(
    "name, window, first",
    [
        pytest.param("unrolled", None, 0, marks=pytest.mark.slow),
        ("unrolled", 3, 8),
        pytest.param("scanned", 2, 0, marks=pytest.mark.slow),
        pytest.param("conditioned", None, 6, marks=pytest.mark.slow),
        pytest.param("conditioned", 1, 0, marks=pytest.mark.slow),
    ],
)
def test_block_decoding_equals_one_pass_over_all_blocks(name, window, first):
    """With documents and padding; a window holds far fewer tokens than the row."""
    model, params = made(name)
    noised, clean = rows()
    whole = tiny.jit(block_apply(model, SIZE, window))
    inputs = np.concatenate([noised, clean], axis=-1)
    expected = np.asarray(whole(params, inputs, LEVELS, DOCUMENTS))[:, first:]
    logits = decoding(name, window, first)(noised, clean, DOCUMENTS)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    if window is not None:
        cache = cached_block_decoder(model, SIZE, window).init(ROWS, LENGTH)
        assert cache.capacity == max(window - 1, 1) * SIZE


@pytest.mark.parametrize(
    "name, window, first",
    [
        pytest.param("unrolled", None, 5, marks=pytest.mark.slow),
        pytest.param("scanned", 4, 0, marks=pytest.mark.slow),
        ("scanned", 4, 7),
        pytest.param("conditioned", 1, 0, marks=pytest.mark.slow),
    ],
)
def test_causal_decoding_equals_one_pass_over_the_row(name, window, first):
    model, params = made(name)
    _, clean = rows()
    whole = tiny.jit(causal_apply(model, tiny.MASK_ID, window))
    expected = np.asarray(whole(params, clean, None, DOCUMENTS))[:, first:]
    decoder = cached_causal_decoder(model, tiny.MASK_ID, window)

    @tiny.jit
    def run(clean, documents):
        memory = decoder.init(ROWS, LENGTH)
        if first:
            memory = decoder.append(params, memory, clean[:, :first], documents[:, :first])

        def step(memory, inputs):
            logits, memory = decoder.step(params, memory, *inputs)
            return memory, logits

        before = jnp.roll(clean, 1, axis=1).T  # the token before position 0 is not read
        return jax.lax.scan(step, memory, (before[first:], documents.T[first:]))[1]

    logits = np.moveaxis(np.asarray(run(clean, DOCUMENTS)), 0, 1)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    kept = max(LENGTH if window is None else window, 2) - 1
    assert decoder.init(ROWS, LENGTH).cache.capacity == kept


def test_block_decoders_with_and_without_a_cache_agree():
    """The logits after four clean tokens, for rows picked out of order, with an estimate."""
    model, params = made("conditioned")
    noised, clean = rows()
    rng, picked = np.random.default_rng(1), np.array([2, 0])
    estimate = rng.dirichlet(np.ones(tiny.VOCAB), (2, SIZE)).astype(np.float32)

    def run(decoder, estimate):
        memory = decoder.init(ROWS, LENGTH)
        memory = decoder.append(params, memory, clean[:, :4], DOCUMENTS[:, :4])
        memory = decoder.take_rows(memory, picked)
        level, documents = LEVELS[picked, :1], DOCUMENTS[picked, 4:6]
        return decoder.logits(params, memory, noised[picked, 4:6], level, documents, estimate)

    cached = tiny.jit(functools.partial(run, cached_block_decoder(model, SIZE)))
    apply_fn = block_apply(model, SIZE)
    recomputed = tiny.jit(functools.partial(run, recomputing_block_decoder(apply_fn, SIZE)))
    logits = np.asarray(cached(estimate))
    np.testing.assert_allclose(logits, recomputed(estimate), rtol=1e-5, atol=1e-5)
    assert np.abs(logits - np.asarray(cached(np.zeros_like(estimate)))).max() > 1e-3


@pytest.mark.slow
def test_causal_decoders_with_and_without_a_cache_agree():
    """The first logits after four clean tokens."""
    model, params = made("plain")
    _, clean = rows()
    apply_fn = causal_apply(model, tiny.MASK_ID)

    def run(decoder):
        memory = decoder.init(ROWS, LENGTH)
        memory = decoder.append(params, memory, clean[:, :4], DOCUMENTS[:, :4])
        return decoder.step(params, memory, clean[:, 3], DOCUMENTS[:, 4])[0]

    decoders = cached_causal_decoder(model, tiny.MASK_ID), recomputing_causal_decoder(apply_fn)
    cached, recomputed = (tiny.jit(functools.partial(run, decoder))() for decoder in decoders)
    np.testing.assert_allclose(cached, recomputed, rtol=1e-5, atol=1e-5)
