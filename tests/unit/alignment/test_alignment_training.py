"""Pairs and rewarded answers in the training step; answers, steps and rewards they are made of."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import alignment, corruption, distributed, objectives, samplers, variance
from mdm_jax.alignment import rewards, rollout, training
from mdm_jax.data.tokenizers import CharTokenizer
from mdm_jax.draws import Draw
from mdm_jax.objectives.objective import accumulate_gradient, summed_loss
from mdm_jax.testing import toys
from mdm_jax.types import Batch
from mdm_jax.variance.transform import draw_batch

MODEL, PARAMS, ROWS = toys.Toy(), toys.toy_params(), toys.toy_batch()
OTHER = jax.tree.map(lambda a: a * 0.5, PARAMS)
OBJECTIVE = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID))
BETA = alignment.per_answer(0.7)


def with_reference(params, *inputs):
    return alignment.networks(MODEL.apply, params, OTHER)(*inputs)


def test_pairs_in_the_step_are_pairs_of_bounds():
    """Loss and gradient of rows of two answers, in two microbatches."""
    order = np.array([0, 2, 1, 0])
    chosen, rejected = ROWS.tokens[order], ROWS.tokens[order[::-1]]
    ones = np.ones((4, 8), bool)
    documents = np.broadcast_to([1] * 4 + [2] * 4, (4, 8))
    rows = Batch(np.concatenate([chosen, rejected], 1), ones, documents, np.full(4, 4))
    loss = training.pair_loss("dpo", BETA)
    objective = training.pair_objective(OBJECTIVE, loss, replicates=2)
    spec = objective.spec(4, 8)
    assert spec.num_levels == 2 and spec.event_shape == (8,)
    chain = alignment.replicated(variance.chain(variance.mirror()), 2)
    draw = jax.jit(lambda: draw_batch(jax.random.key(0), chain, chain.init(spec), spec))()

    def half(number):
        part = slice(4 * number, 4 * number + 4)
        own = Draw(
            draw.u[..., number, None], draw.log_weight[..., number, None], draw.noise[..., part]
        )
        ordinary = Batch(rows.tokens[:, part], ones[:, part], ones[:, part] * 1, np.full(4, 4))
        return own, ordinary

    def by_hand(params):
        bound = alignment.sequence_bound(OBJECTIVE, variance.chain(), replicates=2)
        pairs = [
            alignment.paired_elbo(bound, MODEL.apply, params, OTHER, batch, own)
            for own, batch in map(half, range(2))
        ]
        return jnp.sum(alignment.dpo(alignment.margins(*pairs, replicates=2), BETA))

    expected = jax.jit(jax.value_and_grad(by_hand))(PARAMS)
    total = summed_loss(with_reference, objective)
    gradient, sums, stats = jax.jit(lambda p: accumulate_gradient(total, p, rows, draw, 2))(PARAMS)
    chex.assert_trees_all_close((sums.loss, gradient), expected, rtol=2e-5, atol=1e-6)
    assert float(sums.eligible) == 4 and stats.raw.shape == draw.u.shape
    with pytest.raises(ValueError, match="two answers of one length, got 7"):
        objective.spec(4, 7)
    with pytest.raises(ValueError, match="noise for each token"):
        training.pair_objective(objectives.next_token(toys.MASK_ID), loss, 2)
    with pytest.raises(ValueError, match="beta of simpo is in nats_per_token"):
        training.pair_loss("simpo", BETA)


def answers(**changes):
    steps = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 0, 2]], np.int32)
    made = training.Answers(*ROWS[:4], np.array([1.0, -0.5, 0.0]), np.array([1.0, 1.0, 0.0]), steps)
    return made._replace(**changes)


def drawn(objective, views):
    """Independent draws of the objective's spec."""
    chain, spec = alignment.replicated(variance.chain(), views), objective.spec(3, 4)
    return jax.jit(lambda: draw_batch(jax.random.key(1), chain, {"identity": ()}, spec))()


def summed(method, batch, views=2, network=with_reference, **options):
    objective = training.policy_objective(OBJECTIVE, method, mask_id=toys.MASK_ID, **options)
    total, draw = summed_loss(network, objective), drawn(objective, views)
    gradient, sums, stats = jax.jit(lambda p: accumulate_gradient(total, p, batch, draw))(PARAMS)
    assert stats.raw.shape == draw.u.shape
    return gradient, sums


