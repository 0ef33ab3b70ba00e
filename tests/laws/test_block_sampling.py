"""Generation block by block: the law, prompts, rows, forward passes, and the cache."""

import functools

import block_toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from variants import slow_except

from mdm_jax import samplers
from mdm_jax.models.decoders import block_apply, cached_block_decoder, recomputing_block_decoder
from mdm_jax.samplers.ancestral import cached_ancestral
from mdm_jax.samplers.blocks import make_block_generator, sample_blocks
from mdm_jax.schedules import grids
from mdm_jax.testing import toys

MASK = toys.MASK_ID


def uniform_grid(steps):
    return grids.uniform_masking_rate(steps)


SAMPLERS = {
    "first_hitting": (samplers.first_hitting(), None),
    "ancestral": (samplers.ancestral(), uniform_grid(3)),
    "cached_ancestral": (cached_ancestral(2), uniform_grid(3)),
}


@functools.cache
def toy_generator(block_size, sampler="first_hitting", prefix=0):
    decoder = recomputing_block_decoder(block_toy.block_apply(block_size), block_size)
    generate = make_block_generator(decoder, *SAMPLERS[sampler], mask_id=MASK, prefix=prefix)
    return functools.partial(generate, toys.toy_params())


# --- the law ------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_samples_follow_the_product_of_the_block_laws(block_size):
    """100,000 blank rows against the enumerated law of all 81, and 30,000 that begin with 2 0
    against its conditional; chi-square. Laws of other block sizes are far away."""
    count, prompts = 100_000, 30_000
    canvas = np.full((count + prompts, 4), MASK, np.int32)
    canvas[count:, :2] = [2, 0]
    tokens = np.asarray(toy_generator(block_size)(jax.random.key(0), canvas))
    law = block_toy.block_law(block_size)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    observed = np.bincount(tokens[:count] @ 3 ** np.arange(4)[::-1], minlength=81)
    assert stats.chisquare(observed, count * law.ravel()).pvalue > 1e-4
    for other in {1, 2, 4} - {block_size}:
        wrong = block_toy.block_law(other).ravel()
        assert stats.chisquare(observed, count * wrong).pvalue < 1e-12
    if block_size == 1:
        rows = [int(row @ 3 ** np.arange(4)[::-1]) for row in block_toy.ROWS]
        np.testing.assert_allclose(-np.log(law.ravel()[rows]), block_toy.BLOCK_NELBO[1], rtol=1e-8)
    else:  # the prompt is a block
        rest = law[2, 0].ravel() / law[2, 0].sum()
        observed = np.bincount(tokens[count:, 2:] @ [3, 1], minlength=9)
        assert stats.chisquare(observed, prompts * rest).pvalue > 1e-4
    assert (tokens[count:, :2] == [2, 0]).all()


# --- prompts and rows ---------------------------------------------------------------------------


@given(
    kind=st.sampled_from([(2, "cached_ancestral"), (4, "first_hitting")]),
    places=st.lists(st.integers(0, MASK), min_size=32, max_size=32),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=25, deadline=None)
def test_given_tokens_stay_and_no_mask_is_left(kind, places, seed):
    """Whatever is given, wherever: prompts that end inside a block, gaps, full rows."""
    canvas = np.array(places, np.int32).reshape(8, 4)
    tokens = np.asarray(toy_generator(*kind)(jax.random.key(seed), canvas))
    assert tokens.dtype == np.int32 and ((tokens >= 0) & (tokens < MASK)).all()
    np.testing.assert_array_equal(tokens[canvas != MASK], canvas[canvas != MASK])


@pytest.mark.parametrize(
    "sampler", slow_except({"cached_ancestral"}, ["first_hitting", "cached_ancestral"])
)
def test_rows_do_not_influence_each_other(sampler):
    generate = toy_generator(2, sampler)
    rng = np.random.default_rng(0)
    canvas = np.where(rng.random((8, 4)) < 0.7, MASK, rng.integers(0, 3, (8, 4))).astype(np.int32)
    together = generate(jax.random.key(5), canvas)
    for row in (0, 5):
        others = np.concatenate([canvas[row : row + 1], canvas[:7]])
        moved = generate(jax.random.key(5), others, row_offset=row)
        np.testing.assert_array_equal(moved[0], together[row])
    blank = generate(jax.random.key(5), samplers.blank_canvas(8, 4, MASK))
    assert len({tuple(row) for row in blank.tolist()}) > 1
    other = generate(jax.random.key(6), samplers.blank_canvas(8, 4, MASK))
    assert (np.asarray(blank) != other).any()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["first_hitting", "cached_ancestral"])
