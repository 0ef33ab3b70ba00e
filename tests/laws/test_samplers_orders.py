"""Samplers that choose the order of places: by score, by bounded entropy, in blocks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_reverse import (
    BLANK,
    MASK,
    STATES,
    check_frequencies,
    draw,
    draw_with_trace,
    fill_kernel,
    one_by_one_law,
    place_kernel,
    token_probabilities,
    total_variation,
    toy_model,
)
from variants import slow_except

from mdm_jax import samplers, schedules
from mdm_jax.samplers.by_score import (
    best_positions,
    bounded_positions,
    by_score,
    by_score_along_grid,
    counted_logsnr,
    entropy_bounded,
    kept_count,
    low_confidence_remasking,
    random_remasking,
)
from mdm_jax.schedules import grids
from mdm_jax.schedules import masked as schedules_masked

GREEDY = samplers.temperature(0.0)
ROWS = 4000


def table(score) -> np.ndarray:
    """[256, 4] scores of every place of every state, straight from their definition."""
    probs = token_probabilities()[..., :3]
    best = np.sort(probs, axis=-1)
    return {
        samplers.confidence: best[..., -1],
        samplers.margin: best[..., -1] - best[..., -2],
        samplers.negative_entropy: np.sum(probs * np.log(probs), axis=-1),
    }[score]


def first_places(score: np.ndarray, candidates: np.ndarray, count) -> np.ndarray:
    """The ``count`` best of each row, one after the other, the leftmost of equals."""
    found = np.zeros(candidates.shape, bool)
    for row in range(len(candidates)):
        places = sorted(np.flatnonzero(candidates[row]), key=lambda i: (-score[row, i], i))
        found[row, places[: np.broadcast_to(count, len(candidates))[row]]] = True
    return found


def law_of(*kernels) -> np.ndarray:
    law = np.eye(256)[BLANK]
    for kernel in kernels:
        law = law @ kernel
    return law


def order_of(states) -> list[int]:
    """Places in the order in which one row's states fill them."""
    masked = np.concatenate([[[True] * 4], states[:, 0] == MASK])
    return [int(i) for step in masked[:-1] & ~masked[1:] for i in np.flatnonzero(step)]


# ---- scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [samplers.confidence, samplers.margin, samplers.negative_entropy])
def test_scores_of_every_state(score):
    logits = np.log(token_probabilities()[..., :3]).astype(np.float32)
    # Tokens that are ruled out take no part.
    ruled_out = np.pad(logits, [(0, 0), (0, 0), (0, 2)], constant_values=-np.inf)
    ruled_out[..., 4] = np.finfo(np.float32).min
    whole, some = jax.jit(lambda *logits: [score(each) for each in logits])(logits, ruled_out)
    np.testing.assert_allclose(whole, table(score), atol=2e-6)
    np.testing.assert_allclose(some, table(score), atol=2e-6)


def test_ties_go_to_the_left():
    candidates = jnp.array([[True, False, True, True, True], [False] * 5])
    score = jnp.array([[0.5, 0.9, 0.7, 0.5, 0.5], [0.0] * 5])
    got = best_positions(score, candidates, jnp.array([3, 2]))
    assert got.tolist() == [[True, False, True, True, False], [False] * 5]
    # Not even a score of minus infinity lets another place in.
    got = best_positions(jnp.full((2, 5), -jnp.inf), candidates, jnp.array([4, 1]))
    assert got.tolist() == candidates.tolist()


def test_counted_logsnr():
    """k of n masked: the middle of the rates at which fixed-count training masks k of n."""
    tokens = jnp.array([[9, 9, 9, 9, 1], [9, 0, 0, 0, 1], [0, 0, 9, 9, 1]])
    free = jnp.array([[True] * 4 + [False]] * 2 + [[False, False, True, True, False]])
    rate = schedules.masking_rate(counted_logsnr(tokens, free, 9))
    np.testing.assert_allclose(rate, [3.5 / 4, 0.5 / 4, 1.5 / 2], rtol=1e-6)
    done = counted_logsnr(jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4), bool), 9)
    assert np.isfinite(done).all()


# ---- by score ---------------------------------------------------------------------------------


ORDERS = {
    "confidence": (by_score(samplers.confidence, 1, GREEDY), [1, 2, 0, 3], [2, 2, 2, 2]),
    "margin": (by_score(samplers.margin, 1, GREEDY), [1, 2, 0, 3], [2, 2, 2, 2]),
    "entropy": (by_score(samplers.negative_entropy, 1, GREEDY), [1, 2, 0, 3], [2, 2, 2, 2]),
    "confidence, two": (by_score(samplers.confidence, 2, GREEDY), [1, 3, 0, 2], [2, 2, 1, 1]),
    "margin, two": (by_score(samplers.margin, 2, GREEDY), [1, 3, 0, 2], [2, 2, 1, 1]),
    "entropy, two": (by_score(samplers.negative_entropy, 2, GREEDY), [1, 2, 0, 3], [2, 2, 2, 2]),
    # Scores are the network's own: filtered like the tokens, they would all be tied here.
    "cold": (by_score(token_filter=samplers.temperature(1e-6)), [1, 2, 0, 3], [2, 2, 2, 2]),
    "blocks": (low_confidence_remasking(2, 2, GREEDY), [1, 0, 2, 3], [2, 2, 2, 2]),
}


