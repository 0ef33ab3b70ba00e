"""Variance of the batch gradient against enumeration; what must be refused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_corruption import PROBABILITIES
from test_decompose import enumerated_gradients, exact_components, spoilt
from test_decompose import toy_setting as toy_measured
from variants import slow_except

from mdm_jax import meter, variance
from mdm_jax.estimates import add, square_norm, start
from mdm_jax.meter.efficiency import tail_of, why_unsettled
from mdm_jax.sharding import batch_sharding, make_mesh
from mdm_jax.testing import toys
from mdm_jax.types import Batch

PICKED = (0, 0, 1, 2)
BATCH = Batch(*(np.asarray(field)[list(PICKED)] for field in toys.toy_batch()))
TOKENS = 16


def measure(transform, batches=(BATCH,), process="fixed_count", **options):
    options = {"groups": 16, "redraws": 48} | options
    setting = toy_measured(transform, process=process)
    return meter.efficiency(setting, batches, jax.random.key(0), **options)


@functools.cache
def measured(name):
    return measure(getattr(variance, name)())


def within_level(gradients):
    """Trace over patterns, averaged over counts, of each toy row, [3]."""
    return gradients.var(2).sum(-1).mean(1)


def exact_noise(name):
    """Trace of the covariance of the gradient of BATCH, nats per token."""
    if name == "stratified":
        # One row in each quarter of the levels, hence each count once, in every order.
        gradients = enumerated_gradients("identity")
        mean = gradients.mean(2)
        orders = itertools.permutations(range(4))
        sums = np.array([sum(mean[PICKED[i], o[i]] for i in range(4)) for o in orders])
        return (within_level(gradients)[list(PICKED)].sum() + sums.var(0).sum()) / TOKENS**2
    gradients = enumerated_gradients(name).reshape(3, 96, 3)
    return gradients.var(1).sum(-1)[list(PICKED)].sum() / TOKENS**2


@pytest.mark.parametrize("name", slow_except({"mirror"}, ["identity", "mirror", "stratified"]))
def test_batch_variance_equals_enumeration(name):
    """Within 4 standard errors, and these are below 6%."""
    result = measured(name)
    value, error = result.variance
    assert result.settled
    assert abs(value - exact_noise(name)) < 4 * error
    assert error < 0.06 * value
    assert result.variance_times_passes.value == pytest.approx(value * result.passes)
    assert result.passes == (2 if name == "mirror" else 1)


@pytest.mark.slow
def test_variance_with_fresh_data_contains_everything():
    """Rows drawn anew: (A + B + C) of the gradient over the number of rows, per squared tokens."""
    pool = Batch(*(np.repeat(np.asarray(f), (5, 3, 2), axis=0) for f in toys.toy_batch()))
    setting = toy_measured(variance.identity())
    result = meter.efficiency_with_data(setting, pool, jax.random.key(1), groups=16, redraws=48)
    gradients = enumerated_gradients("identity")
    expected = sum(exact_components(gradients)) * 4 / TOKENS**2
    value, error = result.variance
    assert abs(value - expected) < 4 * error < 0.4 * value
    mean = np.tensordot(PROBABILITIES, gradients.mean((1, 2)), 1) * 4 / TOKENS
    # 768 redraws leave a standard error of 2 |mean| sqrt(variance / 768) on the signal.
    error = 2 * np.sqrt(np.sum(mean**2) * expected / 768)
    assert abs(result.signal - np.sum(mean**2)) < 5 * error


@pytest.mark.slow
def test_signal_is_unbiased_for_two_redraws():
    """Squared norm of the mean gradient: half the variance too much, were it not subtracted."""
    result = measure(variance.identity(), groups=300, redraws=2)
    mean = enumerated_gradients("identity").mean((1, 2))[list(PICKED)].sum(0) / TOKENS
    expected, noise = np.sum(mean**2), exact_noise("identity")
    error = np.sqrt(4 * expected * noise / 2 + noise**2) / 300**0.5
    assert abs(result.signal - expected) < 4 * error < noise / 2


def test_running_mean_adds_up_to_the_squared_deviations():
    samples = np.random.default_rng(0).normal(3.0, 1.0, (7, 5)).astype(np.float32)
    running, terms = start(jnp.zeros((5,))), []
    for sample in samples:
        running, term = jax.jit(add)(running, jnp.asarray(sample))
        terms.append(float(term))
    np.testing.assert_allclose(running.mean, samples.mean(0), rtol=1e-5)
    np.testing.assert_allclose(sum(terms), 7 * samples.var(0).sum(), rtol=1e-5)
    assert terms[0] == 0
    assert square_norm({}) == 0


def test_infinite_variance_is_refused_and_named():
    """Bernoulli masks down to rate zero have no variance to estimate, at any number of redraws."""
    result = measure(variance.identity(), process="bernoulli", groups=8, redraws=64)
    assert not result.settled
    assert "has not settled" in result.unsettled
    with pytest.raises(ValueError, match="has not settled"):
        _ = result.variance
    assert result.to_dict()["variance"] is None
    fine = measure(variance.clipped(0.2, 1.0), process="bernoulli", redraws=16)
    assert fine.settled
    assert fine.to_dict()["variance"] > 0
    few = measure(variance.identity(), groups=2, redraws=4)
    assert "6 squared deviations do not show a tail" in few.unsettled


@pytest.mark.parametrize("tail, settled", [(1.0, False), (4.0, True)])
def test_tails_are_told_apart(tail, settled):
    """Squared deviations with a Pareto tail, over 20 seeds of 1024 redraws each."""
    refused = 0
    for seed in range(20):
        terms = np.random.default_rng(seed).pareto(tail, (16, 64)) + 1
        share, index = tail_of(terms.ravel())
        refused += bool(why_unsettled(terms, share, index))
    assert refused == (0 if settled else 20)


def test_common_random_numbers_make_differences_certain():
    first, second = measured("mirror"), measured("identity")
    result = meter.compare(first, second)
    exact = 2 * exact_noise("mirror") - exact_noise("identity")
    assert abs(result.difference.value - exact) < 4 * result.difference.standard_error
    assert result.standard_errors < -5
    assert result.ratio == pytest.approx(
        first.variance_times_passes.value / second.variance_times_passes.value
    )
    same = meter.compare(first, first)
    assert same.difference == (0, 0)
    assert same.standard_errors == 0
    with pytest.raises(ValueError, match="same groups"):
        meter.compare(first, measure(variance.mirror(), groups=2, redraws=2))


def test_microbatches_and_devices_do_not_change_the_numbers():
    transform = variance.chain(variance.stratified(), variance.mirror())
    rows = Batch(*(np.tile(f, (2,) + (1,) * (np.ndim(f) - 1)) for f in BATCH))
    setting = toy_measured(transform, batch_size=8)
    options = {"groups": 2, "redraws": 3}
    whole = meter.efficiency(setting, (rows,), jax.random.key(2), **options)
    parts = meter.efficiency(setting, (rows,), jax.random.key(2), num_microbatches=4, **options)
    placed = jax.device_put(rows, batch_sharding(make_mesh(data=8)))
    spread = meter.efficiency(setting, (placed,), jax.random.key(2), **options)
    np.testing.assert_allclose(whole.group_variances, parts.group_variances, rtol=1e-4)
    np.testing.assert_allclose(whole.group_variances, spread.group_variances, rtol=1e-4)


def test_measuring_leaves_the_state_alone_and_reports_progress():
    seen = []
    measure(variance.identity(), groups=3, redraws=5, progress=seen.append)
    assert seen == [5, 5, 5]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"groups": 1}, "at least 2 groups"),
        ({"redraws": 1}, "at least 2 groups of 2 redraws"),
        ({"batches": (BATCH, BATCH, BATCH)}, "groups must be a multiple of the 3 batches"),
        ({"batches": ()}, "multiple of the 0 batches"),
        ({"num_microbatches": 3}, "divisor of the batch size 4"),
        ({"batches": (jax.tree.map(lambda f: f[:2], BATCH),)}, "the spec's 4 rows, got 2"),
    ],
)
def test_wrong_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        measure(variance.identity(), **options)


def test_gradients_that_are_not_finite_are_refused():
    setting = spoilt(toy_measured(variance.identity()))
    with pytest.raises(ValueError, match="not finite"):
        meter.efficiency(setting, (BATCH,), jax.random.key(0), groups=2, redraws=2)
