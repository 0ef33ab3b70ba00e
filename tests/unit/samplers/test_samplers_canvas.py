"""Building canvases, and the progress callback."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_reverse import MASK, toy_model, uniform_grid

from mdm_jax import samplers
from mdm_jax.gaussian import parameterisations, paths
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.samplers.by_score import by_score
from mdm_jax.samplers.canvas import blank_canvas, canvas_with_gaps, prompt_canvas

WORDS = st.integers(0, 8)
HIDDEN = 9

# ---- canvases ---------------------------------------------------------------------------------


def test_prompt_canvas():
    np.testing.assert_array_equal(prompt_canvas([1, 2], 4, 9), [[1, 2, 9, 9]])
    two = prompt_canvas(np.array([[1, 2], [3, 4]]), 3, 9)
    np.testing.assert_array_equal(two, [[1, 2, 9], [3, 4, 9]])
    assert two.dtype == jnp.int32
    np.testing.assert_array_equal(prompt_canvas([1, 2], 2, 9), [[1, 2]])
    np.testing.assert_array_equal(prompt_canvas([], 2, 9), [[9, 9]])
    traced = jax.jit(lambda prompt: prompt_canvas(prompt, 3, 9))(jnp.array([[1], [2]]))
    np.testing.assert_array_equal(traced, [[1, 9, 9], [2, 9, 9]])


def test_canvas_with_gaps():
    got = canvas_with_gaps([[1], [2, 3], []], [2, 1], 9)
    np.testing.assert_array_equal(got, [[1, 9, 9, 2, 3, 9]])
    # Pieces that all rows share, next to one of each row's own.
    got = canvas_with_gaps([[], [[1, 2], [3, 4]], [5]], (1, 2), 9)
    np.testing.assert_array_equal(got, [[9, 1, 2, 9, 9, 5], [9, 3, 4, 9, 9, 5]])
    assert got.dtype == jnp.int32


@settings(max_examples=10, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.lists(WORDS, max_size=3), st.integers(1, 3)), min_size=1, max_size=4),
    st.lists(WORDS, max_size=3),
)
def test_pieces_and_gaps_come_back(pairs, tail):
    """Any pieces and gaps: cutting the canvas at the gaps returns both."""
    pieces, gaps = [piece for piece, _ in pairs] + [tail], [gap for _, gap in pairs]
    row = np.asarray(canvas_with_gaps(pieces, gaps, HIDDEN))[0].tolist()
    assert len(row) == sum(map(len, pieces)) + sum(gaps)
    for piece, gap in zip(pieces, gaps + [0]):
        assert row[: len(piece)] == piece
        row = row[len(piece) :]
        assert row[:gap] == [HIDDEN] * gap
        row = row[gap:]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: prompt_canvas([1, 2, 3], 2, 9), "3 tokens but the canvas only 2 positions"),
        (lambda: prompt_canvas([1, 9], 4, 9), "the prompt holds the mask token 9"),
        (lambda: prompt_canvas([0.5], 4, 9), r"integers \[P\] or \[B, P\], got float64"),
        (lambda: prompt_canvas([[[1]]], 4, 9), r"shape \(1, 1, 1\)"),
        (lambda: prompt_canvas([], 0, 9), "at least one row and position"),
        (lambda: canvas_with_gaps([[1]], [], 9), "at least one gap length"),
        (lambda: canvas_with_gaps([[1], [2]], [0], 9), r"must be positive, got \[0\]"),
        (lambda: canvas_with_gaps([[1], [2], []], [2, -1], 9), r"got \[2, -1\]"),
        (lambda: canvas_with_gaps([[1]], [2], 9), "1 gaps need 2 pieces, got 1"),
        (lambda: canvas_with_gaps([[1], [9]], [2], 9), "piece 1 holds the mask token"),
        (lambda: canvas_with_gaps([[[1]] * 2, [[1]] * 3], [2], 9), r"got \[2, 3\]"),
        (lambda: blank_canvas(2, 0, 9), "got 2 x 0"),
    ],
)
def test_bad_canvases(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# ---- progress ---------------------------------------------------------------------------------


def test_progress_of_every_step():
    """Compiled once; called with Python integers after each step of each call."""
    seen, traces = [], []

    def apply_fn(params, inputs, logsnr, documents):
        traces.append(inputs.shape)
        return toy_model(inputs, logsnr, documents)

    generate = samplers.make_generator(
        apply_fn,
        *(samplers.ancestral(), uniform_grid(3)),
        mask_id=MASK,
        progress=lambda done, total: seen.append((done, total)),
    )
    for seed in range(2):
        generate({}, jax.random.key(seed), blank_canvas(200, 4, MASK)).block_until_ready()
        jax.effects_barrier()
        assert seen == [(1, 3), (2, 3), (3, 3)]
        assert all(type(number) is int for pair in seen for number in pair)
        seen.clear()
    assert traces == [(200, 4)]


def test_progress_ends_with_an_early_stop():
    seen = []
    canvas = jnp.array([[0, MASK, MASK, 1], [0, MASK, 2, 1]], jnp.int32)
    run = jax.jit(
        lambda key: samplers.sample_with_trace(
            *(key, toy_model, by_score(), None, canvas, lambda state: ()),
            mask_id=MASK,
            progress=lambda done, total: seen.append((done, total)),
        )
    )
    run(jax.random.key(0))[0].block_until_ready()
    jax.effects_barrier()
    assert seen == [(1, 4), (2, 4)]


def test_no_progress_costs_nothing():
    """Without a callback the program holds none and is the same as ever."""

    def program(**options):
        return str(
            jax.make_jaxpr(
                lambda key: samplers.sample(
                    *(key, toy_model, samplers.ancestral(), uniform_grid(2)),
                    blank_canvas(1, 4, MASK),
                    mask_id=MASK,
                    **options,
                )
            )(jax.random.key(0))
        )

    assert "callback" not in program()
    assert program() == program(progress=None)
    assert program(progress=print).count("callback") > 0


def test_progress_of_gaussian_sampling():
    """With and without a trace, on a grid of four steps."""
    seen = []
    setting = {
        "output": parameterisations.x0(),
        "path": paths.vp(),
        "progress": lambda done, total: seen.append((done, total)),
    }

    def model_fn(x, logsnr, documents=None):
        return 0.5 * x

    grid = jnp.array([-4.0, -1.0, 1.0, 3.0, 5.0])
    arguments = (jax.random.key(0), model_fn, gaussian_samplers.ddim(), grid, (2, 3))
    generate = gaussian_samplers.make_gaussian_generator(
        lambda params, *args: model_fn(*args), gaussian_samplers.ddim(), grid, (3,), **setting
    )
    traced, _ = gaussian_samplers.sample_gaussian_with_trace(
        *arguments, lambda state: state.x0, **setting
    )
    second = generate({}, jax.random.key(0), 2)
    jax.effects_barrier()
    assert seen == [(step, 4) for step in range(1, 5)] * 2
    silent = gaussian_samplers.sample_gaussian(*arguments, **(setting | {"progress": None}))
    np.testing.assert_array_equal(traced, silent)
    np.testing.assert_allclose(second, silent, rtol=1e-6)
