"""The meter on scores and gradients of answers and pairs, against the published digits of the toy.

Monte Carlo of fixed seeds; the parts must lie within five of their own standard errors, and these
must be small.
"""

import functools

import alignment_toy as toy
import jax
import numpy as np
import pytest

from mdm_jax import alignment, corruption, draws, meter, objectives, variance
from mdm_jax.alignment import training
from mdm_jax.meter import nested
from mdm_jax.meter.decompose import _of_values
from mdm_jax.types import Batch

DIGITS = toy.DIGITS
BOUND = objectives.masked_nelbo(corruption.fixed_count(toy.MASK))
THETA = toy.THETA.astype(np.float32)


def subject(objective, length, params=THETA, network=toy.network, views=1):
    estimator = meter.make_estimator(network, objective)
    chain, spec = alignment.replicated(variance.chain(), views), objective.spec(4, length)
    return meter.Subject(estimator, params, chain, chain.init(spec), spec)


def with_reference(theta, *inputs):
    reference = toy.REFERENCE.astype(np.float32)
    return alignment.networks(toy.network, theta, reference)(*inputs)


def assert_part(found, wanted, share):
    """``found`` of five standard errors or less, each below ``share`` of what is wanted."""
    assert found.standard_error < share * wanted, found
    assert abs(found.value - wanted) < 5 * found.standard_error, (found, wanted)


def answers(count):
    """Answers and orders as the policy writes them, with the population's advantage."""
    joint = (np.exp(toy.log_orders(toy.tables().theta)) / 6).ravel()
    rows, steps = toy.order_steps()
    index = np.random.default_rng(0).choice(len(joint), count, p=joint / joint.sum())
    batch, advantage = toy.batch(rows[index]), np.tile(toy.REWARDS, 6)[index] - DIGITS["J"]
    ones = np.ones(count, np.float32)
    return training.Answers(*batch, advantage.astype(np.float32), ones, steps[index])


@pytest.mark.slow
@pytest.mark.parametrize("method, digits", [("elbo", "fixed"), ("trace", "trace_one_step")])
def test_noise_of_policy_gradients(method, digits):
    """Masks and levels, and what is left: the answers, for traces with their orders."""
    objective = training.policy_objective(BOUND, method, mask_id=toy.MASK)
    _, gradient = meter.decompose_by_probes(
        subject(objective, 3),
        answers(1500),
        jax.random.key(0),
        probes=128,
        levels_per_row=2,
        masks_per_level=2,
        chunk=1500,
    )
    wanted = DIGITS["pg"]["variance"][digits]
    whole, of_masks = wanted["total"], wanted["mask_part"]
    if method == "trace":
        of_masks = whole - DIGITS["pg"]["variance"]["trace"]["total"]
    assert_part(gradient.total, whole, 0.12)
    assert_part(gradient.noise, of_masks, 0.15)
    assert abs(gradient.data.value - (whole - of_masks)) < 5 * gradient.data.standard_error


@pytest.mark.slow
def test_shared_masks_divide_the_variance_of_the_margin():
    """By the published factor, from the margin itself and from the bounds of both networks."""
    rows = [toy.ANSWERS[y] for y in (toy.CHOSEN, toy.REJECTED)]
    ones = np.ones((64, 6), bool)
    documents = np.broadcast_to([1] * 3 + [2] * 3, (64, 6))
    pairs = Batch(np.tile(np.concatenate(rows), (64, 1)), ones, documents, np.full(64, 3))
    found = []
    for loss in (training.margin_of("dpo"), *map(training.bound_margin_of, range(2))):
        objective = training.pair_objective(BOUND, loss, 1)
        made = meter.decompose(
            subject(objective, 6, network=with_reference),
            pairs,
            jax.random.key(1),
            levels_per_row=24,
            masks_per_level=3,
            chunk=4608,
        )
        assert abs(made.data.value) < 5 * made.data.standard_error  # one pair
        found.append(made.noise)
    digits = DIGITS["dpo"]["score_var_K1"]
    assert_part(found[0], digits["policy_ref"], 0.1)
    apart = type(found[0])(*(first + second for first, second in zip(*found[1:])))
    assert_part(apart, digits["independent"], 0.1)


def test_scores_are_those_that_losses_are_made_of():
    """The policy gradient's loss is minus advantage times score, answer by answer."""
    rows = answers(16)
    options = functools.partial(training.policy_objective, BOUND, mask_id=toy.MASK)
    for method in ("elbo", "trace"):
        loss, score = (
            subject(made, 3, views=2)
            for made in (options(method), training.answer_scores(BOUND, method, mask_id=toy.MASK))
        )
        spec = loss.estimator.objective.spec(16, 3)
        draw = loss.transform.draw(
            jax.random.key(2), loss.state, draws.iid(jax.random.key(3), spec), spec
        )
        values = [s.estimator.losses(THETA, rows, draw) for s in (loss, score)]
        np.testing.assert_allclose(values[0], -rows.advantage * values[1], rtol=1e-5)
        unkept = rows._replace(weight=np.zeros_like(rows.weight))  # as of "rejection"
        own = score.estimator.losses(THETA, unkept, draw)
        np.testing.assert_array_equal(own, values[1])


def test_the_error_of_masks_and_levels_together():
    """Over 300 designs; independent errors of both parts would add up to another one."""
    random = np.random.default_rng(0)
    levels, masks = random.normal(size=(300, 30, 3, 1)), random.normal(size=(300, 30, 3, 2))
    bench = subject(training.policy_objective(BOUND, "elbo", mask_id=toy.MASK), 3)
    found = [_of_values(v, bench, 0, 1) for v in 0.4 * levels + masks]
    values = np.array([f.noise.value for f in found])
    assert abs(values.mean() - 1.16) < 4 * values.std() / np.sqrt(300)
    errors = np.array([[f.noise.standard_error, f.pattern.standard_error, f.rate.standard_error]
                       for f in found]).mean(0)  # fmt: skip
    assert abs(errors[0] / values.std() - 1) < 0.17  # four errors of a standard deviation of 300
    assert np.hypot(*errors[1:]) > 1.25 * errors[0]


def test_parts_between_and_within_groups():
    """Known variances of prompts, answers, levels and masks, over 400 designs of normal numbers."""
    random, spreads = np.random.default_rng(0), (1.0, 0.7, 0.5, 0.3)
    shapes = ((1, 1, 1), (5, 1, 1), (5, 3, 1), (5, 3, 2))
    values = sum(
        s * random.normal(size=(400, 6, *shape)) for s, shape in zip(spreads, shapes)
    ).reshape(400, 30, 3, 2)
    found, within = nested.group_terms(values, 5)
    prompts, of_answers, levels, masks = np.square(spreads)
    wanted = (masks, levels, prompts + of_answers, sum(np.square(spreads)))
    for part, expected in zip((*found, within), (*wanted, of_answers)):
        each = part.mean(-1)
        assert abs(each.mean() - expected) < 4 * each.std() / 20, (each.mean(), expected)
    with pytest.raises(ValueError, match="30 rows are no groups of 4"):
        nested.group_terms(values, 4)