def test_a_row_alone_is_that_of_the_batch(sampler):
    generate = toy_generator(2, sampler)
    canvas = np.full((8, 4), MASK, np.int32)
    canvas[5, 0] = 1
    together = generate(jax.random.key(5), canvas)
    for row in (0, 5):
        alone = generate(jax.random.key(5), canvas[row : row + 1], row_offset=row)
        np.testing.assert_array_equal(alone[0], together[row])


def test_blocks_draw_on_their_own():
    """A network that is the same everywhere gives each block its own tokens."""
    decoder = recomputing_block_decoder(lambda p, inputs, *_: jnp.zeros((len(inputs), 64, 50)), 32)
    generate = make_block_generator(decoder, *SAMPLERS["ancestral"], mask_id=50)
    tokens = np.asarray(generate({}, jax.random.key(0), samplers.blank_canvas(1, 64, 50)))[0]
    assert (tokens[:32] == tokens[32:]).mean() < 0.3


def test_a_prefix_changes_nothing():
    """Its whole blocks in one pass; what is left of it waits for its block."""
    canvas = np.array([[2, 0, 1, MASK], [1, 1, 0, MASK]], np.int32)
    expected = toy_generator(2)(jax.random.key(2), canvas)
    found = toy_generator(2, prefix=3)(jax.random.key(2), canvas)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.slow
def test_a_prefix_may_be_whole_blocks_or_the_row():
    canvas = np.array([[2, 0, 1, MASK], [1, 1, 0, MASK]], np.int32)
    expected = toy_generator(2)(jax.random.key(2), canvas)
    found = toy_generator(2, prefix=2)(jax.random.key(2), canvas)
    np.testing.assert_array_equal(found, expected)
    full = np.array([[2, 0, 1, 1]], np.int32)
    np.testing.assert_array_equal(toy_generator(2, prefix=4)(jax.random.key(0), full), full)


# --- forward passes -----------------------------------------------------------------------------


def counting_decoder(block_size, calls):
    """The toy's decoder; every run of one of its functions is noted."""
    plain = recomputing_block_decoder(block_toy.block_apply(block_size), block_size)

    def note(name, function):
        def noted(*arguments):
            jax.debug.callback(lambda: calls.append(name))
            return function(*arguments)

        return noted

    names = ("logits", "append", "take_rows")
    return plain._replace(**{name: note(name, getattr(plain, name)) for name in names})


def counted(sampler, prefix=0, block_size=2):
    """``passes(canvas) -> [logits, append, take_rows]``, runs of the decoder's functions."""
    calls = []
    decoder = counting_decoder(block_size, calls)
    generate = make_block_generator(decoder, *SAMPLERS[sampler], mask_id=MASK, prefix=prefix)

    def passes(canvas):
        calls.clear()
        tokens = generate(toys.toy_params(), jax.random.key(0), jnp.asarray(canvas, jnp.int32))
        jax.effects_barrier()
        assert (np.asarray(tokens) != MASK).all()
        return [calls.count(name) for name in ("logits", "append", "take_rows")]

    return passes


def test_no_forward_pass_is_wasted():
    """One per distinct state of a block, one to remember it, none for the last one's memory."""
    passes = counted("first_hitting")
    assert passes([[MASK] * 4]) == [4, 1, 0]
    assert passes([[1, MASK, 0, 2]]) == [1, 1, 0]
    assert passes([[1, 0, MASK, 2]]) == [1, 1, 0]
    assert passes([[1, 0, 1, 2]]) == [0, 1, 0]
    assert counted("first_hitting", prefix=2)([[1, 0, MASK, 2]]) == [1, 1, 0]
    # All blocks of the prefix at once.
    assert counted("first_hitting", 3, block_size=1)([[1, 0, 1, MASK]]) == [1, 1, 0]


