"""Samplers of uniform-token diffusion: exact laws by enumeration, and what they never do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import uniform_oracle as oracle
import zoo
from scipy import stats

from mdm_jax import samplers
from mdm_jax.samplers.uniform import (
    noisy_logits,
    reverse_logits,
    step_evidence,
    uniform_ancestral,
    uniform_corrected,
)
from mdm_jax.testing import toys
from mdm_jax.testing.toys import row_denoiser

ROWS, WEIGHTS = ((0, 1), (1, 1), (2, 0)), (0.5, 0.3, 0.2)
"""A law on two tokens out of three."""
MARK = 3
STATES = oracle.states(2, 3)
SAMPLERS = {
    "ancestral": (uniform_ancestral(3), 1.0),
    "corrected": (uniform_corrected(3, 0.6), 0.6),
}
"""Name -> (sampler, share of the reverse step)."""


def uniform_grid(steps):
    clean = np.arange(steps + 1) / steps
    with np.errstate(divide="ignore"):
        return (np.log(clean) - np.log1p(-clean)).astype(np.float32)


def step_matrix(start, stop, prediction=1.0):
    """[9, 9] transition of all rows in one step, by Bayes' rule on enumerated matrices."""
    clean = oracle.leave_one_out(ROWS, WEIGHTS, start, 3)
    matrix = []
    for z, c in zip(STATES, clean):
        places = []
        for token, each in zip(z, c):
            law = oracle.reverse_matrix(np.tile(each, (3, 1)), start, stop, 3)[token]
            anew = oracle.reverse_matrix(np.tile(each, (3, 1)), start, 1.0, 3)[token]
            law = prediction * law + (1 - prediction) * anew @ oracle.kernel(stop, 3)
            places.append(law)
        matrix.append(np.outer(*places).ravel())
    return np.array(matrix)


@functools.cache
def exact_law(steps, prediction=1.0):
    """[9] law of a sampler on the grid of uniform rates."""
    survival = np.arange(steps + 1) / steps
    law = np.full(9, 1 / 9)
    for start, stop in zip(survival[:-1], survival[1:]):
        law = law @ step_matrix(start, stop, prediction)
    return law


def data_law():
    law = np.zeros(9)
    law[[a * 3 + b for a, b in ROWS]] = WEIGHTS
    return law


def draw(sampler, grid, canvas, seed=0, model=None, mask_id=MARK):
    model = row_denoiser(ROWS, WEIGHTS, 3) if model is None else model
    run = zoo.quick(
        lambda key, canvas: samplers.sample(key, model, sampler, grid, canvas, mask_id=mask_id)
    )
    return np.asarray(run(jax.random.key(seed), jnp.asarray(canvas, jnp.int32)))


# ---- one step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, rtol", [(np.float64, 1e-9), (np.float32, 3e-5)])
def test_one_step_is_bayes_rule(dtype, rtol):
    """Every pair of levels, both infinite ends included, for any c and every current token."""
    c = np.random.default_rng(0).dirichlet(np.ones(5), size=5)
    with np.errstate(divide="ignore"):
        survival = np.array([0.0, 1e-5, 0.2, 0.7, 1 - 1e-4, 1.0])
        level = np.log(survival) - np.log1p(-survival)
    pairs = [(i, j) for i in range(6) for j in range(i + 1, 6)]
    start, stop = np.array(pairs).T
    with jax.enable_x64(dtype == np.float64):
        run = zoo.quick(
            jax.vmap(lambda a, b: reverse_logits(np.log(c).astype(dtype), np.arange(5), a, b))
        )
        found = np.asarray(
            jax.nn.softmax(run(level[start].astype(dtype), level[stop].astype(dtype)))
        )
    for (i, j), law in zip(pairs, found):
        expected = oracle.reverse_matrix(c, survival[i], survival[j], 5)
        np.testing.assert_allclose(law, expected, rtol=rtol, atol=rtol)


