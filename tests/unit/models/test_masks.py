"""Attention masks of block and causal models, and the transformer under them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax.models import masks
from mdm_jax.models.decoders import block_apply, causal_apply, shift_right
from mdm_jax.training.step import linen_init

LENGTH, SIZE = 6, 2
EVERY = {
    "within_documents": lambda documents, _: masks.within_documents(documents),
    "causal": lambda documents, window: masks.causal(LENGTH, window, documents),
    "block_causal": lambda documents, window: masks.block_causal(LENGTH, SIZE, window, documents),
    "block_training": lambda documents, window: masks.block_training(
        LENGTH, SIZE, window, documents
    ),
}

# --- the matrices -------------------------------------------------------------------------------

dense_mask = tiny.jit(lambda rule: rule.dense())


def dense(rule):
    """[Q, M] of one row."""
    return np.asarray(dense_mask(rule))[0, 0]


def test_training_mask_of_four_places_in_blocks_of_two():
    halves = ["11000000", "00111100", "00001100", "00001111"]
    expected = np.array([[c == "1" for c in row] for row in halves for _ in range(2)])
    np.testing.assert_array_equal(dense(masks.block_training(4, 2)), expected)


@pytest.mark.parametrize("block_size, pairs", [(1, 20), (2, 24), (4, 32)])
def test_number_of_allowed_pairs(block_size, pairs):
    assert dense(masks.block_training(4, block_size)).sum() == pairs
    blocks = 12 // block_size
    expected = block_size**2 * (blocks + blocks**2)
    assert dense(masks.block_training(12, block_size)).sum() == expected


def test_causal_and_block_causal_matrices():
    triangle = np.tril(np.ones((4, 4), bool))
    np.testing.assert_array_equal(dense(masks.causal(4)), triangle)
    np.testing.assert_array_equal(dense(masks.block_causal(4, 1)), triangle)
    np.testing.assert_array_equal(dense(masks.block_causal(4, 4)), True)
    two = dense(masks.block_causal(4, 2)).astype(int).tolist()
    assert two == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    band = dense(masks.causal(4, window=2)).astype(int).tolist()
    assert band == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_windows_of_the_training_mask():
    """Window 2 of three blocks: noised block 2 sees clean block 1 and itself, not clean block 0."""
    mask = dense(masks.block_training(6, 2, window=2))
    by_block = mask[::2, ::2].astype(int).tolist()
    assert by_block == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 1, 0, 0],
        [0, 0, 1, 0, 1, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]
    np.testing.assert_array_equal(
        dense(masks.block_training(6, 2, window=3)), dense(masks.block_training(6, 2))
    )


@functools.cache
def rule_matrix(name, window):
    return tiny.jit(lambda documents: EVERY[name](documents, window).dense())


@pytest.mark.parametrize("name", EVERY)
@given(
    documents=st.lists(st.integers(0, 3), min_size=LENGTH, max_size=LENGTH),
    window=st.sampled_from([None, 1, 2, 5]),
)
@settings(max_examples=15, deadline=None)
def test_documents_are_combined_by_and(name, documents, window):
    """Never across documents, never to padding, and never an empty set."""
    mask = np.asarray(rule_matrix(name, window)(np.array([documents], np.int32)))
    numbers = np.tile(np.array(documents), mask.shape[-1] // LENGTH)
    free = np.asarray(rule_matrix(name, window)(np.ones((1, LENGTH), np.int32)))[0, 0]
    itself = np.eye(len(numbers), dtype=bool)
    same = (numbers[:, None] == numbers[None]) & (numbers > 0)[:, None]
    assert mask.shape == (1, 1, len(numbers), len(numbers))
    np.testing.assert_array_equal(mask[0, 0], free & (same | itself))
    assert mask.any(-1).all()


@given(
    block_size=st.sampled_from([1, 2, 3, 4, 6, 12]),
    window=st.one_of(st.none(), st.integers(1, 6)),
    shuffle=st.permutations(range(-2, 12)),
)
@settings(max_examples=10, deadline=None)
def test_rule_between_places_is_a_part_of_the_matrix(block_size, window, shuffle):
    """Keys in any order, two of them not written yet."""
    rule = masks.block_causal(12, block_size, window)
    whole = rule.pattern.allows(np.arange(12)[:, None], np.arange(12)[None])
    keys = np.array(shuffle)
    queries, one = np.arange(5, 12), np.ones((1, 14), np.int32)
    cached = masks.CachedRule(rule.pattern, queries, keys, one[:, :7], one)
    part = np.asarray(cached.dense())[0, 0]
    np.testing.assert_array_equal(rule.between(queries, np.arange(3, 9))[0], whole[5:, 3:9])
    np.testing.assert_array_equal(part, np.where(keys < 0, False, whole[5:, keys]))


@pytest.mark.parametrize("call", [masks.block_causal, masks.block_training])
def test_blocks_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match="blocks of 4 tokens do not divide a row of 6 evenly"):
        call(6, 4)
    with pytest.raises(ValueError, match="blocks of 0 tokens"):
        call(6, 0)
    with pytest.raises(ValueError, match="at least 1 block .its own., got 0"):
        call(6, 2, window=0)


# --- the transformer under them -----------------------------------------------------------------

MODELS = {
    "plain": {"depth": 2},
    "conditioned": {
        "depth": 2,
        "condition_on_logsnr": True,
        "scan_layers": True,
        "self_conditioning": True,
    },
}
DOCUMENTS = np.asarray([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)


@functools.cache
def made(name):
    model = tiny.transformer(**MODELS[name])
    return model, tiny.parameters(model, LENGTH)


def rows(seed=0):
    """(noised, clean) rows, [2, 6] each."""
    rng = np.random.default_rng(seed)
    clean = rng.integers(0, tiny.MASK_ID, (2, LENGTH))
    noised = np.where(rng.random(clean.shape) < 0.5, tiny.MASK_ID, clean)
    return noised.astype(np.int32), clean.astype(np.int32)


@functools.cache
def loop_over_blocks(name, window=None):
    """[clean blocks before b, noised block b] through the network, block by block."""
    model, params = made(name)

    @tiny.jit
    def run(noised, clean, levels, documents):
        parts = []
        for start in range(0, LENGTH, SIZE):
            end = start + SIZE
            inputs = jnp.concatenate([clean[:, :start], noised[:, start:end]], axis=-1)
            mask = masks.block_causal(end, SIZE, window, documents[:, :end])
            level = jnp.full((2, end // SIZE), jnp.inf)
            level = level.at[:, -1].set(levels[:, start // SIZE])
            logits, _ = model.apply(params, inputs, level, jnp.arange(end), mask, method="attend")
            parts.append(logits[:, start:])
        return jnp.concatenate(parts, axis=1)

    return run


@functools.cache
def vectorised(name, window=None):
    model, params = made(name)
    return tiny.jit(functools.partial(block_apply(model, SIZE, window), params))


@functools.cache
def whole_row(name):
    return tiny.jit(made(name)[0].apply)


LEVELS = np.asarray([[-2.0, 0.0, 3.0], [1.0, -np.inf, 0.5]], np.float32)


@pytest.mark.parametrize(
    "name, window",
    [
        ("conditioned", 2),
        pytest.param("plain", 2, marks=pytest.mark.slow),
        pytest.param("conditioned", None, marks=pytest.mark.slow),
    ],
)
def test_one_pass_equals_the_loop_over_blocks(name, window):
    noised, clean = rows()
    inputs = np.concatenate([noised, clean], axis=-1)
    logits = vectorised(name, window)(inputs, LEVELS, DOCUMENTS)
    expected = loop_over_blocks(name, window)(noised, clean, LEVELS, DOCUMENTS)
    assert logits.shape == (2, LENGTH, tiny.VOCAB)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_every_block_reads_its_own_level():
    noised, clean = rows()
    inputs = np.concatenate([noised, clean], axis=-1)
    one, run = np.ones_like(DOCUMENTS), vectorised("conditioned", 2)
    levels = LEVELS + np.asarray([0.0, 1.5, 0.0], np.float32)[None]
    before, after = (np.asarray(run(inputs, u, one)) for u in (LEVELS, levels))
    moved = np.abs(after - before).max((0, 2)) > 1e-4
    assert moved[2:4].all()
    # Later blocks see block 1 clean, whatever its level.
    np.testing.assert_array_equal(after[:, [0, 1, 4, 5]], before[:, [0, 1, 4, 5]])
    shared, spread = (run(inputs, u, one) for u in (LEVELS[:, :1], LEVELS[:, [0, 0, 0]]))
    np.testing.assert_allclose(shared, spread, rtol=1e-5, atol=1e-6)


def test_segments_of_a_plain_row_read_their_own_level():
    """A call with S levels: equal levels are one level, and a level acts on its own segment."""
    run = functools.partial(whole_row("conditioned"), made("conditioned")[1])
    inputs, _ = rows()
    levels = np.repeat(LEVELS[:, :1], 3, axis=1)
    one, three = run(inputs, LEVELS[:, :1], DOCUMENTS), run(inputs, levels, DOCUMENTS)
    np.testing.assert_allclose(one, three, rtol=1e-5, atol=1e-6)
    moved = run(inputs, levels + np.asarray([0.0, 0.0, 1.5], np.float32)[None], DOCUMENTS)
    assert (np.abs(moved - three).max((0, 2)) > 1e-4).all()  # attention carries it everywhere
    with pytest.raises(ValueError, match=r"S a divisor of 6; got \(2, 4\)"):
        run(inputs, np.zeros((2, 4), np.float32))


def test_causal_logits_depend_on_what_is_before():
    """At every position: all earlier tokens of its document, not its own token, nothing later."""
    model, params = made("plain")
    run = tiny.jit(functools.partial(causal_apply(model, tiny.MASK_ID), params))
    _, clean = rows()
    logits = np.asarray(run(clean, None, DOCUMENTS))
    for position in range(LENGTH):
        other = clean.copy()
        other[:, position] = (clean[:, position] + 1) % tiny.MASK_ID
        moved = np.abs(np.asarray(run(other, None, DOCUMENTS)) - logits).max(-1) > 1e-4
        same = DOCUMENTS[:, position : position + 1] == DOCUMENTS
        later = (np.arange(LENGTH) > position)[None]
        np.testing.assert_array_equal(moved, same & later & (DOCUMENTS > 0))


def test_shifted_rows_begin_every_document_with_the_start_token():
    tokens = jnp.asarray([[5, 4, 3, 2, 1, 0]] * 2)
    assert shift_right(tokens, 9, DOCUMENTS).tolist() == [[9, 5, 4, 9, 2, 9], [9, 5, 4, 3, 2, 1]]
    assert shift_right(tokens, 9).tolist() == [[9, 5, 4, 3, 2, 1]] * 2


@pytest.mark.slow
def test_one_block_is_the_plain_model():
    """With the same parameters and estimates, which belong to the noised row."""
    model, params = made("conditioned")
    noised, clean = rows()
    inputs, level = np.concatenate([noised, clean], axis=-1), LEVELS[:, :1]
    rng = np.random.default_rng(1)
    estimate = rng.dirichlet(np.ones(tiny.VOCAB), (2, LENGTH)).astype(np.float32)
    zeros = np.zeros_like(estimate)
    block = functools.partial(tiny.jit(block_apply(model, LENGTH)), params, inputs)
    plain = whole_row("conditioned")
    without = np.asarray(plain(params, noised, level, DOCUMENTS))
    np.testing.assert_allclose(block(level, DOCUMENTS, zeros), without, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(plain(params, noised, level, DOCUMENTS, zeros), without)
    expected = np.asarray(plain(params, noised, level, DOCUMENTS, estimate))
    np.testing.assert_allclose(block(level, DOCUMENTS, estimate), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - without).max() > 1e-3
    # A fresh network ignores the estimate.
    init = tiny.jit(lambda key: nn.meta.unbox(linen_init(model, LENGTH)(key))["params"]["estimate"])
    start = {"params": {**params["params"], "estimate": init(jax.random.key(0))}}
    fresh, expected = (plain(start, noised, level, DOCUMENTS, e) for e in (estimate, None))
    np.testing.assert_array_equal(fresh, expected)


def test_estimates_that_do_not_fit_are_refused():
    model, params = made("conditioned")
    noised, _ = rows()
    with pytest.raises(ValueError, match=r"the shape \(2, 6, 7\), got \(2, 6, 6\)"):
        model.apply(params, noised, estimate=jnp.ones((2, LENGTH, 6)))
    model, params = made("plain")
    with pytest.raises(ValueError, match=r"self_conditioning \(here False\)"):
        model.apply(params, noised, estimate=jnp.ones((2, LENGTH, tiny.VOCAB)))


def test_rows_of_odd_length_are_refused():
    model, params = made("plain")
    with pytest.raises(ValueError, match=r"side by side, \[N, 2L\]; got \(2, 5\)"):
        block_apply(model, 1)(params, jnp.zeros((2, 5), jnp.int32))
    with pytest.raises(ValueError, match="blocks of 4 tokens do not divide a row of 6"):
        block_apply(model, 4)(params, jnp.zeros((2, 12), jnp.int32))


# --- annealed masks -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["within_documents", "block_training"])
def test_an_annealed_mask_goes_from_causal_to_the_rule(name):
    documents = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1]], jnp.int32)
    rule = EVERY[name](documents, None)
    size = rule.shape[0]
    positions = np.arange(size) % LENGTH
    later = positions[None] > positions[:, None]

    @tiny.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def drawn(share, key):
        return masks.annealed(rule, positions, share, key).dense()

    def at(share):
        return np.asarray(drawn(share, jax.random.split(jax.random.key(0), 400)))

    whole = np.asarray(rule.dense())
    np.testing.assert_array_equal(at(0.0), np.broadcast_to(whole & ~later, (400, *whole.shape)))
    np.testing.assert_array_equal(at(1.0), np.broadcast_to(whole, (400, *whole.shape)))
    shares = [at(share) for share in (0.1, 0.4, 0.9)]
    for fewer, more in zip(shares, shares[1:]):
        assert (fewer <= more).all() and fewer.sum() < more.sum()
    # Of 400 draws of each pair: standard error 0.0245.
    kept = shares[1].mean(axis=0)[whole & later]
    np.testing.assert_allclose(kept, 0.4, atol=4 * 0.0245)