@functools.cache
def greedy_runs() -> dict:
    """Name -> (tokens, states) of every sampler of ORDERS, one program."""
    canvas = samplers.blank_canvas(1, 4, MASK)

    def run(key):
        return {
            name: samplers.sample_with_trace(
                *(key, toy_model, sampler, None, canvas, lambda s: s.tokens), mask_id=MASK
            )
            for name, (sampler, _, _) in ORDERS.items()
        }

    return jax.tree.map(np.asarray, jax.jit(run)(jax.random.key(0)))


@pytest.mark.parametrize("name", ORDERS)
def test_greedy_orders(name):
    _, order, expected = ORDERS[name]
    tokens, states = greedy_runs()[name]
    if name.endswith("two"):
        order = [place for pair in (order[:2], order[2:]) for place in sorted(pair)]
    assert order_of(states) == order
    assert tokens.tolist() == [expected]


COUNTED = {
    "one by one": (by_score(samplers.margin), None, samplers.margin, (1, 1, 1, 1)),
    "schedule": (
        *(by_score(samplers.negative_entropy, (3, 1, 1)), None, samplers.negative_entropy, (3, 1)),
    ),
    "last takes all": (by_score(samplers.confidence, [1, 1]), None, samplers.confidence, (1, 3)),
    # Rates sin(pi/2 (1 - i/4)), times 4: 4, 3.7, 2.8, 1.5, 0; nothing changes in the first step.
    "MaskGIT": (
        by_score_along_grid(samplers.confidence),
        grids.cosine(schedules_masked.linear(), 4),
        samplers.confidence,
        (0, 1, 1, 2),
    ),
}


@pytest.mark.parametrize("name", slow_except({"one by one", "MaskGIT"}, COUNTED))
def test_by_score_follows_its_law(name):
    """Places are a function of the state, tokens are independent: a product of matrices."""
    sampler, grid, score, counts = COUNTED[name]
    places = (first_places(table(score), STATES == MASK, count) for count in counts)
    law = law_of(*map(fill_kernel, places))
    assert sampler.bias == "biased" and total_variation(law, one_by_one_law()) > 0.08
    canvas = samplers.blank_canvas(ROWS, 4, MASK)
    check_frequencies(draw(toy_model, sampler, grid, canvas, seed=len(name)), law)


# ---- entropy-bounded --------------------------------------------------------------------------


BOUNDED = jax.jit(bounded_positions)


def bounded(entropy, candidates, gamma) -> np.ndarray:
    """Longest run from the lowest entropy on whose sum without its largest member fits."""
    found = np.zeros(candidates.shape, bool)
    for row in range(len(candidates)):
        places = sorted(np.flatnonzero(candidates[row]), key=lambda i: (entropy[row, i], i))
        runs = [places[:length] for length in range(len(places) + 1)]
        fits = [
            r for r in runs if len(r) < 2 or sum(entropy[row, r]) - max(entropy[row, r]) <= gamma
        ]
        found[row, max(fits, key=len)] = True
    return found


@pytest.mark.parametrize(
    "gamma, at_once", [(0.0, 1), (0.5, 1), (1.1, 2), (2.0, 2), (2.5, 3), (50.0, 4)]
)
def test_bounded_places(gamma, at_once):
    entropy = -table(samplers.negative_entropy)
    got = BOUNDED(jnp.asarray(entropy, jnp.float32), jnp.asarray(STATES == MASK), gamma)
    expected = bounded(entropy, STATES == MASK, gamma)
    np.testing.assert_array_equal(got, expected)
    assert (expected.any(1) == (STATES == MASK).any(1)).all()
    assert expected[BLANK].sum() == at_once


def test_certain_places_cost_nothing():
    entropy = jnp.array([[0.0, 0.7, 0.0, 0.0, 0.2, 0.0]])
    candidates = jnp.array([[True, True, True, True, True, False]])
    got = jax.jit(bounded_positions)(entropy, candidates, 0.0)
    assert got.tolist() == [[True, False, True, True, True, False]]


