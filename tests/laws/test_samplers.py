"""Samplers: exact laws on the enumerable toy, and what no sampler may ever do."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from toy_reverse import (
    CLEAN,
    MASK,
    ROWS,
    ancestral_law,
    check_frequencies,
    draw,
    draw_with_trace,
    entropy,
    one_by_one_law,
    token_probabilities,
    total_variation,
    toy_model,
    uniform_grid,
)

from mdm_jax import samplers
from mdm_jax.models.transformer import Transformer, TransformerConfig
from mdm_jax.samplers.ancestral import next_log_rate, reveal_probability
from mdm_jax.schedules import grids

# ---- exact laws -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps, data_rows, distance, nats",
    [
        (1, (0.01058130, 0.00725139, 0.01985600), 0.25732483, 4.30834123),
        (2, (0.01260726, 0.00984713, 0.04513247), 0.13181291, 4.25531432),
        (4, (0.01319132, 0.01081261, 0.06392104), 0.06802837, 4.18086177),
        (8, (0.01334107, 0.01116088, 0.07508936), 0.03464953, 4.12915844),
        (32, None, 0.00878561, 4.08336732),
    ],
)
def test_ancestral_law(steps, data_rows, distance, nats):
    law = ancestral_law(steps)
    assert law[CLEAN].sum() == pytest.approx(1, abs=1e-12)
    if data_rows is not None:
        np.testing.assert_allclose(law[ROWS], data_rows, atol=6e-9)
    assert total_variation(law, one_by_one_law()) == pytest.approx(distance, abs=6e-9)
    assert entropy(law) == pytest.approx(nats, abs=6e-9)


def test_limit_law():
    law = one_by_one_law()
    np.testing.assert_allclose(law[ROWS], [0.01338262, 0.01139992, 0.08753044], atol=6e-9)
    assert entropy(law) == pytest.approx(4.06669124, abs=6e-9)


def test_ancestral_samples_follow_the_law():
    """50,000 rows of the implementation against the enumerated law of its four steps."""
    canvas = samplers.blank_canvas(50_000, 4, MASK)
    tokens, masked = draw_with_trace(
        toy_model,
        samplers.ancestral(),
        uniform_grid(4),
        canvas,
        4,
        lambda state: jnp.mean(state.tokens == MASK),
    )
    # 200,000 places, each still masked at the grid's own rate: 5 standard errors.
    rate = np.array([0.75, 0.5, 0.25, 0.0])
    assert (np.abs(masked - rate) <= 5 * np.sqrt(rate * (1 - rate) / 200_000)).all()
    check_frequencies(tokens, ancestral_law(4))


def test_first_hitting_samples_follow_the_limit_law():
    """50,000 blank rows, and as many that infill places 0 and 2 of x3."""
    start = int(np.dot([MASK, 2, MASK, 2], [64, 16, 4, 1]))
    probs = token_probabilities()
    expected = np.zeros((3, 3))
    for a, b in itertools.product(range(3), repeat=2):
        for (i, v), (j, w) in itertools.permutations([(0, a), (2, b)]):
            middle = start + (v - MASK) * 4 ** (3 - i)
            expected[a, b] += probs[start, i, v] * probs[middle, j, w] / 2
    canvas = np.repeat([[MASK] * 4, [MASK, 2, MASK, 2]], 50_000, axis=0)
    blank, infilled = np.split(draw(toy_model, samplers.first_hitting(), None, canvas, seed=7), 2)
    check_frequencies(blank, one_by_one_law())
    assert (infilled[:, [1, 3]] == 2).all()
    observed = np.histogram2d(*infilled[:, [0, 2]].T, bins=[np.arange(4)] * 2)[0]
    assert stats.chisquare(observed.ravel(), 50_000 * expected.ravel()).pvalue > 1e-4


# ---- levels -----------------------------------------------------------------------------------


def test_reveal_probability():
    """Against float64 rates over the whole line, exact at both infinite ends, and telescoping."""
    grid = np.concatenate([[-np.inf], np.linspace(-14, 14, 57), [np.inf]]).astype(np.float32)
    rate = 1 / (1 + np.exp(grid.astype(np.float64)))
    reveal = np.asarray(reveal_probability(jnp.asarray(grid[:-1]), jnp.asarray(grid[1:])))
    np.testing.assert_allclose(reveal, (rate[:-1] - rate[1:]) / rate[:-1], rtol=1e-6)
    assert reveal[-1] == 1.0
    assert reveal_probability(-jnp.inf, jnp.inf) == 1.0
    left = np.cumprod(1 - reveal.astype(np.float64))
    np.testing.assert_allclose(left[:-1], rate[1:-1], rtol=1e-4)


def test_ancestral_shows_the_current_level():
    """A network that names its level: what step t reveals carries the number t."""

    def model(inputs, logsnr, documents):
        assert logsnr.shape == (inputs.shape[0], 1)
        step = jnp.round(3 * jax.nn.sigmoid(logsnr))  # survival 0, 1/3, 2/3
        step = jnp.where(jnp.isfinite(logsnr), step, 3.0)
        spread = -jnp.abs(jnp.arange(4.0)[None] - step)[:, None]
        return 1e4 * jnp.broadcast_to(spread, (*inputs.shape, 4))

    canvas = samplers.blank_canvas(3, 40, 4)
    tokens, trace = draw_with_trace(
        model, samplers.ancestral(), uniform_grid(3), canvas, 0, lambda state: state.tokens, 4
    )
    before = np.concatenate([canvas[None], trace[:-1]])
    for step in range(3):
        new = (before[step] == 4) & (trace[step] != 4)
        assert new.any() and (trace[step][new] == step).all()
    assert (trace[-1] == tokens).all()


def test_first_hitting_shows_its_clock():
    def model(inputs, logsnr, documents):
        cell = jnp.floor(64 * jax.nn.sigmoid(-logsnr))
        spread = -jnp.abs(jnp.arange(64.0)[None] - cell)[:, None]
        return 1e4 * jnp.broadcast_to(spread, (*inputs.shape, 64))

    canvas = samplers.blank_canvas(20, 6, 64)
    _, (tokens, log_rate, _) = draw_with_trace(
        model, samplers.first_hitting(), None, canvas, 0, tuple, 64
    )
    changed = np.concatenate([canvas[None], tokens[:-1]]) != tokens
    assert (changed.sum(-1) == 1).all()  # one place per row and step
    named = tokens[changed].reshape(6, 20)
    level = 64 * np.exp(log_rate.astype(np.float64))
    assert ((named - 1e-3 < level) & (level < named + 1 + 1e-3)).all()


def test_first_hitting_clock_law():
    """Kolmogorov-Smirnov, 4000 rows: each reveal has the law (y/m)^n given the last."""
    canvas = jnp.tile(jnp.array([0, MASK, MASK, MASK], jnp.int32), (4000, 1))
    _, (tokens, log_rate, _) = draw_with_trace(
        toy_model, samplers.first_hitting(), None, canvas, 5, tuple
    )
    clock = np.concatenate([np.zeros((1, 4000)), log_rate.astype(np.float64)])
    for step, n in enumerate((3, 2, 1)):
        ratio = np.exp(clock[step + 1] - clock[step])
        assert stats.kstest(ratio**n, "uniform").pvalue > 1e-4
        assert abs(ratio.mean() - n / (n + 1)) < 5 * ratio.std() / 4000**0.5
    # Pooled over steps the three levels are those of independent uniforms.
    assert stats.kstest(np.exp(clock[1:4]).ravel()[::7], "uniform").pvalue > 1e-4
    # The first place is uniform among the masked, whatever the clock says.
    place = np.argmax(tokens[0] != np.asarray(canvas), axis=1)
    assert stats.chisquare(np.bincount(place, minlength=4)[1:]).pvalue > 1e-4
    late = np.exp(clock[1]) > np.median(np.exp(clock[1]))
    table = [np.bincount(place[half], minlength=4)[1:] for half in (late, ~late)]
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.slow
def test_named_grids_are_accepted():
    """The package's uniform-rate grid is the one these laws were computed on."""
    grid = np.asarray(grids.uniform_masking_rate(4))
    np.testing.assert_allclose(grid, uniform_grid(4), rtol=1e-6, atol=1e-6)
    canvas = samplers.blank_canvas(2, 4, MASK)
    tokens = draw(toy_model, samplers.ancestral(), grids.uniform_masking_rate(4), canvas, 0)
    assert (tokens != MASK).all()