def test_close_levels_keep_the_token():
    """Where survivals are equal to rounding, the evidence for staying is not."""
    a = jnp.float32(3.0)
    b = jnp.nextafter(a, jnp.float32(9.0))
    gap = np.float64(b) - np.float64(a)
    survival = 1 / (1 + np.exp(-3.0))
    expected = np.log(3 / (gap * (1 - survival)))
    np.testing.assert_allclose(step_evidence(a, b, 3), expected, rtol=1e-5)
    assert step_evidence(-jnp.inf, 0.0, 3) == 0


def test_noisy_logits():
    c = np.array([0.7, 0.3, 0.0])
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.log(c), jnp.float32)
    found = jnp.exp(noisy_logits(logits, jnp.float32(0.5)))
    np.testing.assert_allclose(found, c @ oracle.kernel(1 / (1 + np.exp(-0.5)), 3), rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(noisy_logits(logits, jnp.inf)), c, rtol=1e-6)


# ---- laws of whole rows --------------------------------------------------------------------------


def test_law_approaches_the_data_as_the_grid_is_refined():
    """With the ideal denoiser the distance falls like 1/N; one step forgets the dependence."""
    distance = [oracle.total_variation(exact_law(n), data_law()) for n in (1, 4, 16, 64)]
    assert distance[0] > 0.1
    assert all(3 < a / b < 5 for a, b in zip(distance[1:], distance[2:]))
    assert distance[-1] < 0.01


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_follow_the_law_of_their_steps(name):
    """40,000 rows against the enumerated law of five steps (chi-square, level 1e-4)."""
    sampler, prediction = SAMPLERS[name]
    tokens = draw(sampler, uniform_grid(5), np.full((40_000, 2), MARK), seed=2)
    observed = np.bincount(tokens @ np.array([3, 1]), minlength=9)
    law, other = exact_law(5, prediction), exact_law(5, 1.6 - prediction)
    possible = law > 1e-9
    assert not observed[~possible].any()
    fits, differs = (
        stats.chisquare(observed[possible], 40_000 * p[possible], sum_check=False).pvalue
        for p in (law, other)
    )
    assert differs < 1e-4 < fits


def test_forgetting_costs_an_ideal_network():
    """Its errors are those of drawing tokens apart, and forgetting adds more of these."""
    for steps in (8, 64):
        plain, mixed = (oracle.total_variation(exact_law(steps, p), data_law()) for p in (1.0, 0.6))
        assert 1.1 * plain < mixed < 5 * plain


def test_samplers_condition_on_what_is_given():
    """A network that reads the prompt: the rest follows its law (chi-square, level 1e-4)."""

    def model(inputs, logsnr, documents):
        seen = jnp.where(inputs[:, :1] == 1, jnp.array([[0.1, 0.6, 0.3]]), 1 / 3)
        return jnp.broadcast_to(jnp.log(seen)[:, None], (*inputs.shape, 3))

    tokens = draw(uniform_ancestral(3), uniform_grid(4), np.tile([1, MARK], (20_000, 1)), 0, model)
    assert (tokens[:, 0] == 1).all()
    counts = np.bincount(tokens[:, 1], minlength=3)
    assert stats.chisquare(counts, 20_000 * np.array([0.1, 0.6, 0.3])).pvalue > 1e-4


# ---- what always holds ---------------------------------------------------------------------------


def odd_model(inputs, logsnr, documents):
    """Seven logits of which five are real; the special ones are by far the highest."""
    context = jnp.sum(inputs + 1, -1)[:, None, None] + jnp.arange(inputs.shape[1])[None, :, None]
    logits = jnp.cos(context * (1.0 + jnp.arange(7))[None, None] + logsnr[..., None] / 5)
    return logits.at[..., 5:].set(50.0)