def test_a_sampled_trace_is_one_step_of_the_order():
    """By hand: of each row the step floor(4 u), times 4."""
    batch = answers()
    gradient, sums = summed("trace", batch, network=MODEL.apply)
    assert float(sums.eligible) == 2
    objective = training.policy_objective(OBJECTIVE, "trace", mask_id=toys.MASK_ID)
    u = drawn(objective, 2).u[:, :2, 0]
    step = np.floor(4 * u).astype(int)[..., None]  # [views, rows of weight 1, 1]
    hidden, scored = batch.steps[None, :2] >= step, batch.steps[None, :2] == step
    inputs = np.where(hidden, toys.MASK_ID, ROWS.tokens[None, :2]).reshape(4, 4)
    factor = 4 * batch.advantage[None, :2, None] * scored / 2

    @jax.jit
    @jax.grad
    def by_hand(params):
        scores = jax.nn.log_softmax(MODEL.apply(params, inputs)).reshape(2, 2, 4, 3)
        own = jnp.take_along_axis(
            scores, jnp.tile(ROWS.tokens[None, :2, :, None], (2, 1, 1, 1)), -1
        )
        return -jnp.sum(factor * own[..., 0])

    chex.assert_trees_all_close(gradient, by_hand(PARAMS), rtol=1e-5)


@pytest.mark.slow
def test_first_updates_and_later_ones_agree_at_the_old_policy():
    clip = (alignment.per_token(0.2), alignment.per_token(0.2))
    for method in ("espo", "d1"):
        objective = training.policy_objective(OBJECTIVE, method, clip=clip, mask_id=toys.MASK_ID)
        draw = drawn(objective, 2)
        model_fn = functools.partial(MODEL.apply, PARAMS)
        old = jax.jit(
            lambda: training.policy_values(method, model_fn, answers(), draw, toys.MASK_ID)  # noqa: B023
        )()
        first = summed(method, answers(), clip=clip, network=MODEL.apply)
        later = summed(method, answers(old=old), clip=clip, network=MODEL.apply)
        chex.assert_trees_all_equal(first, later)


def test_settings_of_a_method_are_those_that_it_reads():
    clip = (alignment.per_token(0.2), alignment.per_token(0.2))
    with pytest.raises(ValueError, match="needs clips"):
        training.policy_objective(OBJECTIVE, "espo", mask_id=toys.MASK_ID)
    with pytest.raises(ValueError, match="alignment.kl is of bounds"):
        kl = alignment.per_answer(0.1)
        training.policy_objective(OBJECTIVE, "d1", clip=clip, kl=kl, mask_id=toys.MASK_ID)


def test_tokens_after_the_end_change_nothing():
    eos = 2
    tokens = np.array([[0, eos, 1, 0], [0, 1, 0, 1], [eos, eos, 0, 1]])
    eligible = np.array([[True] * 4, [False, True, True, True], [True] * 4])
    hidden, scored = rollout.hide_tail(tokens, eligible, eos, toys.MASK_ID)
    np.testing.assert_array_equal(scored.sum(1), [2, 3, 1])
    np.testing.assert_array_equal(hidden[0], [0, eos, toys.MASK_ID, toys.MASK_ID])
    other, same = rollout.hide_tail(
        np.where(scored, tokens, 1 - tokens % 2), eligible, eos, toys.MASK_ID
    )
    np.testing.assert_array_equal(np.where(same, other, 3), np.where(scored, hidden, 3))
    kl = alignment.per_answer(0.3)
    found = summed("elbo", answers(tokens=hidden, eligible=scored), kl=kl)
    assert np.isfinite(found[1].loss) and float(found[1].eligible) == 2


def test_rollouts_write_as_the_sampler_does_and_record_the_step():
    sampler = samplers.first_hitting()
    canvas = np.array([[3, 3, 3, 3], [0, 3, 3, 3], [3, 1, 1, 3]], np.int32)
    make = functools.partial(alignment.make_rollout, MODEL.apply, sampler, None)
    written = make(mask_id=3)(PARAMS, jax.random.key(0), canvas)
    assert not np.any(written.tokens == 3)
    np.testing.assert_array_equal(np.where(canvas == 3, 3, written.tokens), canvas)
    steps = np.asarray(written.steps)
    np.testing.assert_array_equal(steps == -1, canvas != 3)
    np.testing.assert_array_equal(np.sort(steps), [[0, 1, 2, 3], [-1, 0, 1, 2], [-1, -1, 0, 1]])
    np.testing.assert_array_equal(written.passes, [4, 3, 2])
    several = np.array([[5, 2, -1, 2], [0, 7, 7, 9]])
    np.testing.assert_array_equal(rollout.number_steps(several), [[1, 0, -1, 0], [0, 1, 1, 2]])


