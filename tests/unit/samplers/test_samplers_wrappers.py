"""Guidance by the prompt, and generation without repeated n-grams."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from toy_reverse import MASK, STATES, check_frequencies, draw, draw_with_trace, toy_model

from mdm_jax import samplers
from mdm_jax.samplers.by_score import by_score
from mdm_jax.samplers.canvas import canvas_with_gaps
from mdm_jax.samplers.wrappers import completes_repeat, no_repeat_ngrams, prompt_guidance, wrapped
from mdm_jax.testing import toys

# ---- guidance ---------------------------------------------------------------------------------


@functools.cache
def toy_logits() -> np.ndarray:
    """[256, 4, 3] float64 logits of every state, by the formula of the specification."""
    place, token = np.arange(4), np.arange(3)
    bias = 0.3 * np.cos(1 + place[:, None] + 2 * token[None])
    logits = np.tile(bias, (256, 1, 1))
    for state, i, j in itertools.product(range(256), range(4), range(4)):
        if i != j and STATES[state, j] != MASK:
            reach = 1 / (1 + abs(i - j))
            logits[state, i] += reach * np.array(toys.THETA)[(token - STATES[state, j]) % 3]
    return logits


def number(tokens) -> int:
    return int(np.dot(tokens, [64, 16, 4, 1]))


def heard(wrapper, canvas, model=toy_model, rows=None) -> np.ndarray:
    """The logits that a sampler hears through a wrapper, in a step from the canvas."""

    def step(context, denoise, state):
        tokens = state.tokens if rows is None else state.tokens[rows]
        return state._replace(memory=denoise(tokens, context.logsnr, rows))

    size = len(canvas) if rows is None else len(rows)
    probe = samplers.Sampler(
        "probe",
        lambda keys, tokens, mask_id: samplers.SamplerState(tokens, jnp.zeros((size, 4, 3))),
        step,
        lambda state, mask_id: jnp.zeros(len(state.tokens), bool),
        lambda length: 1,
    )
    # Rows of the memory are picked by `finished`, so a probe of some rows asks for all of them.
    _, logits = draw_with_trace(
        model, wrapped(probe, wrapper), None, jnp.asarray(canvas, jnp.int32), 0, lambda s: s.memory
    )
    return logits[0]


CANVAS = np.array([[0, MASK, 1, MASK], [MASK, 2, MASK, MASK], [MASK] * 4])


@pytest.mark.parametrize(("scale", "keep"), [(1.0, ()), (2.5, ()), (0.5, ()), (2.5, (1, 2))])
def test_guided_logits(scale, keep):
    """uncond + scale (cond - uncond); without a prompt the two are one. Kept tokens are in both."""
    conditional = np.stack([toy_logits()[number(row)] for row in CANVAS])
    blind = np.where(np.isin(CANVAS, keep), CANVAS, MASK)
    unconditional = np.stack([toy_logits()[number(row)] for row in blind])
    expected = unconditional + scale * (conditional - unconditional)
    np.testing.assert_allclose(heard(prompt_guidance(scale, keep), CANVAS), expected, atol=2e-6)
    np.testing.assert_allclose(expected[2], conditional[2])


def test_guidance_is_one_pass_over_two_batches():
    shapes = []

    def model(inputs, logsnr, documents):
        shapes.append((inputs.shape, logsnr.shape))
        return toy_model(inputs, logsnr, documents)

    got = heard(prompt_guidance(2.0), CANVAS, model, rows=np.array([1, 0, 1]))
    assert set(shapes) == {((6, 4), (6, 1))}
    expected = heard(prompt_guidance(2.0), CANVAS)
    np.testing.assert_allclose(got, expected[[1, 0, 1]], atol=1e-6)


def test_only_the_prompt_is_hidden():
    """Generated tokens are seen by both passes: the law of two places after a prompt of two."""
    scale, start = 2.0, [0, MASK, 1, MASK]
    law = np.zeros(256)
    for first, second in itertools.permutations([1, 3]):
        for a, b in itertools.product(range(3), repeat=2):
            states = [list(start), list(start), list(start)]
            states[1][first] = states[2][first] = a
            states[2][second] = b
            chance = 0.5
            for state, place, token in ((states[0], first, a), (states[1], second, b)):
                blind = [t if i in (1, 3) else MASK for i, t in enumerate(state)]
                base = toy_logits()[number(blind), place]
                push = base + scale * (toy_logits()[number(state), place] - base)
                chance *= np.exp(push[token]) / np.exp(push).sum()
            law[number(states[2])] += chance
    sampler = wrapped(samplers.first_hitting(), prompt_guidance(scale))
    tokens = draw(toy_model, sampler, None, jnp.tile(jnp.array([start]), (4000, 1)), seed=1)
    check_frequencies(tokens, law)


def test_ruled_out_tokens_stay_ruled_out():
    """A token without probability in either pass makes no NaN."""

    def model(inputs, logsnr, documents):
        blind = jnp.all(inputs == MASK, axis=-1)[:, None]
        logits = jnp.zeros((*inputs.shape, 3))
        logits = logits.at[..., 0].set(jnp.where(blind, -jnp.inf, 0.5))
        return logits.at[..., 1].set(jnp.where(blind, 0.0, -jnp.inf))

    got = heard(prompt_guidance(3.0), np.array([[1, MASK, MASK, MASK]]), model)
    np.testing.assert_array_equal(got[0, 1], [0.5, -np.inf, 0.0])


# ---- n-grams ----------------------------------------------------------------------------------

WORDS, HIDDEN = 3, 3
FOUND = jax.jit(completes_repeat, static_argnums=(1, 2, 3))


def repeats_at(row, place, n) -> bool:
    """Whether some visible n-gram over ``place`` reads like another one."""
    grams = {
        start: tuple(row[start : start + n])
        for start in range(len(row) - n + 1)
        if HIDDEN not in row[start : start + n]
    }
    over = [start for start in grams if start <= place < start + n]
    return any(grams[a] == grams[b] for a in over for b in grams if a != b)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(tokens=arrays.arrays(np.int32, (6, 8), elements=st.integers(0, WORDS)))
def test_completes_repeat(n, tokens):
    """Against filling in every token, left and right context and overlaps included."""
    found = np.asarray(FOUND(tokens, n, HIDDEN, WORDS))
    for row, place in itertools.product(range(6), range(8)):
        for word in range(WORDS):
            filled = tokens[row].tolist()
            filled[place] = word
            expected = tokens[row, place] == HIDDEN and repeats_at(filled, place, n)
            assert found[row, place, word] == expected


def test_completes_repeat_by_hand():
    cases = {
        (0, 1, 2, 0, 3): [(4, 1)],  # 0 1 again
        (0, 1, 3, 1, 3): [(2, 0), (2, 1)],  # 0 1 to the right of the gap; 1 1 on both sides of it
        (1, 1, 3, 2, 2): [(2, 1), (2, 2)],  # overlapping itself, on both sides
        (1, 3, 1, 2, 3): [(1, 1), (1, 2)],  # 1 1 would come in twice; 1 2 is there
        (0, 3, 3, 0, 1): [(1, 1)],  # a gap's own neighbour says nothing
    }
    found = np.asarray(FOUND(np.array(list(cases), np.int32), 2, HIDDEN, WORDS))
    for row, expected in zip(found, cases.values(), strict=True):
        assert [(int(i), int(v)) for i, v in np.argwhere(row)] == expected
    assert not FOUND(np.array([[0, 3]], np.int32), 3, HIDDEN, WORDS).any()  # shorter than n


def monotonous(inputs, logsnr, documents):
    """Twelve tokens of which the first two take nearly everything; 12 is the mask."""
    logits = jnp.zeros(13).at[jnp.array([0, 1, 12])].set(jnp.array([6.0, 5.8, 9.0]))
    return jnp.broadcast_to(logits, (*inputs.shape, 13))


def bigram_repeats(tokens, free) -> np.ndarray:
    """[B] how often a bigram with a generated token reads like another one of the row."""
    pairs = tokens[:, :-1] * 13 + tokens[:, 1:]
    new = free[:, :-1] | free[:, 1:]
    same = pairs[:, :, None] == pairs[:, None]
    return (np.triu(same, 1) & (new[:, :, None] | new[:, None])).sum((1, 2))


@pytest.mark.slow
def test_one_at_a_time_never_repeats():
    """Two gaps around a piece of prompt; without the constraint every row repeats."""
    canvas = canvas_with_gaps([[0, 1, 1], [0, 2], []], [4, 5], 12)
    canvas = jnp.tile(canvas, (64, 1))
    free = np.asarray(canvas) == 12
    run = functools.partial(draw, monotonous, grid=None, canvas=canvas, seed=0, mask_id=12)
    assert (bigram_repeats(run(sampler=samplers.first_hitting()), free) > 0).all()
    constrained = wrapped(samplers.first_hitting(), no_repeat_ngrams(2))
    tokens = run(sampler=constrained)
    assert (bigram_repeats(tokens, free) == 0).all()
    assert (tokens[~free] == np.asarray(canvas)[~free]).all() and (tokens < 12).all()
    # All at once they do not see each other.
    at_once = run(sampler=wrapped(by_score(tokens_per_step=9), no_repeat_ngrams(2)))
    assert (bigram_repeats(at_once, free) > 0).any()


def test_some_token_is_always_left():
    """14 places, twelve tokens, none twice: the last ones fall back to the network's own."""
    canvas = samplers.blank_canvas(8, 14, 12)
    sampler = wrapped(samplers.first_hitting(), no_repeat_ngrams(1))
    tokens = draw(monotonous, sampler, None, canvas, seed=0, mask_id=12)
    assert all(set(row) == set(range(12)) for row in tokens)


def test_wrappers_apply_from_the_network_on():
    """Guided first, then constrained: what is forbidden stays forbidden."""
    canvas = np.array([[0, 1, 0, MASK]])
    got = heard(lambda *args: no_repeat_ngrams(2)(args[0], prompt_guidance(2.0)(*args)), canvas)
    assert got[0, 3].argmin() == 1 and got[0, 3, 1] == -np.inf
    np.testing.assert_allclose(got[0, 3, [0, 2]], heard(prompt_guidance(2.0), canvas)[0, 3, [0, 2]])
    names = []

    def named(name):
        def wrapper(context, denoise):
            names.append(name)
            return denoise

        return wrapper

    both = wrapped(samplers.ancestral(), named("first"), named("second"))
    draw(toy_model, both, np.array([-np.inf, np.inf]), jnp.asarray(canvas), seed=0)
    assert names[:2] == ["first", "second"]
    assert both.bias == "discretised" and both.name == "ancestral"


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: prompt_guidance(float("inf")), "scale must be a number .* got inf"),
        (lambda: no_repeat_ngrams(0), "n >= 1, got 0"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()