def test_next_log_rate_formula():
    u = jnp.array([0.25, 0.25, 0.5])
    got = next_log_rate(u, jnp.log(jnp.array([1.0, 0.5, 0.8])), jnp.array([1, 2, 0]))
    np.testing.assert_allclose(np.exp(got), [0.25, 0.25, 0.4], rtol=1e-6)


# ---- what always holds ------------------------------------------------------------------------


def both():
    return [(samplers.ancestral(), uniform_grid(5)), (samplers.first_hitting(), None)]


@pytest.mark.slow  # test_samplers_zoo moves rows between batches of one size
@pytest.mark.parametrize("sampler, grid", both(), ids=lambda x: getattr(x, "name", ""))
def test_rows_are_independent(sampler, grid):
    """Row i of a batch of 8 is the batch of one with row_offset=i, bit for bit."""
    model = Transformer(TransformerConfig(vocab_size=6, width=16, depth=1, num_heads=2))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda p: p + 0.05 * rng.normal(size=p.shape).astype(np.float32), params)
    canvas = np.full((8, 8), 5, np.int32)
    canvas[2:, 0], canvas[5:, 3:6] = 1, 2
    documents = np.ones((8, 8), np.int32)
    documents[6, 6:], canvas[6, 6:] = 0, 0  # padding holds a token and is left alone
    generate = samplers.make_generator(model.apply, sampler, grid, mask_id=5)
    whole = np.asarray(generate(params, jax.random.key(1), canvas, documents))
    for i in range(8):
        row = slice(i, i + 1)
        alone = generate(params, jax.random.key(1), canvas[row], documents[row], row_offset=i)
        assert (np.asarray(alone)[0] == whole[i]).all()
    assert (whole[6, 6:] == 0).all()
    assert len({tuple(row) for row in whole[:2]}) == 2  # equal canvases, different numbers
    assert (np.asarray(generate(params, jax.random.key(2), canvas, documents)) != whole).any()
    assert (np.asarray(generate(params, jax.random.key(1), canvas, documents)) == whole).all()