def test_a_sampler_may_ask_for_some_rows_only():
    """cached_ancestral runs the rows that changed; only then are rows of the memory picked."""
    logits, _, picked = counted("cached_ancestral")([[MASK] * 4] * 3)
    assert 0 < picked == logits


def test_compiles_once_per_shape():
    traces = []
    decoder = recomputing_block_decoder(block_toy.block_apply(2), 2)

    def init(*shape):
        traces.append(shape)
        return decoder.init(*shape)

    generate = make_block_generator(
        decoder._replace(init=init), *SAMPLERS["first_hitting"], mask_id=MASK
    )
    for seed in range(3):
        canvas = samplers.blank_canvas(2, 4, MASK)
        jax.eval_shape(generate, toys.toy_params(), jax.random.key(seed), canvas, row_offset=seed)
    assert traces == [(2, 4)]


# --- with a cache -------------------------------------------------------------------------------

LENGTH, SIZE = 16, 2
CANVAS = np.full((4, LENGTH), tiny.MASK_ID, np.int32)
CANVAS[1, :5] = [0, 1, 2, 3, 4]
CANVAS[2, 3:9] = 2
DOCUMENTS = np.ones((4, LENGTH), np.int32)
DOCUMENTS[3, 11:] = 0


@functools.cache
def network(scan_layers):
    """A network that was made for rows of 8."""
    model = tiny.transformer(depth=2, scan_layers=scan_layers)
    return model, tiny.parameters(model, 8)


@pytest.mark.parametrize(
    "sampler, scan_layers, window",
    [
        pytest.param("first_hitting", False, None, marks=pytest.mark.slow),
        pytest.param("first_hitting", True, 3, marks=pytest.mark.slow),
        # test_block_wrappers has this one with guidance on top.
        pytest.param("cached_ancestral", False, 2, marks=pytest.mark.slow),
    ],
)
def test_cached_generation_draws_the_tokens_of_the_uncached_one(sampler, scan_layers, window):
    """Rows twice as long as those of training, prompts, a padded row."""
    model, params = network(scan_layers)
    cached = cached_block_decoder(model, SIZE, window)
    plain = recomputing_block_decoder(block_apply(model, SIZE, window), SIZE)
    generate, uncached = (
        make_block_generator(decoder, *SAMPLERS[sampler], mask_id=tiny.MASK_ID)
        for decoder in (cached, plain)
    )
    found = np.asarray(generate(params, jax.random.key(7), CANVAS, DOCUMENTS))
    expected = uncached(params, jax.random.key(7), CANVAS, DOCUMENTS)
    np.testing.assert_array_equal(found, expected)
    assert (found != tiny.MASK_ID).all() and (
        found[CANVAS != tiny.MASK_ID] == CANVAS[CANVAS != tiny.MASK_ID]
    ).all()


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"canvas": np.full((2, 5), MASK)}, "blocks of 2 tokens do not divide a row of 5 evenly"),
        ({"canvas": np.full((4,), MASK)}, "non-empty integer array"),
        ({"grid": None}, "ancestral needs a grid"),
        ({"grid": [0.0, 1.0]}, "end at logSNR"),
        ({"mask_id": -1}, "mask_id must be a token id"),
        ({"documents": np.ones((2, 5), int)}, "shape of the canvas"),
        ({"prefix": 5}, r"prefix must be in \[0, 4\]"),
        ({"prefix": 1}, "the first 1 positions of every row must be given"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "sampler": samplers.ancestral(),
        "grid": uniform_grid(2),
        "canvas": np.full((2, 4), MASK),
        "mask_id": MASK,
    }
    decoder = recomputing_block_decoder(block_toy.block_apply(2), 2)
    with pytest.raises(ValueError, match=message):
        sample_blocks(
            jax.random.key(0), decoder=decoder, params=toys.toy_params(), **(arguments | change)
        )


def test_the_generator_checks_its_prefix_at_every_call():
    generate = toy_generator(2, prefix=2)
    with pytest.raises(ValueError, match="some hold the mask token 3; shorten the prefix"):
        generate(jax.random.key(0), np.array([[1, MASK, MASK, MASK]], np.int32))