def test_random_remasking_of_blocks_of_a_token_writes_from_left_to_right():
    canvas = np.array([[3, 3, 3, 3], [0, 3, 3, 3], [3, 1, 1, 3]], np.int32)
    sampler = samplers.random_remasking(1, 1)
    make = functools.partial(alignment.make_rollout, MODEL.apply, sampler, None)
    written = make(mask_id=3)(PARAMS, jax.random.key(0), canvas)
    rows = Batch(canvas, canvas == 3, np.ones_like(canvas), np.full(3, 4))
    np.testing.assert_array_equal(written.steps, alignment.left_to_right(rows))
    assert "random_remasking" in alignment.FREE_ORDERS


def test_texts_are_those_that_rewards_read():
    codec = CharTokenizer("+0123456789=")
    prompt, answer = codec.encode("1+1="), [*codec.encode("2"), codec.eos_id, *codec.encode("7")]
    rows = Batch(
        np.array([[codec.pad_id, *prompt, *answer]]),
        np.array([[False] * 5 + [True] * 3]),
        np.array([[0] + [1] * 7]),
        np.array([3]),
    )
    canvas = rollout.prompts_to_answer(rows, 2, codec.mask_id)
    assert canvas.tokens.shape == (2, 8) and np.all(canvas.tokens[:, 5:] == codec.mask_id)
    assert rollout.texts(canvas, np.repeat(rows.tokens, 2, 0), codec) == [("1+1=", "2")] * 2


def test_a_failed_reward_is_raised_in_every_process(monkeypatch):
    """Process 0 sends its failure before it raises; others raise what they got."""
    texts, sent = [("p", "x"), ("p", "1")], []
    monkeypatch.setattr(distributed, "from_first", lambda value: sent.append(value) or value)
    with pytest.raises(rewards.RewardError, match="'x' to the prompt 'p'") as raised:
        rewards.score_together(lambda _, answer: float(answer), texts, 2)
    assert isinstance(raised.value.__cause__, ValueError) and sent[0][0] is None
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    monkeypatch.setattr(distributed, "from_first", lambda _: [None, sent[0][1]])
    with pytest.raises(rewards.RewardError, match="'x' to the prompt 'p'"):
        rewards.score_together(None, texts, 2)
    monkeypatch.setattr(distributed, "from_first", lambda _: [[[[1.0, 0.0]], [[1.0, 1.0]]], None])
    found = rewards.score_together(None, texts, 2)
    np.testing.assert_array_equal(found.values, [[1, 0]])


def test_rewards_that_fail_are_named_or_counted():
    texts = [("p", "1"), ("p", "x"), ("p", "nan"), ("p", "0")]
    with pytest.raises(rewards.RewardError, match="'x' to the prompt 'p' failed: ValueError.*skip"):
        rewards.score(lambda _, answer: float(answer), texts, 2)
    with pytest.raises(rewards.RewardError, match="the reward is nan"):
        rewards.score(lambda _, answer: float(answer), texts[2:], 2)
    found = rewards.score(lambda _, answer: float(answer), texts, 4, skip=True)
    np.testing.assert_array_equal(found.values, [[1, 0, 0, 0]])
    np.testing.assert_array_equal(found.weight, [[1, 0, 0, 1]])
    factors = rewards.coefficients("trace", "leave_one_out", found)
    np.testing.assert_array_equal(factors.values, [[1, 0, 0, -1]])
    kept = rewards.coefficients("rejection", "centred", found)
    np.testing.assert_array_equal(kept.weight, [[1, 0, 0, 0]])
    weights = rewards.coefficients("wd1", "centred", found).values[0]
    half = np.tanh(0.5)
    np.testing.assert_allclose(weights, [half, 0, 0, -half], rtol=1e-6)
    dead = rewards.Rewards(np.ones((1, 3)), np.ones((1, 3)))
    for method in ("trace", "wd1", "rejection"):
        assert not rewards.coefficients(method, "centred", dead).values.any()