@pytest.mark.slow
def test_finished_rows_are_left_alone():
    """A row that is full early keeps its clock while the others go on."""
    canvas = jnp.array([[0, 1, 2, MASK], [MASK] * 4], jnp.int32)
    _, (tokens, log_rate, _) = draw_with_trace(
        toy_model, samplers.first_hitting(), None, canvas, 0, tuple
    )
    assert (log_rate[:, 0] == log_rate[0, 0]).all()
    assert (np.diff(log_rate[:, 1]) < 0).all()
    assert (tokens[:, 0] == tokens[0, 0]).all()


def test_the_loop_guards_given_tokens_from_any_sampler():
    """A remasking sampler of one's own: scribbles everywhere, counts in memory, never finishes."""

    def step(context, denoise, state):
        best = jnp.argmax(denoise(state.tokens, context.logsnr), -1).astype(jnp.int32)
        last = context.index == context.num_steps - 1
        return samplers.SamplerState(jnp.where(last, best, context.mask_id), state.memory + 1)

    scribbler = samplers.Sampler(
        "scribbler",
        lambda keys, canvas, mask_id: samplers.SamplerState(canvas, jnp.zeros(len(canvas))),
        step,
        lambda state, mask_id: jnp.zeros(len(state.tokens), bool),
    )
    canvas = jnp.array([[0, MASK, 1, 0], [2, 1, 0, 2]], jnp.int32)
    tokens, (states, memory, _) = draw_with_trace(
        toy_model, scribbler, uniform_grid(3), canvas, 0, tuple
    )
    given = np.asarray(canvas) != MASK
    assert (states[:, given] == np.asarray(canvas)[given]).all()
    assert (states[:2, ~given] == MASK).all() and (tokens != MASK).all()
    assert (memory == [[1, 1], [2, 2], [3, 3]]).all()


def forward_counter(sampler, grid):
    """``count(canvas) -> (passes, tokens, states)``, compiled once per shape."""
    calls = []

    def model(inputs, logsnr, documents):
        jax.debug.callback(lambda: calls.append(1))
        return toy_model(inputs, logsnr, documents)

    run = jax.jit(
        lambda canvas: samplers.sample_with_trace(
            jax.random.key(0), model, sampler, grid, canvas, lambda s: s.tokens, mask_id=MASK
        )
    )

    def count(canvas):
        calls.clear()
        tokens, states = jax.tree.map(np.asarray, run(jnp.asarray(canvas, jnp.int32)))
        jax.effects_barrier()
        return len(calls), tokens, states

    return count


