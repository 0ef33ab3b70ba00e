"""Log-likelihoods by masked subsets: where they are exact, and their variance by enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import joint_law
import numpy as np
import pytest
import toy_oracle as oracle
from scipy import stats
from variants import slow_except

from mdm_jax import likelihood, testing
from mdm_jax.likelihood import subsets as designs
from mdm_jax.likelihood.bounds import make_subset_likelihood
from mdm_jax.testing import toys
from mdm_jax.types import Batch

NELBO = np.array(oracle.NELBO)
GAPS = np.array([0.05641065, 0.05121676, 0.00429155])
ORDERS = np.array(list(itertools.permutations(range(4))))
ALL = np.ones(ORDERS.shape, bool)
KEY = jax.random.key(0)

# Variance of one replicate on row x1 (nats squared): four passes each.
VARIANCES = {
    "uniform_counts": (designs.uniform_counts(4), 0.48719781),
    "harmonic_counts": (designs.harmonic_counts(4), 1.85573119),
    "nested_prefixes": (designs.nested_prefixes(), 0.51424044),
    "one_path": (designs.one_path(), 0.11880705),
}


def apply_toy(params, inputs, logsnr, documents):
    return toys.Toy().apply(params, inputs, logsnr, documents)


def toy_likelihood(design, **settings):
    return make_subset_likelihood(apply_toy, toys.MASK_ID, design, **settings)


def repeat_row(i, times):
    return jax.tree.map(
        lambda field: np.repeat(np.asarray(field)[i : i + 1], times, 0), toys.toy_batch()
    )


@pytest.fixture(scope="module")
def cross_entropies():
    """[16, 4] of row x1: entry [M, i] for position i masked by M."""
    row = Batch(*(np.asarray(field)[0] for field in toys.toy_batch()))
    return testing.mask_cross_entropies(lambda *a: apply_toy(toys.toy_params(), *a), row, 3)


@pytest.mark.parametrize(
    "view, variance", [(designs.prefix_view, 0.51424044), (designs.path_view, 0.11880705)]
)
def test_estimates_along_one_permutation(cross_entropies, view, variance):
    """All 24 permutations through the implementation."""
    values, run = np.zeros(24), jax.jit(view)
    for j in range(5):  # the fifth view has nothing left to mask
        mask, weight = (np.asarray(a) for a in run(ORDERS, ALL, j))
        assert (weight[~mask] == 0).all() and (mask.sum(1) == (j + 1 if j < 4 else 0)).all()
        number = mask.astype(int) @ (1 << np.arange(4))
        values += (weight * cross_entropies[number]).sum(1)
    np.testing.assert_allclose(values.mean(), NELBO[0], atol=2e-6)
    np.testing.assert_allclose(values.var(), variance, atol=2e-6)


@pytest.mark.parametrize("name", ["uniform", "harmonic"])
def test_counts_follow_their_law(name):
    """Over a fine grid of quantiles; the weight is 1 / (k P(k)), and no count is out of range."""
    points, length, lengths = 4096, 7, (1, 3, 7)
    density = {"uniform": np.ones_like, "harmonic": lambda k: 1 / k}[name]
    u = np.append((np.arange(points) + 0.5) / points, 1 - 2.0**-24).astype(np.float32)
    sizes = np.repeat(lengths, len(u))
    draw = jax.jit(lambda u, size: designs.draw_count(u, size, length, density))
    found = [np.asarray(a).reshape(3, -1) for a in draw(np.tile(u, 3), sizes)]
    for n, count, weight in zip(lengths, *found):
        law = density(np.arange(1, n + 1.0))
        law = law / law.sum()
        assert count.min() >= 1 and count[-1] == n
        frequency = np.bincount(count[:-1], minlength=n + 1)[1:] / points
        np.testing.assert_allclose(frequency, law, atol=1.5 / points)
        np.testing.assert_allclose(weight * count * law[count - 1], 1.0, rtol=1e-6)
        if name == "harmonic":  # every subset has the weight H_n
            np.testing.assert_allclose(weight, np.sum(1 / np.arange(1, n + 1)), rtol=1e-6)


@pytest.mark.parametrize("name", ["uniform_counts", "harmonic_counts"])
def test_weights_of_independent_subsets(name):
    """n / (k F) or H_n / F on the tokens of a subset of size k, the same in every design."""
    design, eligible = getattr(designs, name)(2), np.arange(6) < np.arange(1, 7)[:, None]
    keys = jax.random.split(jax.random.key(1), 6)
    for view in range(3):  # the third view has nothing left to mask
        mask, weight = (np.asarray(a) for a in jax.jit(design.draw)(keys, eligible, view))
        n, k = eligible.sum(1), mask.sum(1)
        assert not np.any(mask & ~eligible) and np.all((k > 0) == (view < 2))
        harmonic = np.cumsum(1 / np.arange(1, 7.0))[n - 1]
        wanted = n / np.maximum(k, 1) if name == "uniform_counts" else harmonic
        np.testing.assert_allclose(weight, np.where(mask, wanted[:, None] / 2, 0), rtol=1e-6)


def rotated_values(losses):
    """Estimate of four rotated passes under every first count and permutation, [96]."""
    values = []
    for first in range(4):
        count = 1 + (first + np.arange(4)) % 4
        ranks = (ORDERS[:, None] - np.arange(4)[:, None]) % 4
        number = (ranks < count[:, None]).astype(int) @ (1 << np.arange(4))
        values.append((losses[number] / count).sum(1))
    return np.concatenate(values)


def test_variances_of_the_table():
    """The table of ``subset_designs``, from the enumerated losses and all designs."""
    losses, k = oracle.loss_table()[0], np.arange(1, 5)
    second = np.array([(losses[size == oracle.SIZE] ** 2).mean() for size in k])
    uniform = np.sum(second * (4 / k) ** 2) / 4 - NELBO[0] ** 2
    harmonic = np.sum(1 / k) * np.sum(second / k) - NELBO[0] ** 2
    np.testing.assert_allclose(uniform / 4, VARIANCES["uniform_counts"][1], atol=1e-7)
    np.testing.assert_allclose(harmonic / 4, VARIANCES["harmonic_counts"][1], atol=1e-7)
    np.testing.assert_allclose(rotated_values(losses).var(), 0.35653381, atol=1e-7)


@pytest.mark.parametrize("name", slow_except({"uniform_counts", "nested_prefixes"}, VARIANCES))
def test_mean_and_variance_of_each_design(name):
    """64 copies of x1: mean within 5 exact standard errors, variance by chi-square at 1e-5."""
    design, variance = VARIANCES[name]
    rows, replicates = 64, 60
    assert design.passes(4) == 4
    evaluate = toy_likelihood(design, replicates=replicates)
    result = evaluate(toys.toy_params(), KEY, [repeat_row(0, rows)])
    assert result.passes == 4 and result.replicates == replicates
    total = rows * variance
    assert abs(result.nats - rows * NELBO[0]) < 5 * math.sqrt(total / replicates)
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], replicates - 1) / (replicates - 1)
    assert low < result.standard_error_nats**2 * replicates / total < high


def test_rotated_counts_are_the_design_of_make_likelihood():
    params, batches = toys.toy_params(), [toys.toy_batch(), repeat_row(1, 3)]
    result = toy_likelihood(designs.rotated_counts(3), replicates=2)(params, KEY, batches)
    expected = likelihood.make_likelihood(apply_toy, 3, passes=3, replicates=2)(
        params, KEY, batches
    )
    np.testing.assert_allclose(result.replicate_row_nats, expected.replicate_row_nats, rtol=1e-6)
    np.testing.assert_allclose(result.levels.nats, expected.levels.nats, rtol=1e-6)
    np.testing.assert_array_equal(result.levels.targets, expected.levels.targets)
    assert result.to_dict().keys() == expected.to_dict().keys()


MIXED = [NELBO[0], (0.57398479 + 2.33808774) / 2 + 2.44975395 / 2, 0.23943688]
"""Bounds of ``mixed_batch`` from S(x, M) of the specification."""


def mixed_batch():
    """Rows with 4, 2, 1 and 0 eligible tokens, the rest visible."""
    eligible = np.array([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
    tokens = np.array([*toys.ROWS, toys.ROWS[0]], np.int32)
    return Batch(tokens, eligible, np.ones((4, 4), np.int32), eligible.sum(1).astype(np.int32))


def test_every_subset_is_the_exact_bound():
    batch = mixed_batch()
    result = toy_likelihood(designs.every_subset(5))(toys.toy_params(), KEY, [batch])
    np.testing.assert_allclose(result.per_row_nats, MIXED, atol=2e-6)
    assert result.passes == 15 and result.replicates == 8 and result.rows_seen == 4
    assert result.row_index.tolist() == [0, 1, 2] and result.standard_error_nats == 0.0
    # Every token is masked in half of the subsets: 4 * 8 + 2 * 2 + 1.
    assert result.levels.targets.sum() == 37


def test_short_rows_are_exact_in_the_company_of_long_ones():
    design = designs.exact_when_short(designs.rotated_counts(2), 2)
    batch = mixed_batch()
    evaluate = toy_likelihood(design, replicates=3)
    result = evaluate(toys.toy_params(), KEY, [batch])
    spread = np.ptp(result.replicate_row_nats, axis=0)
    assert spread[0] > 0.01 and (spread[1:] == 0).all() and result.passes == 3
    np.testing.assert_allclose(result.per_row_nats[1:], MIXED[1:], atol=2e-6)
    plain = toy_likelihood(designs.rotated_counts(2), replicates=3)
    long = plain(toys.toy_params(), KEY, [batch]).replicate_row_nats[:, 0]
    np.testing.assert_allclose(result.replicate_row_nats[:, 0], long, rtol=1e-6)
    assert design.passes(2) == 3 and design.passes(3) == 2
    assert design.fixed(2) and not design.fixed(3)


def test_one_token_takes_one_pass_and_is_exact():
    calls = []

    def apply_fn(params, inputs, logsnr, documents):
        jax.debug.callback(lambda z: calls.append(z), inputs)
        return apply_toy(params, inputs, logsnr, documents)

    batch = toys.toy_batch()._replace(eligible=np.array([[False, True, False, False]] * 3))
    design = designs.exact_when_short(designs.rotated_counts(16), 7)
    result = make_subset_likelihood(apply_fn, 3, design)(toys.toy_params(), KEY, [batch])
    jax.effects_barrier()
    assert len(calls) == 1 and result.passes == 1
    np.testing.assert_allclose(result.per_row_nats, [0.63977235, 0.57398479, 0.19928967], atol=1e-6)
    assert result.standard_error_nats == 0.0


STATES = joint_law.STATES[[0, 17, 40, 77, 80]]
HALF = np.array([[False, True, True, False]] * 5)


@pytest.mark.parametrize("name", ["every_subset", "one_path"])
@pytest.mark.parametrize("eligible", [np.ones((5, 4), bool), HALF], ids=["whole", "given a prompt"])
def test_identity_is_exact_for_one_joint_law(name, eligible):
    """-log p(answer | prompt) by the chain rule; every single path says the same."""
    design = getattr(designs, name)()
    evaluate = make_subset_likelihood(joint_law.apply_joint, 3, design, replicates=4)
    rows = joint_law.rows_of(STATES, eligible)
    result = evaluate(jnp.asarray(joint_law.LAW), KEY, [rows])
    exact = joint_law.conditional_nats(STATES, eligible)
    np.testing.assert_allclose(result.replicate_row_nats, np.broadcast_to(exact, (4, 5)), rtol=3e-6)
    assert (
        result.passes
        == {4: {"every_subset": 15, "one_path": 4}, 2: {"every_subset": 3, "one_path": 2}}[
            int(eligible[0].sum())
        ][name]
    )


def test_identity_is_a_bound_for_other_networks():
    """The toy's conditionals belong to no joint law: the published gaps remain."""
    evaluate = toy_likelihood(designs.every_subset())
    result = evaluate(toys.toy_params(), KEY, [toys.toy_batch()])
    model = lambda *a: apply_toy(toys.toy_params(), *a)  # noqa: E731
    log_law = testing.any_order_log_likelihood(model, toys.toy_batch(), 3)
    np.testing.assert_allclose(result.per_row_nats + log_law, GAPS, atol=3e-6)


