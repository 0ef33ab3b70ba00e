"""The least variance of one mask a row, on the enumerated toy."""

import functools

import jax
import numpy as np
import pytest

from experiments.study import lower_bound
from experiments.tried.mirror_plus import toy_gradients
from mdm_jax.testing import toys
from mdm_jax.testing.enumeration import mask_bits

N = toys.LENGTH
SIZES = mask_bits(N).sum(1)
COUNTS = np.arange(1, N + 1)
SHARES = np.array(toys.ROW_PROBABILITIES)


@functools.cache
def moments():
    """Gradients [rows, masks, 3] of S; second moments and V of S / k, and the mean gradient."""
    gradients = toy_gradients()
    second, within, mean = [], [], 0.0
    for k in COUNTS:
        own = gradients[:, k == SIZES] / k
        second.append(SHARES @ np.sum(own**2, -1).mean(1))
        of_size = SHARES @ own.mean(1)
        within.append(second[-1] - np.sum(of_size**2))
        mean = mean + of_size / N
    return gradients, np.array(second), np.array(within), mean


def variance(weights, law):
    """Of one pass: of ``weight[k, level] S(M)``, with the law [levels, k] of levels and sizes."""
    gradients, _, _, mean = moments()
    total, square = 0.0, 0.0
    for k in COUNTS:
        own = gradients[:, k == SIZES] / N
        total = total + law[:, k - 1] @ weights[:, k - 1] * (SHARES @ own.mean(1))
        square += law[:, k - 1] @ weights[:, k - 1] ** 2 * (SHARES @ np.sum(own**2, -1).mean(1))
    np.testing.assert_allclose(total, mean, atol=1e-6)  # exact
    return square - np.sum(mean**2)


def test_moments_make_the_variance_of_every_way_to_draw_one_mask():
    _, second, within, mean = moments()
    found = lower_bound.of_moments(second, within, np.sum(mean**2), COUNTS, N, 1e-3)
    even = np.full((1, N), 1 / N)
    assert found["fixed_counts"] == pytest.approx(variance((N / COUNTS)[None], even))
    best = np.sqrt(second) / np.sqrt(second).sum()
    some = best > 0  # all masked, the toy has no gradient
    weights = np.divide(1 / COUNTS, best, where=some, out=np.zeros(N))[None]
    assert found["best_density"] == pytest.approx(variance(weights, best[None]))
    # Independent masks: the weight of a size is that of the rate.
    nodes, share = np.polynomial.legendre.leggauss(400)
    low = 1e-9
    rates = np.exp(np.log(low) * (1 - nodes) / 2)[:, None]
    law = share[:, None] * (-np.log(low) / 2) * rates * lower_bound.binom.pmf(COUNTS, N, rates)
    whole = lower_bound.of_moments(second, within, np.sum(mean**2), COUNTS, N, low)
    weights = np.broadcast_to(1 / rates, law.shape)
    assert whole["standard"] == pytest.approx(variance(weights, law), rel=1e-4)
    assert found["bound"] < min(found["stratified"], found["best_density"])
    # Stratified rates of the best density: as many rows as wanted of every size, in proportion.
    best = np.sqrt(within) / np.sqrt(within).sum()
    rows = 1e6 * best[some]
    batch = np.sum(rows * within[some] / (N * best[some]) ** 2) / rows.sum() ** 2
    assert found["bound"] == pytest.approx(rows.sum() * batch)


def test_sums_are_those_of_the_toy():
    _, second, within, mean = moments()
    exact = lower_bound.of_moments(second, within, np.sum(mean**2), COUNTS, N, 1e-3)
    rows = np.random.default_rng(1).choice(len(SHARES), 1024, p=SHARES)
    batch = jax.tree.map(lambda field: np.asarray(field)[rows], toys.toy_batch())
    sums = lower_bound.gradient_sums(
        toys.Toy().apply, toys.MASK_ID, toys.toy_params(), batch, COUNTS, jax.random.key(0)
    )
    found = lower_bound.with_errors(sums, COUNTS, N)
    for name, value in exact.items():
        estimate, error = found[name]["variance"]
        assert abs(estimate - value) < 3 * error < 0.3 * value, name
    batch = batch._replace(eligible=batch.eligible & (np.arange(N) < 1 + rows[:, None]))
    with pytest.raises(ValueError, match="equally many eligible"):
        lower_bound.gradient_sums(
            toys.Toy().apply, toys.MASK_ID, toys.toy_params(), batch, COUNTS, jax.random.key(0)
        )


def test_means_over_sizes_of_a_grid():
    counts = lower_bound.grid(128, 16)
    assert counts[0] == 1 and counts[-1] == 128 and len(counts) == 16
    np.testing.assert_allclose(lower_bound.mean_shares(counts, 128) @ counts, 64.5)
    assert lower_bound.grid(4, 16).tolist() == [1, 2, 3, 4]