def test_no_forward_pass_is_wasted():
    blank = [[MASK] * 4]
    calls, tokens, trace = forward_counter(samplers.ancestral(), uniform_grid(64))(blank)
    states = np.concatenate([[blank], trace])
    changes = (states[1:] != states[:-1]).any((1, 2)).sum()
    assert calls == changes <= 4
    assert trace.shape == (64, 1, 4) and (trace[-1] == tokens).all()
    count = forward_counter(samplers.first_hitting(), None)
    assert count([[0, MASK, MASK, 1]])[0] == 2
    full = np.array([[0, 1, 2, 1]])
    calls, tokens, trace = count(full)
    assert calls == 0 and (tokens == full).all() and (trace == full[None]).all()


def test_compiles_once_per_shape():
    traces = []

    def apply_fn(params, inputs, logsnr, documents):
        traces.append(inputs.shape)
        return toy_model(inputs, logsnr, documents)

    generate = samplers.make_generator(
        apply_fn, samplers.ancestral(), uniform_grid(3), mask_id=MASK
    )
    canvas = np.full((2, 4), MASK)
    for seed in range(3):
        jax.eval_shape(generate, {}, jax.random.key(seed), canvas, row_offset=seed)
    assert traces == [(2, 4)]
    jax.eval_shape(generate, {}, jax.random.key(0), np.full((3, 4), MASK))
    assert traces == [(2, 4), (3, 4)]


def test_traced_grid_still_reveals_everything():
    """An unchecked grid that stops short of +inf leaves no mask behind."""
    run = jax.jit(
        lambda grid: samplers.sample(
            jax.random.key(0),
            toy_model,
            samplers.ancestral(),
            grid,
            samplers.blank_canvas(50, 4, MASK),
            mask_id=MASK,
        )
    )
    assert (np.asarray(run(jnp.array([-jnp.inf, -2.0, -1.0]))) != MASK).all()


@pytest.mark.parametrize(
    "sampler", [samplers.ancestral, pytest.param(samplers.first_hitting, marks=pytest.mark.slow)]
)
def test_temperature_zero_is_greedy(sampler):
    """From one masked place on, the argmax; ancestral in one step gives every place's argmax."""
    greedy = sampler(samplers.temperature(0.0))
    grid = None if greedy.num_steps else uniform_grid(1)
    canvas = np.array([[0, MASK, 1, 0]] * 50 + [[MASK] * 4] * 2, np.int32)
    tokens = draw(toy_model, greedy, grid, canvas, seed=0)
    state = int(canvas[0] @ [64, 16, 4, 1])
    assert (tokens[:50, 1] == token_probabilities()[state, 1].argmax()).all()
    if grid is not None:
        assert tokens[50:].tolist() == [[0, 2, 2, 1]] * 2


# ---- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"canvas": jnp.zeros((2, 3))}, "non-empty integer array"),
        ({"canvas": jnp.zeros((3,), jnp.int32)}, r"\[B, L\]"),
        ({"canvas": jnp.zeros((0, 3), jnp.int32)}, "non-empty"),
        ({"mask_id": -1}, "mask_id must be a token id, got -1"),
        ({"documents": jnp.ones((2, 5), jnp.int32)}, r"shape of the canvas \(2, 4\), got \(2, 5\)"),
        ({"grid": None}, "ancestral needs a grid"),
        ({"grid": [0.0]}, r"shape \(1,\)"),
        ({"grid": [[0.0, 1.0]]}, r"shape \(1, 2\)"),
        ({"grid": [-np.inf, 1.0, 0.5, np.inf]}, "increases strictly .* 1.0 and 0.5"),
        ({"grid": [-np.inf, 0.0, 0.0, np.inf]}, "increases strictly"),
        ({"grid": [-np.inf, np.nan, np.inf]}, "no NaN"),
        ({"grid": [-np.inf, 0.0, 9.0]}, r"end at logSNR \+inf .*got 9.0; see .*open_ends"),
        ({"sampler": samplers.first_hitting()}, "first_hitting sets its own noise levels"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "sampler": samplers.ancestral(),
        "grid": uniform_grid(2),
        "canvas": samplers.blank_canvas(2, 4, MASK),
        "mask_id": MASK,
    }
    with pytest.raises(ValueError, match=message):
        samplers.sample(jax.random.key(0), toy_model, **(arguments | change))
    with pytest.raises(ValueError, match="at least one row and position, got 0 x 4"):
        samplers.blank_canvas(0, 4, MASK)


def test_generator_checks_its_grid_when_built():
    with pytest.raises(ValueError, match="end at logSNR"):
        samplers.make_generator(toy_model, samplers.ancestral(), [0.0, 1.0], mask_id=MASK)