@pytest.mark.parametrize(
    "make", [pytest.param(uniform_ancestral, marks=pytest.mark.slow), uniform_corrected]
)
def test_given_tokens_stay_and_rows_are_independent(make):
    """Prompts with special ids, gaps, full and blank rows; row i is the same in another batch."""
    rng = np.random.default_rng(1)
    canvas = rng.choice([0, 1, 4, 5], size=(6, 9)).astype(np.int32)
    canvas[rng.random(canvas.shape) < 0.6] = 6
    canvas[0], canvas[1] = 6, 2
    generate = samplers.make_generator(
        lambda params, *args: odd_model(*args), make(5), uniform_grid(4), mask_id=6
    )
    tokens = np.asarray(generate({}, jax.random.key(0), canvas))
    given = canvas != 6
    assert (tokens[given] == canvas[given]).all() and (tokens[~given] < 5).all()
    assert tokens.dtype == np.int32
    for i in range(6):
        others = np.concatenate([canvas[i : i + 1], canvas[:5]])
        moved = generate({}, jax.random.key(0), others, row_offset=i)
        np.testing.assert_array_equal(moved[0], tokens[i])


def test_start_is_uniform_and_levels_are_shown():
    """The network sees uniform tokens at the first level, then the grid's own."""
    seen = []

    def model(inputs, logsnr, documents):
        jax.debug.callback(lambda *a: seen.append(a), inputs, logsnr)
        return jnp.zeros((*inputs.shape, 4))

    canvas = np.full((4000, 3), 4)
    canvas[:, 1] = 2
    draw(uniform_ancestral(4), uniform_grid(3), canvas, model=model, mask_id=4)
    jax.effects_barrier()
    shown = sorted((float(logsnr[0, 0]), np.asarray(inputs)) for inputs, logsnr in seen)
    level = [value for value, _ in shown]
    np.testing.assert_allclose(level, [-np.log(2**24 - 1), -np.log(2), np.log(2)], rtol=1e-6)
    first = shown[0][1]
    assert (first[:, 1] == 2).all()
    assert stats.chisquare(np.bincount(first[:, [0, 2]].ravel(), minlength=4)).pvalue > 1e-4
    assert len(seen) == 3


def test_greedy_tail_and_filters():
    """One step from anywhere: the likeliest clean token; temperature 0 acts on c, not on that."""
    canvas = np.tile([0, 3, 1, 0], (50, 1))
    model = lambda inputs, *_: toys.Toy().apply(toys.toy_params(), inputs)  # noqa: E731

    @zoo.quick
    def run(grid):
        greedy, cold = (
            uniform_ancestral(3, greedy_tail=True),
            uniform_ancestral(3, samplers.temperature(0.0)),
        )
        return [
            samplers.sample(jax.random.key(0), model, sampler, grid, canvas, mask_id=3)[:, 1]
            for sampler in (greedy, cold)
        ]

    best = int(jnp.argmax(model(canvas[:1])[0, 1]))
    greedy, cold = run(jnp.array([-jnp.inf, jnp.inf]))
    assert (greedy == best).all() and (cold == best).all()  # nothing to go by but the context
    greedy, cold = run(jnp.array([0.0, jnp.inf]))
    assert len(np.unique(greedy)) > 1 and (cold == best).all()  # the token that is there counts


def test_traced_grid_still_ends_clean():
    """An unchecked grid that stops short of +inf: the last step draws clean tokens all the same."""
    run = zoo.quick(
        lambda grid: samplers.sample(
            jax.random.key(0),
            lambda inputs, *_: jnp.broadcast_to(jnp.array([40.0, 0, 0]), (*inputs.shape, 3)),
            uniform_ancestral(3),
            grid,
            jnp.full((50, 4), 3),
            mask_id=3,
        )
    )
    assert not np.any(run(jnp.array([-jnp.inf, -2.0, -1.0])))


def test_labels_and_errors():
    assert uniform_ancestral(3).bias == "discretised"
    assert uniform_ancestral(3, greedy_tail=True).bias == uniform_corrected(3).bias == "biased"
    for make in (uniform_ancestral, uniform_corrected):
        with pytest.raises(ValueError, match="needs 2 <= num_tokens"):
            make(1)
        with pytest.raises(ValueError, match="mask_id must be at least num_tokens = 4, got 3"):
            draw(make(4), uniform_grid(2), np.full((1, 2), 3))