def test_random_subsets_are_unbiased_for_a_joint_law():
    """Harmonic counts, each row within 5 standard errors of 150 replicates."""
    evaluate = make_subset_likelihood(
        joint_law.apply_joint, 3, designs.harmonic_counts(2), replicates=150
    )
    result = evaluate(jnp.asarray(joint_law.LAW), KEY, [joint_law.rows_of(STATES)])
    exact = joint_law.conditional_nats(STATES, np.ones((5, 4), bool))
    error = result.replicate_row_nats.std(0, ddof=1) / math.sqrt(150)
    assert (np.abs(result.per_row_nats - exact) < 5 * error).all()


@pytest.mark.slow  # test_likelihood has it of the loop that they share
def test_result_does_not_depend_on_the_batch_size():
    evaluate = toy_likelihood(designs.harmonic_counts(4), replicates=2)
    whole = mixed_batch()
    halves = [Batch(*(f[i : i + 2] for f in whole)) for i in (0, 2)]
    one, two = (evaluate(toys.toy_params(), KEY, batches) for batches in ([whole], halves))
    np.testing.assert_allclose(one.replicate_row_nats, two.replicate_row_nats, rtol=1e-6)
    np.testing.assert_array_equal(one.row_index, two.row_index)


def test_compiles_once_and_reports_progress():
    traces, done = [], []

    def apply_fn(params, inputs, logsnr, documents):
        traces.append(inputs.shape)
        return apply_toy(params, inputs, logsnr, documents)

    evaluate = make_subset_likelihood(apply_fn, 3, designs.one_path(), replicates=2)
    evaluate(toys.toy_params(), KEY, [toys.toy_batch(), repeat_row(1, 3)], done.append)
    assert traces == [(3, 4)] and done == [3, 3]


def test_errors():
    for factory in (designs.uniform_counts, designs.harmonic_counts, designs.rotated_counts):
        with pytest.raises(ValueError, match="passes must be at least 1, got 0"):
            factory(0)
    with pytest.raises(ValueError, match=r"max_eligible must lie in \[1, 15\], got 16"):
        designs.every_subset(16)
    with pytest.raises(ValueError, match="a row of 4 eligible tokens"):
        toy_likelihood(designs.every_subset(3))(toys.toy_params(), KEY, [toys.toy_batch()])
    with pytest.raises(ValueError, match="replicates must be at least 1"):
        toy_likelihood(designs.one_path(), replicates=0)
    evaluate = toy_likelihood(designs.one_path())
    empty = toys.toy_batch()._replace(eligible=np.zeros((3, 4), bool))
    with pytest.raises(ValueError, match="nothing to score: none of 3 rows"):
        evaluate(toys.toy_params(), KEY, [empty])
    with pytest.raises(ValueError, match="shape of the first"):
        evaluate(toys.toy_params(), KEY, [empty, repeat_row(0, 2)])
    with pytest.raises(ValueError, match="one shape"):
        evaluate(toys.toy_params(), KEY, [empty._replace(eligible=np.zeros((3, 3), bool))])