def test_entropy_bounded_follows_its_law(temperature=0.6):
    """The bound is on entropies of the distribution that tokens are drawn from."""
    gamma, probs = 1.1, token_probabilities() ** (1 / temperature)
    probs = probs / probs.sum(-1, keepdims=True)
    entropy = -np.sum(probs[..., :3] * np.log(probs[..., :3]), axis=-1)
    places = bounded(entropy, STATES == MASK, gamma)
    assert 1 < places[BLANK].sum() < 4
    kernel = place_kernel(places.astype(float), probabilities=probs)
    law = law_of(*[kernel] * 4)
    sampler = entropy_bounded(gamma, samplers.temperature(temperature))
    canvas = samplers.blank_canvas(ROWS, 4, MASK)
    check_frequencies(draw(toy_model, sampler, None, canvas, seed=1), law)


# ---- in blocks --------------------------------------------------------------------------------


def test_kept_counts():
    """floor(n / steps), one more in the first n mod steps; every block comes out even."""
    for places, steps in itertools.product(range(8), range(1, 7)):
        counts = kept_count(np.int32(places), np.arange(steps), steps).tolist()
        more = places % steps
        assert counts == [places // steps + 1] * more + [places // steps] * (steps - more)


def test_blocks_are_counted_over_the_places_to_fill():
    """Blocks of 3 in 2 steps, rows of 5, 1 and no places around a prompt: 2 1 1 1, 1, none."""
    canvas = np.full((3, 8), 7, np.int32)
    canvas[0, [0, 3, 6]], canvas[1, :7], canvas[2] = 1, 2, 3

    def model(inputs, logsnr, documents):
        return jnp.zeros((*inputs.shape, 7))

    _, states = draw_with_trace(
        model, random_remasking(3, 2), None, jnp.asarray(canvas), 0, lambda s: s.tokens, 7
    )
    assert len(states) == 6  # as many as 8 places would take
    masked = (np.concatenate([canvas[None], states]) == 7).sum(-1)
    assert (-np.diff(masked, axis=0)).T.tolist() == [[2, 1, 1, 1, 0, 0], [1] + [0] * 5, [0] * 6]
    left = np.flatnonzero(canvas[0] == 7)
    assert (states[1][0][left[:3]] != 7).all() and (states[1][0][left[3:]] == 7).all()


def low_confidence_kernel(kept: int) -> np.ndarray:
    """[256, 256] tokens at all masked places, the likeliest of those drawn kept."""
    probs, kernel = token_probabilities(), np.zeros((256, 256))
    for state in range(256):
        places = np.flatnonzero(STATES[state] == MASK)
        for drawn in itertools.product(range(3), repeat=len(places)):
            chance = probs[state, places, list(drawn)]
            best = sorted(range(len(places)), key=lambda i: (-chance[i], i))[:kept]
            new = STATES[state].copy()
            new[places[best]] = np.array(drawn, int)[best]
            kernel[state, new @ [64, 16, 4, 1]] += np.prod(chance)
    return kernel


def test_low_confidence_remasking_follows_its_law():
    law = law_of(*[low_confidence_kernel(2)] * 2)
    assert total_variation(law, one_by_one_law()) > 0.1
    sampler = low_confidence_remasking(4, 2)
    canvas = samplers.blank_canvas(ROWS, 4, MASK)
    check_frequencies(draw(toy_model, sampler, None, canvas, seed=2), law)


def test_random_remasking_follows_its_law():
    """Two steps of two places at random; one place per step is the exact law."""

    def kernel(kept):
        subsets = itertools.combinations(range(4), kept)
        chosen = [fill_kernel(np.isin(np.arange(4), s) & (STATES == MASK)) for s in subsets]
        return np.mean(chosen, axis=0)

    first = kernel(2)
    # The second step fills what is left.
    law = law_of(first, fill_kernel(STATES == MASK))
    assert total_variation(law, one_by_one_law()) > 0.05
    canvas = samplers.blank_canvas(ROWS, 4, MASK)
    check_frequencies(draw(toy_model, random_remasking(4, 2), None, canvas, seed=3), law)
    exact = draw(toy_model, random_remasking(4, 4), None, canvas, seed=4)
    check_frequencies(exact, one_by_one_law())


# ---- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: by_score(tokens_per_step=[2, 0]), "tokens_per_step must be .* got 0"),
        (lambda: by_score(tokens_per_step=[]), "at least one step"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "token_filter",
    [GREEDY, samplers.top_k(1), pytest.param(samplers.top_p(0.3), marks=pytest.mark.slow)],
)
def test_entropy_bounded_needs_a_distribution(token_filter):
    """A nucleus of 0.3 holds one token of three, whatever their probabilities."""
    canvas = samplers.blank_canvas(1, 4, MASK)
    with pytest.raises(ValueError, match="entropy_bounded draws from a distribution.*by_score"):
        samplers.sample(
            jax.random.key(0),
            *(toy_model, entropy_bounded(1.0, token_filter), None, canvas),
            mask_id=MASK,
        )
