"""The autoregressive loss and likelihood: blocks of one token with every token masked."""

import functools
import json

import block_toy
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from block_toy import BLOCK_MEAN, BLOCK_NELBO, PROBABILITIES
from variants import slow_except
from zoo import quick

from mdm_jax import corruption, likelihood, objectives, training, variance
from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.likelihood.bounds import make_block_likelihood, make_next_token_likelihood
from mdm_jax.models.decoders import causal_apply
from mdm_jax.objectives.losses import block_nelbo, next_token
from mdm_jax.testing import toys

OBJECTIVE = next_token(toys.MASK_ID)


def toy_causal(*inputs):
    return block_toy.causal_apply(toys.toy_params(), *inputs)


def numbers(spec, seed=0, views=1):
    """A draw of independent uniforms."""
    rng = np.random.default_rng(seed)
    u = rng.random((views, spec.batch_size, spec.num_levels))
    noise = rng.random((views, spec.batch_size, *spec.event_shape))
    return Draw(*(jnp.asarray(a, jnp.float32) for a in (u, np.zeros_like(u), noise)))


@functools.cache
def loss():
    return quick(functools.partial(OBJECTIVE.loss, toy_causal))


def test_the_likelihood_of_the_toy():
    spec = OBJECTIVE.spec(3, toys.LENGTH)
    assert spec == DrawSpec(3, 1, (1,)) and OBJECTIVE.bias == "exact"
    stats = loss()(toys.toy_batch(), numbers(spec))
    np.testing.assert_allclose(stats.raw[0, :, 0], BLOCK_NELBO[1], rtol=1e-6)
    np.testing.assert_allclose(PROBABILITIES @ stats.raw[0, :, 0], BLOCK_MEAN[1], rtol=1e-6)
    np.testing.assert_array_equal(stats.weight, 1.0)
    np.testing.assert_array_equal(stats.targets, 4)
    # Nothing is random about it.
    again = loss()(toys.toy_batch(), numbers(spec, seed=1))
    jax.tree.map(np.testing.assert_array_equal, stats, again)


@pytest.mark.parametrize(
    "process", slow_except({"fixed_count"}, ["fixed_count", "rao_blackwell", "bernoulli"])
)
def test_it_is_block_size_one_with_everything_masked(process):
    """Fixed counts mask single-token blocks always; the others do at rate 1."""
    objective = block_nelbo(getattr(corruption, process)(toys.MASK_ID), 1)
    draw = numbers(objective.spec(3, toys.LENGTH))
    if process != "fixed_count":
        draw = draw._replace(u=jnp.full_like(draw.u, 2.0**-24))
    model_fn = functools.partial(block_toy.block_apply(1), toys.toy_params())
    stats = quick(functools.partial(objective.loss, model_fn))(toys.toy_batch(), draw)
    expected = loss()(toys.toy_batch(), numbers(OBJECTIVE.spec(3, toys.LENGTH)))
    factor = 2.0 if process == "rao_blackwell" else 1.0  # (n + 1) / k, as half its draws mask none
    np.testing.assert_allclose(stats.weight, factor, rtol=1e-6)
    np.testing.assert_allclose(stats.raw.sum(-1), expected.raw[..., 0], rtol=1e-6)
    np.testing.assert_array_equal(stats.targets.sum(-1), expected.targets[..., 0])


def test_prompt_and_padding_carry_no_loss():
    eligible = jnp.array([[0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1]], bool)
    batch = toys.toy_batch()._replace(eligible=eligible)
    spec = OBJECTIVE.spec(3, toys.LENGTH)
    stats = loss()(batch, numbers(spec, views=2))
    losses = block_toy.block_losses(1)[..., 1]
    expected = np.where(np.asarray(eligible), losses, 0).sum(1)
    np.testing.assert_allclose(stats.raw[..., 0], np.tile(expected, (2, 1)), rtol=1e-6)
    np.testing.assert_array_equal(stats.eligible[1, :, 0], [2, 0, 2])
    sums = objectives.sum_losses(numbers(spec, views=2), stats)
    np.testing.assert_allclose(sums.loss, expected.sum(), rtol=1e-6)  # a mean over views
    assert sums.eligible == 4

    def total(logits):
        return jnp.sum(OBJECTIVE.loss(lambda *_: logits, batch, numbers(spec)).raw)

    gradient = np.asarray(quick(jax.grad(total))(jnp.zeros((3, 4, 3))))
    np.testing.assert_array_equal(np.abs(gradient).sum(-1) > 0, eligible)


