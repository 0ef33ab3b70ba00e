"""The fixed estimator of the uniform-token bound: its design, its mean, its error bar."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from scipy import stats
from test_uniform_nelbo import exact_toy

from mdm_jax import likelihood
from mdm_jax.likelihood.bounds import make_uniform_likelihood, pass_numbers
from mdm_jax.testing import toys
from mdm_jax.testing.toys import row_denoiser
from mdm_jax.types import Batch


def apply_toy(params, inputs, logsnr, documents):
    return toys.Toy().apply(params, inputs, logsnr, documents)


def toy_rows(times):
    return jax.tree.map(lambda a: np.repeat(np.asarray(a), times, axis=0), toys.toy_batch())


@pytest.fixture(scope="module")
def evaluated():
    """400 copies of each toy row, 4 passes, 3 replicates."""
    evaluate = make_uniform_likelihood(apply_toy, 3, passes=4, replicates=3)
    return evaluate(toys.toy_params(), jax.random.key(0), [toy_rows(400)])


def test_mean_is_the_enumerated_bound(evaluated):
    """Each row within 5 standard errors of its 1200 estimates."""
    estimates = evaluated.replicate_row_nats.reshape(3, 3, 400).swapaxes(0, 1).reshape(3, -1)
    error = estimates.std(1, ddof=1) / 1200**0.5
    assert np.all(np.abs(estimates.mean(1) - exact_toy()[0]) < 5 * error)
    assert np.all(error < 0.15)


def test_error_bars_are_honest(evaluated):
    """The spread over replicates is that of sums of 1200 independent rows (chi-square, 1e-4)."""
    by_row = evaluated.replicate_row_nats.var(axis=0, ddof=1).sum()
    ratio = evaluated.replicate_nats.var(ddof=1) / by_row
    assert stats.chi2.ppf(1e-4, 2) < 2 * ratio < stats.chi2.ppf(1 - 1e-4, 2)
    np.testing.assert_allclose(evaluated.standard_error_nats, (by_row / 3) ** 0.5, rtol=1e-9)


def test_levels_of_one_row_are_stratified():
    """Pass j has its quantile in cell j, uniform there; all its numbers are independent."""
    passes, rows = 5, 2000

    @zoo.quick
    def run(keys):
        one = jax.vmap(pass_numbers("stratified", "independent", passes, 2), (None, 0))
        return jax.vmap(one, (0, None))(keys, jnp.arange(passes))

    u, share, noise = (np.asarray(a) for a in run(jax.random.split(jax.random.key(1), rows)))
    assert np.all(share == 1)
    inside = u * passes - np.arange(passes)
    assert np.all((inside >= -1e-6) & (inside <= 1 + 1e-6)) and np.all((u > 0) & (u < 1))
    numbers = np.concatenate([inside, noise.reshape(rows, -1)], axis=1)
    assert min(stats.kstest(column, "uniform").pvalue for column in numbers.T) > 1e-5
    correlation = np.corrcoef(numbers.T) - np.eye(numbers.shape[1])
    assert np.abs(correlation).max() < 5 / rows**0.5


def test_ideal_denoiser_scores_the_entropy_and_the_level_curve_integrates_to_it():
    """2000 copies of each row: -log p(x), and the bins' mean over rates is the bound per token."""
    model = row_denoiser()
    evaluate = make_uniform_likelihood(
        lambda params, *args: model(*args), 3, passes=8, replicates=2, level_bins=4
    )
    result = evaluate({}, jax.random.key(2), [toy_rows(1000)] * 2)
    estimates = result.per_row_nats.reshape(2, 3, 1000).swapaxes(0, 1).reshape(3, -1)
    error = estimates.std(1, ddof=1) / 2000**0.5
    assert np.all(np.abs(estimates.mean(1) + np.log(toys.ROW_PROBABILITIES)) < 5 * error)
    assert np.all(error < 0.05)
    np.testing.assert_array_equal(result.levels.edges, [0, 0.25, 0.5, 0.75, 1])
    assert result.levels.targets.sum() == 2 * 8 * result.tokens
    # Rates are cubes of even quantiles.
    share = result.levels.targets[0] / result.levels.targets.sum()
    np.testing.assert_allclose(share, 0.25 ** (1 / 3), atol=0.01)
    np.testing.assert_allclose(result.levels.nats.mean(), result.nats_per_token, rtol=0.05)


def mixed(rows):
    """Prompts, padding with special ids, and rows without eligible tokens."""
    rng = np.random.default_rng(0)
    eligible = np.arange(4)[None] < np.array([4, 2, 0, 3, 1, 4])[:rows, None]
    tokens = np.where(eligible, rng.integers(0, 3, (rows, 4)), 3).astype(np.int32)
    return Batch(tokens, eligible, eligible.astype(np.int32), 2 * eligible.sum(1))


@pytest.mark.slow  # test_likelihood has it of the loop that they share
def test_result_does_not_depend_on_batching():
    evaluate = make_uniform_likelihood(apply_toy, 3, passes=3, replicates=2)
    batch, seen = mixed(6), []
    parts = [jax.tree.map(lambda a: a[i : i + 3], batch) for i in (0, 3)]  # noqa: B023
    result = evaluate(toys.toy_params(), jax.random.key(0), parts, seen.append)
    whole = evaluate(toys.toy_params(), jax.random.key(0), [batch])
    np.testing.assert_allclose(result.replicate_row_nats, whole.replicate_row_nats, rtol=1e-5)
    assert seen == [3, 3] and result.rows_seen == 6
    assert result.row_index.tolist() == [0, 1, 3, 4, 5]
    assert result.row_tokens.tolist() == [4, 2, 3, 1, 4]
    assert result.row_units.tolist() == [8, 4, 6, 2, 8]
    assert isinstance(result, likelihood.Likelihood)
    assert json.loads(json.dumps(result.to_dict()))["tokens"] == 14


def test_errors():
    for name in ("passes", "replicates", "level_bins"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            make_uniform_likelihood(apply_toy, 3, **({"passes": 1} | {name: 0}))
    with pytest.raises(ValueError, match="2 <= num_tokens"):
        make_uniform_likelihood(apply_toy, 1, passes=1)
    evaluate = make_uniform_likelihood(apply_toy, 3, passes=1, replicates=1)
    empty = mixed(6)._replace(eligible=np.zeros((6, 4), bool))
    with pytest.raises(ValueError, match="none of 6 rows has an eligible token"):
        evaluate(toys.toy_params(), jax.random.key(0), [empty])
    with pytest.raises(ValueError, match=r"must have the shape of the first, \(6, 4\)"):
        evaluate(toys.toy_params(), jax.random.key(0), [empty, mixed(2)])
    with pytest.raises(ValueError, match="tokens and eligible of one shape"):
        evaluate(toys.toy_params(), jax.random.key(0), [empty._replace(eligible=np.ones(6))])
