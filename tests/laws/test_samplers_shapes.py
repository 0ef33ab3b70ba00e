"""What samplers keep, over lengths, batch sizes, block sizes, prompts and gaps.

Shapes come from short lists, so that each program is compiled once.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax import samplers
from mdm_jax.models.decoders import recomputing_block_decoder
from mdm_jax.schedules import grids

WORDS, MASK, MARK = 6, 4, 5
"""Ids 0 to 3 are words, 4 is the mask, 5 a special token; of uniform tokens 5 marks free places."""
ROWS = 8
GRID = grids.uniform_masking_rate(3)


def eager_model(inputs, logsnr, documents=None):
    """Looks at the whole row; the mask token's logit is by far the highest."""
    context = jnp.sum(jnp.where(inputs == MASK, 0, inputs + 1), -1)
    angle = context[:, None] + jnp.arange(inputs.shape[-1])[None] + 0.1 * logsnr[:, :1]
    logits = 2 * jnp.cos(angle[..., None] * (1.0 + jnp.arange(WORDS))[None, None])
    return logits.at[..., MASK].set(50.0)


def eager_blocks(params, inputs, logsnr, documents=None):
    """The noised row [N, L] of [N, 2L]."""
    return eager_model(inputs[:, : inputs.shape[-1] // 2], logsnr)


@functools.cache
def generator(name, block_size=None):
    """``generate({}, key, canvas, row_offset=...)``, compiled once per shape."""
    sampler, grid, mask_id = {
        "ancestral": (samplers.ancestral(), GRID, MASK),
        "first_hitting": (samplers.first_hitting(), None, MASK),
        "entropy_bounded": (samplers.entropy_bounded(1.0), None, MASK),
        "uniform_ancestral": (samplers.uniform_ancestral(4), GRID, MARK),
    }[name]
    if block_size is not None:
        decoder = recomputing_block_decoder(eager_blocks, block_size)
        return samplers.make_block_generator(decoder, sampler, grid, mask_id=mask_id)
    return samplers.make_generator(
        lambda params, *args: eager_model(*args), sampler, grid, mask_id=mask_id
    )


@st.composite
def canvases(draw, lengths, mask_id):
    """[8, L] with a prompt in every row, of any length, and any gaps after it."""
    length = draw(st.sampled_from(lengths))
    canvas = np.full((ROWS, length), mask_id, np.int32)
    for row in canvas:
        row[: draw(st.integers(0, length))] = draw(st.integers(0, 3))
        for place in draw(st.sets(st.integers(0, length - 1), max_size=2)):
            row[place] = draw(st.sampled_from([0, 3, mask_id]))
    return canvas


def check(generate, canvas, seed, row, mask_id):
    """Given tokens stay, no mask is left, and a row is the same in another batch."""
    key = jax.random.key(seed)
    tokens = np.asarray(generate({}, key, canvas))
    given_places = canvas != mask_id
    assert tokens.shape == canvas.shape and tokens.dtype == np.int32
    assert (tokens[given_places] == canvas[given_places]).all()
    assert ((tokens >= 0) & (tokens < WORDS) & (tokens != mask_id)).all()
    others = canvas[::-1].copy()
    others[0] = canvas[row]
    np.testing.assert_array_equal(generate({}, key, others, row_offset=row)[0], tokens[row])


QUICK = settings(max_examples=8, deadline=None, derandomize=True, database=None)
SEEDS, PICKS = st.integers(0, 2**31 - 1), st.integers(0, ROWS - 1)


@pytest.mark.parametrize(
    "name, mask_id, lengths",
    [
        ("ancestral", MASK, (1,)),
        pytest.param("ancestral", MASK, (6,), marks=pytest.mark.slow),
        pytest.param("first_hitting", MASK, (1, 6), marks=pytest.mark.slow),
        pytest.param("entropy_bounded", MASK, (1, 6), marks=pytest.mark.slow),
        pytest.param("uniform_ancestral", MARK, (6,), marks=pytest.mark.slow),
        pytest.param("uniform_ancestral", MARK, (1,), marks=pytest.mark.slow),
    ],
)
def test_rows_of_any_length(name, mask_id, lengths):
    @QUICK
    @given(canvases(lengths, mask_id), SEEDS, PICKS)
    def run(canvas, seed, row):
        check(generator(name), canvas, seed, row, mask_id)

    run()


@pytest.mark.parametrize(
    "block_size, lengths",
    [
        (1, (4,)),
        pytest.param(2, (6,), marks=pytest.mark.slow),
        (3, (6,)),
        pytest.param(3, (3,), marks=pytest.mark.slow),
    ],
)
def test_blocks_of_any_size(block_size, lengths):
    @QUICK
    @given(canvases(lengths, MASK), SEEDS, PICKS)
    def run(canvas, seed, row):
        check(generator("first_hitting", block_size), canvas, seed, row, MASK)

    run()


@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.data(),
)
def test_canvases_of_any_shape(rows, prompt, gaps, data):
    """Prompt and pieces of one row or of each; what is given comes back where it was put."""
    words = st.integers(0, 3)

    def piece(length):
        shape = data.draw(st.sampled_from([(length,), (rows, length)]))
        return np.array(data.draw(st.lists(words, min_size=length, max_size=length))) * np.ones(
            shape, int
        )

    pieces = [piece(data.draw(st.integers(0, 2))) for _ in gaps]
    pieces.append(np.zeros((rows, 1), int))
    canvas = np.asarray(samplers.canvas_with_gaps(pieces, gaps, MASK))
    assert canvas.shape == (rows, sum(p.shape[-1] for p in pieces) + sum(gaps))
    assert ((canvas == MASK).sum(1) == sum(gaps)).all()
    place = 0
    for given_piece, gap in zip(pieces, [*gaps, 0]):
        end = place + given_piece.shape[-1]
        np.testing.assert_array_equal(
            canvas[:, place:end], np.broadcast_to(given_piece, (rows, end - place))
        )
        place = end + gap
    length = prompt + data.draw(st.integers(1, 3))
    canvas = np.asarray(samplers.prompt_canvas(np.full((rows, prompt), 2), length, MASK))
    assert canvas.shape == (rows, length) and (canvas[:, prompt:] == MASK).all()
    assert (canvas[:, :prompt] == 2).all()