def test_the_mask_token_is_not_predicted():
    """A logit for the mask token, however large, is not in the softmax."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4)), jnp.float32)
    draw = numbers(OBJECTIVE.spec(3, toys.LENGTH))
    variants = logits.at[..., 3].set(50.0), logits[..., :3]
    run = quick(
        lambda: [OBJECTIVE.loss(lambda *_, v=v: v, toys.toy_batch(), draw).raw for v in variants]
    )
    with_mask, without = run()
    np.testing.assert_allclose(with_mask, without, rtol=1e-6)


def test_a_negative_mask_id_is_refused():
    with pytest.raises(ValueError, match="mask_id must be a token id, got -1"):
        next_token(-1)


# --- training -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_train_step_runs_as_it_does_elsewhere():
    """With a chain of two views and all monitors; the loss is that of the network before the step,
    whatever the chain drew."""
    model = tiny.transformer()
    params = nn.meta.unbox(tiny.jit(training.linen_init(model, tiny.LENGTH))(jax.random.key(0)))
    params, apply_fn = tiny.perturbed(params), causal_apply(model, tiny.MASK_ID)
    objective = next_token(tiny.MASK_ID)
    spec, chain = objective.spec(8, tiny.LENGTH), tiny.transform()
    monitors = (
        training.level_monitor(objective, bins=2),
        training.baseline_monitor(),
        training.gradient_noise_monitor(),
    )
    optimizer = optax.adam(3e-2)
    step = tiny.jit(
        training.make_train_step(
            apply_fn, objective, chain, optimizer, spec, seed=0, monitors=monitors
        )
    )
    batch = tiny.batch(8)
    evaluate = make_next_token_likelihood(apply_fn, tiny.MASK_ID)
    state = training.new_state(params, optimizer, chain, spec, monitors)
    before = evaluate(params, None, [batch])
    for number in range(10):
        state, metrics = step(state, batch)
        if number == 0:
            np.testing.assert_allclose(metrics.loss, before.nats_per_token, rtol=1e-5)
            np.testing.assert_allclose(metrics.cross_entropy, metrics.loss, rtol=1e-5)
    after = evaluate(state.params, None, [batch])
    assert after.nats_per_token < before.nats_per_token - 0.3
    readings = training.read_monitors(monitors, state.monitors)
    assert np.isfinite(readings["controlled_loss"]) and readings["gradient_rejected"] == 0


@pytest.mark.parametrize(
    "name",
    slow_except({"clipped_mixture"}, ["rotate_ranks", "stratified_levels", "clipped_mixture"]),
)
def test_chains_leave_the_loss_as_it_is(name):
    """Couplings and views change nothing; an exact warp keeps the mean over its weights."""
    settings = {"clipped_mixture": (0.3, 0.8, 0.3)}.get(name, ())
    chain = variance.chain(getattr(variance, name)(*settings))
    spec = OBJECTIVE.spec(300, toys.LENGTH)
    run = tiny.jit(lambda key: variance.draw_batch(key, chain, chain.init(spec), spec))
    draw = run(jax.random.key(0))
    batch = jax.tree.map(lambda a: jnp.repeat(a, 100, axis=0), toys.toy_batch())
    stats = loss()(batch, draw)
    expected = np.repeat(BLOCK_NELBO[1], 100)
    np.testing.assert_allclose(stats.raw[..., 0], np.tile(expected, (chain.views, 1)), rtol=1e-6)
    weight = np.exp(np.asarray(draw.log_weight))
    if name == "clipped_mixture":
        assert abs(weight.mean() - 1) < 5 * weight.std() / weight.size**0.5 and weight.std() > 0.1
    else:
        np.testing.assert_array_equal(weight, 1.0)


# --- likelihood ---------------------------------------------------------------------------------


def test_likelihood_is_exact_and_has_the_fields_of_a_bound():
    evaluate = make_next_token_likelihood(block_toy.causal_apply, toys.MASK_ID)
    eligible = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], bool)
    batch = jax.tree.map(np.asarray, toys.toy_batch())._replace(eligible=eligible)
    batch = batch._replace(units=np.array([8, 5, 6]))
    result = evaluate(toys.toy_params(), None, [toys.toy_batch(), batch])
    losses = block_toy.block_losses(1)[..., 1]
    expected = [*BLOCK_NELBO[1], losses[0].sum(), losses[2, [1, 3]].sum()]
    np.testing.assert_allclose(result.per_row_nats, expected, rtol=1e-6)
    assert result.row_index.tolist() == [0, 1, 2, 3, 5] and result.rows_seen == 6
    assert result.row_tokens.tolist() == [4, 4, 4, 4, 2]
    assert result.units == 12 + 8 + 6
    assert result.standard_error_nats == 0.0 and result.replicates == 2 and result.passes == 1
    np.testing.assert_allclose(result.levels.nats, result.nats_per_token, rtol=1e-6)
    assert result.levels.targets.tolist() == [18]
    bound = likelihood.make_likelihood(
        lambda p, *a: toys.Toy().apply(p, *a), toys.MASK_ID, passes=1, replicates=2
    )(toys.toy_params(), jax.random.key(0), [toys.toy_batch()])
    assert result.to_dict().keys() == bound.to_dict().keys()
    assert json.loads(json.dumps(result.to_dict()))["standard_error_bits_per_unit"] == 0.0
    assert "2 replicates of 1 passes" in result.summary()
    many = make_next_token_likelihood(block_toy.causal_apply, toys.MASK_ID, replicates=5)
    assert many(toys.toy_params(), None, [batch]).replicate_row_nats.shape == (5, 2)


def test_blocks_of_one_token_have_the_same_likelihood():
    """And it costs one pass, whatever was asked for."""
    traces, calls = [], []

    def apply_fn(params, inputs, logsnr, documents):
        traces.append(inputs.shape)
        jax.debug.callback(lambda: calls.append(1))
        return block_toy.block_apply(1)(params, inputs)

    evaluate = make_block_likelihood(apply_fn, toys.MASK_ID, 1, passes=7, replicates=3)
    eligible = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]], bool)
    batch = jax.tree.map(np.asarray, toys.toy_batch())._replace(eligible=eligible)
    result = evaluate(toys.toy_params(), jax.random.key(0), [batch])
    jax.effects_barrier()
    assert len(traces) == len(calls) == 1 and result.passes == 1 and result.replicates == 3
    exact = make_next_token_likelihood(block_toy.causal_apply, toys.MASK_ID)
    expected = exact(toys.toy_params(), None, [batch])
    np.testing.assert_allclose(result.per_row_nats, expected.per_row_nats, rtol=1e-6)
    assert result.standard_error_nats == 0.0


def test_an_evaluation_without_tokens_is_refused():
    evaluate = make_next_token_likelihood(block_toy.causal_apply, toys.MASK_ID)
    empty = toys.toy_batch()._replace(eligible=np.zeros((3, 4), bool))
    with pytest.raises(ValueError, match="none of 3 rows has an eligible token"):
        evaluate(toys.toy_params(), None, [empty])
    with pytest.raises(ValueError, match="replicates must be at least 1, got 0"):
        make_next_token_likelihood(block_toy.causal_apply, toys.MASK_ID, replicates=0)
