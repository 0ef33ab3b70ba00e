"""Generation token by token: the law, filters, prompts, rows, and the cache."""

import functools

import block_toy
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mdm_jax import samplers
from mdm_jax.models.decoders import cached_causal_decoder, causal_apply, recomputing_causal_decoder
from mdm_jax.samplers.next_token import make_next_token_generator, sample_next_tokens
from mdm_jax.testing import toys
from mdm_jax.training.step import linen_init

MASK = toys.MASK_ID


@functools.cache
def toy_generator(prefix=0, filter_name=None, value=None):
    token_filter = None if filter_name is None else getattr(samplers, filter_name)(value)
    decoder = recomputing_causal_decoder(block_toy.causal_apply)
    generate = make_next_token_generator(
        decoder, mask_id=MASK, token_filter=token_filter, prefix=prefix
    )
    return functools.partial(generate, toys.toy_params())


def counts_of(tokens):
    return np.bincount(np.asarray(tokens) @ 3 ** np.arange(4)[::-1], minlength=81)


def test_samples_follow_the_law_of_the_model():
    """100,000 rows, chi-square over all 81; it is the law of block size one."""
    count = 100_000
    tokens = toy_generator()(jax.random.key(0), samplers.blank_canvas(count, 4, MASK))
    law = block_toy.block_law(1).ravel()
    assert stats.chisquare(counts_of(tokens), count * law).pvalue > 1e-4
    other = block_toy.block_law(2).ravel()
    assert stats.chisquare(counts_of(tokens), count * other).pvalue < 1e-12


def test_filters_act_on_every_position():
    """Temperature zero is the greedy path."""
    blank = samplers.blank_canvas(3, 4, MASK)
    greedy = np.asarray(toy_generator(0, "temperature", 0.0)(jax.random.key(0), blank))
    path = []
    for place in range(4):
        row = [*path, *[0] * (4 - place)]
        logs = block_toy.place_log_probabilities(tuple(range(place)), place)
        # All continuations share the logits: those of value v at this position.
        number = np.array([[*row[:place], v, *row[place + 1 :]] for v in range(3)])
        path.append(int(np.argmax(logs[number @ 3 ** np.arange(4)[::-1]])))
    assert greedy.tolist() == [path] * 3


@given(places=st.lists(st.integers(0, MASK), min_size=12, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_given_tokens_stay_and_no_mask_is_left(places, seed):
    canvas = np.array(places, np.int32).reshape(3, 4)
    tokens = np.asarray(toy_generator()(jax.random.key(seed), canvas))
    assert ((tokens >= 0) & (tokens < MASK)).all()
    np.testing.assert_array_equal(tokens[canvas != MASK], canvas[canvas != MASK])
    row = int(seed % 3)
    others = np.concatenate([canvas[row : row + 1], canvas[:2]])
    moved = toy_generator()(jax.random.key(seed), others, row_offset=row)
    np.testing.assert_array_equal(moved[0], tokens[row])


@pytest.mark.slow
def test_a_row_alone_is_that_of_the_batch():
    together = toy_generator()(jax.random.key(5), np.full((3, 4), MASK, np.int32))
    alone = toy_generator()(jax.random.key(5), np.full((1, 4), MASK, np.int32), row_offset=2)
    np.testing.assert_array_equal(alone[0], together[2])


def test_the_mask_token_is_never_drawn():
    """A network that wants nothing else."""
    logits = jnp.zeros((5, 4, 4)).at[..., MASK].set(90.0)
    decoder = recomputing_causal_decoder(lambda *_: logits)
    generate = make_next_token_generator(decoder, mask_id=MASK)
    tokens = np.asarray(generate({}, jax.random.key(0), samplers.blank_canvas(5, 4, MASK)))
    assert (tokens < MASK).all() and len(np.unique(tokens)) == 3


@pytest.mark.parametrize("prefix", [2, 4])
def test_a_prefix_changes_nothing(prefix):
    canvas = np.full((3, 4), MASK, np.int32)
    canvas[:, :prefix] = np.array(toys.ROWS)[:, :prefix]
    expected = toy_generator()(jax.random.key(2), canvas)
    np.testing.assert_array_equal(toy_generator(prefix)(jax.random.key(2), canvas), expected)


def test_a_prefix_takes_one_pass():
    plain, calls = recomputing_causal_decoder(block_toy.causal_apply), []

    def note(name):
        def noted(*arguments):
            jax.debug.callback(lambda: calls.append(name))
            return getattr(plain, name)(*arguments)

        return noted

    decoder = plain._replace(append=note("append"), step=note("step"))
    for prefix, passes in ((0, ["step"] * 4), (3, ["append", "step"])):
        calls.clear()
        generate = make_next_token_generator(decoder, mask_id=MASK, prefix=prefix)
        generate(toys.toy_params(), jax.random.key(0), np.array([[1, 0, 2, MASK]]))
        jax.effects_barrier()
        assert calls == passes


LENGTH = 12
CANVAS = np.full((4, LENGTH), tiny.MASK_ID, np.int32)
CANVAS[:, 0] = [0, 1, 2, 3]
CANVAS[1, :5] = [0, 1, 2, 3, 4]
CANVAS[2, 3:9] = 2
DOCUMENTS = np.ones((4, LENGTH), np.int32)
DOCUMENTS[3, 4:] = 2
DOCUMENTS[3, 9:] = 0


@pytest.mark.parametrize(
    "scan_layers, window, prefix",
    [
        (True, 4, 1),
        *(pytest.param(False, *c, marks=pytest.mark.slow) for c in ((None, 0), (3, 1))),
    ],
)
def test_cached_generation_draws_the_tokens_of_the_uncached_one(scan_layers, window, prefix):
    """Rows longer than those of training, prompts, two documents and padding."""
    model = tiny.transformer(depth=2, scan_layers=scan_layers)
    shapes = nn.meta.unbox(jax.eval_shape(linen_init(model, 6), jax.random.key(0)))
    params = tiny.perturbed(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
    cached = cached_causal_decoder(model, tiny.MASK_ID, window)
    plain = recomputing_causal_decoder(causal_apply(model, tiny.MASK_ID, window))
    found, expected = (
        np.asarray(
            make_next_token_generator(decoder, mask_id=tiny.MASK_ID, prefix=start)(
                params, jax.random.key(3), CANVAS, DOCUMENTS
            )
        )
        for decoder, start in ((cached, prefix), (plain, 0))
    )
    np.testing.assert_array_equal(found, expected)
    given_there = CANVAS != tiny.MASK_ID
    assert (found != tiny.MASK_ID).all() and (found[given_there] == CANVAS[given_there]).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"canvas": np.zeros((2, 3))}, "non-empty integer array"),
        ({"mask_id": -1}, "mask_id must be a token id, got -1"),
        ({"documents": np.ones((2, 5), int)}, "shape of the canvas"),
        ({"prefix": -1}, r"prefix must be in \[0, 4\]"),
        ({"prefix": 2}, "the first 2 positions of every row must be given"),
    ],
)
def test_bad_input(change, message):
    arguments = {"canvas": np.full((2, 4), MASK), "mask_id": MASK}
    decoder = recomputing_causal_decoder(block_toy.causal_apply)
    with pytest.raises(ValueError, match=message):
        sample_next_tokens(
            jax.random.key(0), decoder=decoder, params=toys.toy_params(), **(arguments | change)
        )
