"""Self-conditioning: a fair coin, no gradient through the estimate, a sampler that remembers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import zoo
from scipy import stats
from variants import slow_except

from mdm_jax import corruption, objectives, samplers, variance
from mdm_jax.corruption.uniform import token_estimate
from mdm_jax.draws import Draw, DrawSpec, open_uniform
from mdm_jax.objectives.losses import uniform_nelbo
from mdm_jax.objectives.objective import sum_losses
from mdm_jax.objectives.wrappers import estimate_coin, self_conditioned, two_pass
from mdm_jax.samplers.ancestral import cached_ancestral
from mdm_jax.samplers.by_score import by_score
from mdm_jax.samplers.uniform import uniform_ancestral
from mdm_jax.samplers.wrappers import self_conditioned as remember

OBJECTIVES = {
    "masked": objectives.masked_nelbo(corruption.fixed_count(tiny.MASK_ID)),
    "uniform": uniform_nelbo(tiny.MASK_ID),
}
BATCH = jax.tree.map(jnp.asarray, tiny.batch(8))


@functools.cache
def network():
    """A small transformer that takes an estimate, and parameters in which nothing is zero."""
    model = tiny.transformer(self_conditioning=True)
    return model.apply, tiny.parameters(model, tiny.LENGTH)


def some_draw(objective, views=3, seed=0):
    spec = objective.spec(8, tiny.LENGTH)
    levels, key = (views, 8, 1), jax.random.key(seed)
    noise = open_uniform(key, (views, 8, *spec.event_shape))
    return Draw(open_uniform(jax.random.key(seed + 1), levels), jnp.zeros(levels), noise)


# ---- the coin ------------------------------------------------------------------------------------


CHAINS = ("identity", "stratified_mirror", "rotate", "rotate_ranks", "complement")


@pytest.mark.parametrize("name", CHAINS)
def test_coin_is_fair_and_rows_are_independent(name):
    """4000 draws of 7 rows: each (view, row) within 5 standard errors, rows uncorrelated."""
    coins, views = all_coins()[name], zoo.ALL[name]().views
    assert coins.shape == (4000, views, 7)
    assert np.all(np.abs(coins.mean(0) - 0.5) < 5 * 0.5 / 4000**0.5)
    for view in range(views):
        correlation = np.corrcoef(coins[:, view].T) - np.eye(7)
        assert np.abs(correlation).max() < 5 / 4000**0.5
    # The views of a row take turns.
    assert (coins[:, 1:] != coins[:, :-1]).all()


@functools.cache
def all_coins():
    spec = DrawSpec(7, 1, (4,))

    def coins(key):
        made = ((name, zoo.ALL[name]()) for name in CHAINS)
        drawn = {n: variance.draw_batch(key, t, t.init(spec), spec) for n, t in made}
        return {name: estimate_coin(draw.noise) for name, draw in drawn.items()}

    keys = jax.random.split(jax.random.key(0), 4000)
    return jax.tree.map(np.asarray, zoo.quick(jax.vmap(coins))(keys))


def test_coin_says_nothing_about_level_mask_or_token():
    """Chi-square (1e-4) of the coin against what a process makes of the noise, at any level."""
    noise = open_uniform(jax.random.key(5), (1, 20_000, 3, 2))
    coin = np.asarray(estimate_coin(noise))[0]
    first, second = np.asarray(noise[0, :, 0]).T
    order = (np.argsort(np.asarray(noise[0, :, :, 0]), axis=1) * [1, 4, 16]).sum(1)
    for seen in (first < 0.5, first < 2e-3, np.floor(5 * second), order):
        table = [np.unique(seen[coin == side], return_counts=True)[1] for side in (False, True)]
        assert stats.chi2_contingency(table).pvalue > 1e-4


def test_coin_is_the_parity_of_the_grid():
    noise = np.array([[[1, 3, 5], [1, 1, 3], [1, 1, 1]]], np.float32) / 2**24  # indices 0, 1, 2
    assert np.asarray(estimate_coin(jnp.asarray(noise))).tolist() == [[True, True, False]]
    two = jnp.concatenate([jnp.asarray(noise)] * 2)
    assert np.asarray(estimate_coin(two)).tolist() == [[True, True, False], [False, False, True]]


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_except({"masked"}, OBJECTIVES))
def test_loss_is_plain_or_two_pass_by_the_coin(name):
    """Each (view, row) by hand: plain where the coin says no, the second pass where it says yes."""
    plain, (apply_fn, params) = OBJECTIVES[name], network()
    objective = self_conditioned(plain, tiny.MASK_ID)
    assert objective.name == f"{plain.name}, self-conditioned" and objective.bias == plain.bias
    draw = some_draw(plain)

    def model_fn(inputs, logsnr, documents, estimate=None):
        return apply_fn(params, inputs, logsnr, documents, estimate)

    def seeing(inputs, logsnr, documents):
        logits = model_fn(inputs, logsnr, documents)[..., : tiny.MASK_ID]
        shown = jnp.pad(jax.nn.softmax(logits), [(0, 0), (0, 0), (0, 1)])
        return model_fn(inputs, logsnr, documents, shown)

    @tiny.jit
    def run():
        return [
            objective.loss(model_fn, BATCH, draw),
            plain.loss(model_fn, BATCH, draw),
            plain.loss(seeing, BATCH, draw),
            plain.loss(two_pass(model_fn, tiny.MASK_ID), BATCH, draw),
        ]

    found, alone, second, again = run()
    coin = np.asarray(estimate_coin(draw.noise))[..., None]
    np.testing.assert_allclose(found.raw, np.where(coin, second.raw, alone.raw), rtol=1e-5)
    np.testing.assert_allclose(again.raw, second.raw, rtol=1e-5)
    assert np.abs(second.raw - alone.raw).max() > 1e-2
    assert coin[:2].sum() == 8  # two views, half and half
    for field in ("weight", "eligible", "targets"):
        np.testing.assert_array_equal(getattr(found, field), getattr(alone, field))


@pytest.mark.parametrize("name", slow_except({"masked"}, OBJECTIVES))
def test_network_that_ignores_the_estimate_trains_as_before(name):
    plain = OBJECTIVES[name]
    draw = some_draw(plain)

    def loss(objective, params):
        model_fn = lambda *a, estimate=None: tiny.apply_fn(params, *a)  # noqa: E731
        return sum_losses(draw, objective.loss(model_fn, BATCH, draw)).loss

    both = (plain, self_conditioned(plain, tiny.MASK_ID))
    run = tiny.jit(lambda p: [jax.value_and_grad(loss, 1)(o, p) for o in both])
    (value, gradient), (other, other_gradient) = run(tiny.params())
    assert value == other
    jax.tree.map(np.testing.assert_array_equal, gradient, other_gradient)


def test_no_gradient_flows_through_the_estimate():
    """A network whose loss depends on its parameter only through the first pass has none."""
    plain = OBJECTIVES["uniform"]
    objective, draw = self_conditioned(plain, tiny.MASK_ID), some_draw(plain, views=2)

    def loss(weight):
        def model_fn(inputs, logsnr, documents, estimate=None):
            first = weight * jnp.cos(jnp.arange(float(tiny.VOCAB)))[None, None]
            first = jnp.broadcast_to(first, (*inputs.shape, tiny.VOCAB))
            return first if estimate is None else 3.0 * estimate

        return sum_losses(draw, objective.loss(model_fn, BATCH, draw)).loss

    run = tiny.jit(jax.value_and_grad(loss))
    (low, slope), (high, _) = run(1.0), run(2.0)
    assert slope == 0 and abs(low - high) > 1e-3


# ---- sampling ------------------------------------------------------------------------------------

GRID = np.array([-np.inf, -1.0, 0.5, np.inf], np.float32)
CANVAS = jnp.asarray(np.where(np.arange(6)[None] == 1, 2, tiny.MASK_ID).repeat(5, 0), jnp.int32)


def recording(calls):
    """The small network, remembering what it was shown."""
    apply_fn, params = network()

    def model_fn(inputs, logsnr, documents, estimate=None):
        shown = jnp.zeros(()) if estimate is None else estimate
        jax.debug.callback(lambda *a: calls.append(jax.tree.map(np.asarray, a)), inputs, shown)
        return apply_fn(params, inputs, logsnr, documents, estimate)

    return model_fn


SAMPLERS = {
    "uniform": (uniform_ancestral(tiny.MASK_ID), GRID),
    "by_score": (by_score(tokens_per_step=2), None),
    "ancestral": (samplers.ancestral(), GRID),
    "cached_ancestral": (cached_ancestral(2), GRID),
}


@functools.cache
def remembered(name):
    """What a self-conditioned sampler returns, its states, and what the network was shown."""
    sampler, grid = SAMPLERS[name]
    wrapped, calls = remember(sampler, tiny.MASK_ID, tiny.VOCAB), []
    assert wrapped.bias == "biased" and wrapped.name == f"self-conditioned {sampler.name}"

    def run(key):
        return samplers.sample_with_trace(
            *(key, recording(calls), wrapped, grid, CANVAS),
            lambda state: (state.tokens, state.memory[1]),
            mask_id=tiny.MASK_ID,
        )

    found = jax.tree.map(np.asarray, tiny.jit(run)(jax.random.key(0)))
    jax.effects_barrier()
    return *found, calls


@pytest.mark.parametrize("name", slow_except({"ancestral"}, ["uniform", "by_score", "ancestral"]))
def test_each_step_sees_the_estimate_of_the_last(name):
    """By hand: the estimate of a call is what the network said of the state one step before."""
    tokens, (states, estimates), calls = remembered(name)
    assert len(calls) == 3  # one pass per step, also where the sampler asks inside a condition
    assert (tokens[:, 1] == 2).all() and (tokens < tiny.MASK_ID).all()
    (apply_fn, params), expected = network(), np.zeros((5, 6, tiny.VOCAB))
    apply_fn = tiny.jit(apply_fn)
    for step, (inputs, shown) in enumerate(calls):
        np.testing.assert_allclose(shown, expected, atol=1e-6)
        if step:
            np.testing.assert_array_equal(inputs, states[step - 1])
        logits = apply_fn(params, inputs, None, None, shown)
        expected = np.asarray(token_estimate(logits, tiny.MASK_ID))
        np.testing.assert_allclose(estimates[step], expected, atol=1e-5)


@pytest.mark.slow
def test_the_sampler_hears_the_network_that_sees_the_estimate():
    """With greedy tokens the last step is the argmax of the last call, by hand."""
    sampler = remember(uniform_ancestral(tiny.MASK_ID, samplers.temperature(0.0)), 6, tiny.VOCAB)
    calls = []
    run = tiny.jit(
        lambda key: samplers.sample(
            key, recording(calls), sampler, GRID, CANVAS, mask_id=tiny.MASK_ID
        )
    )
    tokens = np.asarray(run(jax.random.key(1)))
    jax.effects_barrier()
    apply_fn, params = network()
    inputs, shown = calls[-1]
    best = np.argmax(tiny.jit(apply_fn)(params, inputs, None, None, shown)[..., :6], -1)
    free = np.asarray(CANVAS) == tiny.MASK_ID
    np.testing.assert_array_equal(tokens[free], best[free])


def test_samplers_that_ask_for_some_rows_get_their_estimates():
    """``cached_ancestral`` packs rows into passes of two and returns what ``ancestral`` does."""
    tokens, (states, _), calls = remembered("cached_ancestral")
    plain, (plain_states, _), _ = remembered("ancestral")
    np.testing.assert_array_equal(states, plain_states)
    np.testing.assert_array_equal(tokens, plain)
    assert {inputs.shape for inputs, _ in calls} == {(5, 6), (2, 6)}
