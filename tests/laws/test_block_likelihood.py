"""The fixed estimator of the block bound: exact designs on the toy, error bars, prompts."""

import math

import block_toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from block_toy import BLOCK_NELBO
from scipy import stats
from test_likelihood import design_values

from mdm_jax.likelihood import counts, estimators, make_evaluate
from mdm_jax.likelihood.bounds import make_block_likelihood, masked_estimator
from mdm_jax.testing import toys

ROWS, REPLICATES = 32, 100


def repeated(row, times):
    return jax.tree.map(
        lambda a: np.repeat(np.asarray(a)[row : row + 1], times, 0), toys.toy_batch()
    )


def evaluation_of(block_size, passes, replicates, **options):
    """Of random subsets, where :func:`make_block_likelihood` would run all of a small block."""
    apply_fn, design = block_toy.block_apply(block_size), counts(passes)
    estimator = masked_estimator(apply_fn, toys.MASK_ID, design, block_size)
    return make_evaluate(estimator, replicates, **options)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("block_size", [2, 4])
def test_expectation_over_all_designs_is_the_bound(block_size, passes):
    """Every first count and permutation of a block once."""
    values = [
        sum(design_values(block, passes).mean() for block in row)
        for row in block_toy.block_losses(block_size)
    ]
    np.testing.assert_allclose(values, BLOCK_NELBO[block_size], rtol=1e-7)


@pytest.mark.parametrize("block_size, passes", [(2, 1), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_mean_and_standard_error_are_honest(block_size, passes):
    """Copies of x1: 5 exact standard errors for the mean, chi-square for the error."""
    evaluate = evaluation_of(block_size, passes=passes, replicates=REPLICATES)
    result = evaluate(toys.toy_params(), jax.random.key(1), [repeated(0, ROWS)])
    blocks = block_toy.block_losses(block_size)[0]
    spread = ROWS * sum(design_values(block, passes).var() for block in blocks)
    error = math.sqrt(spread / REPLICATES)
    assert abs(result.nats - ROWS * BLOCK_NELBO[block_size][0]) < 5 * error
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], REPLICATES - 1) / (REPLICATES - 1)
    assert low < result.standard_error_nats**2 * REPLICATES / spread < high


def test_more_passes_than_tokens_of_a_block():
    """Both counts in every pair of passes, and orders of their own in the second pair."""
    evaluate = evaluation_of(2, passes=4, replicates=REPLICATES)
    result = evaluate(toys.toy_params(), jax.random.key(2), [repeated(2, ROWS)])
    blocks = block_toy.block_losses(2)[2]
    spread = ROWS * sum(design_values(block, 2).var() for block in blocks) / 2
    assert abs(result.nats - ROWS * BLOCK_NELBO[2][2]) < 5 * math.sqrt(spread / REPLICATES)
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], REPLICATES - 1) / (REPLICATES - 1)
    assert low < result.standard_error_nats**2 * REPLICATES / spread < high


def test_blocks_and_rows_draw_on_their_own():
    """Which counts a pass shows: independent between the blocks of a row, 5 standard errors."""
    seen = []

    def apply_fn(params, inputs, logsnr, documents):
        jax.debug.callback(lambda level: seen.append(np.asarray(level)), logsnr)
        return block_toy.block_apply(2)(params, inputs)

    evaluate = make_evaluate(masked_estimator(apply_fn, toys.MASK_ID, counts(1), 2), 8)
    evaluate(toys.toy_params(), jax.random.key(0), [repeated(0, 500)])
    jax.effects_barrier()
    levels = np.concatenate(seen)
    both = np.asarray(estimators.logsnr_of_count(jnp.array([1, 2]), jnp.array([2, 2])))
    assert set(levels.ravel().tolist()) == set(both.tolist())
    one = levels == both[0]
    tolerance = 5 * 0.5 / len(one) ** 0.5
    assert np.all(np.abs(one.mean(0) - 0.5) < tolerance)
    assert abs((one[:, 0] == one[:, 1]).mean() - 0.5) < tolerance


def test_prompts_partial_blocks_and_empty_rows():
    """One eligible token per block makes the estimate exact; a row without any is left out."""
    eligible = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    batch = jax.tree.map(np.asarray, toys.toy_batch())._replace(eligible=eligible)
    evaluate = evaluation_of(2, passes=2, replicates=2, level_bins=1)
    result = evaluate(toys.toy_params(), jax.random.key(0), [batch])
    losses = block_toy.block_losses(2)
    expected = [losses[0, 0, 2] + losses[0, 1, 1], losses[2, 1, 2]]
    np.testing.assert_allclose(result.per_row_nats, expected, rtol=1e-6)
    assert result.standard_error_nats == 0.0
    assert result.row_index.tolist() == [0, 2] and result.row_tokens.tolist() == [2, 1]
    assert result.levels.targets.tolist() == [3 * 2]  # the same in both replicates
    np.testing.assert_allclose(result.levels.nats, sum(expected) / 3, rtol=1e-6)


@pytest.mark.parametrize("block_size", [1, 2])
def test_small_blocks_are_exact(block_size):
    """Of one token in one pass, whatever is asked for: the bound is the likelihood. Of two, all
    three subsets take no more passes than 3 x 4."""
    calls = []

    def apply_fn(params, inputs, logsnr, documents):
        jax.debug.callback(lambda: calls.append(1))
        return block_toy.block_apply(block_size)(params, inputs)

    evaluate = make_block_likelihood(apply_fn, toys.MASK_ID, block_size, passes=3, replicates=4)
    result = evaluate(toys.toy_params(), jax.random.key(0), [toys.toy_batch()])
    jax.effects_barrier()
    assert len(calls) == result.passes == 2**block_size - 1 and result.replicates == 4
    np.testing.assert_allclose(result.per_row_nats, BLOCK_NELBO[block_size], rtol=1e-6)
    assert result.standard_error_nats == 0.0


@pytest.mark.slow  # test_likelihood has it of the loop that they share
def test_result_does_not_depend_on_the_batch_size():
    evaluate = evaluation_of(2, passes=2, replicates=2)
    whole = evaluate(toys.toy_params(), jax.random.key(3), [repeated(0, 6)])
    parts = evaluate(toys.toy_params(), jax.random.key(3), [repeated(0, 2)] * 3)
    np.testing.assert_allclose(whole.replicate_row_nats, parts.replicate_row_nats, rtol=1e-6)
    assert np.ptp(whole.replicate_row_nats) > 0.1  # rows draw different masks


def test_errors():
    with pytest.raises(ValueError, match="passes must be at least 1, got 0"):
        make_block_likelihood(block_toy.block_apply(2), toys.MASK_ID, 2, passes=0)
    evaluate = make_block_likelihood(block_toy.block_apply(2), toys.MASK_ID, 3, passes=1)
    with pytest.raises(ValueError, match="blocks of 3 tokens do not divide a row of 4"):
        evaluate(toys.toy_params(), jax.random.key(0), [toys.toy_batch()])
