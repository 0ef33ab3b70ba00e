"""Several views of one row, by enumeration of the masks that the implementation makes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_oracle as oracle
import zoo

from mdm_jax import corruption, schedules, variance
from mdm_jax.draws import DrawSpec
from mdm_jax.testing import toys

BERNOULLI = corruption.bernoulli(toys.MASK_ID)
RATES = np.array([0.1, 0.3, 0.5, 0.7, 0.9])


def moments_at_rates(transform, table):
    """Per rate and row: mean, variance of one view, covariance of views 0 and 1 (traces)."""
    seen = oracle.run_views(transform, BERNOULLI, 1 - RATES)
    values = seen.weight[:, None, :, :, None] * table[None, :, None]
    mean = np.einsum("nm,rnmp->rnp", seen.pairs[0, 0].diagonal(axis1=1, axis2=2), values[0])
    cross = [
        np.einsum("rnip,nij,rnjp->rn", values[0], seen.pairs[0, view], values[view])
        for view in (0, 1)
    ]
    return mean, *(c - (mean**2).sum(-1) for c in cross)


@pytest.mark.parametrize(
    "transform", [variance.mirror(), pytest.param(variance.rotate(2), marks=pytest.mark.slow)]
)
def test_joint_law_of_a_position_in_two_views(transform):
    """P(both), P(one), P(neither) and the correlation, the most negative one there is."""
    u = 1 - RATES
    pairs = oracle.run_views(transform, BERNOULLI, u).pairs[0, 1]
    bit = oracle.BITS[:, 0]
    both = np.einsum("nij,i,j->n", pairs, bit, bit)
    neither = np.einsum("nij,i,j->n", pairs, 1 - bit, 1 - bit)
    p = RATES
    np.testing.assert_allclose(both, np.maximum(0, 2 * p - 1), atol=1e-6)
    np.testing.assert_allclose(neither, np.maximum(0, 1 - 2 * p), atol=1e-6)
    correlation = (both - p**2) / (p * (1 - p))
    expected = [-0.11111111, -0.42857143, -1, -0.42857143, -0.11111111]
    np.testing.assert_allclose(correlation, expected, atol=1e-5)


def test_mirror_covariance_of_losses_and_gradients():
    loss = oracle.loss_table()[..., None]
    _, var, cov = moments_at_rates(variance.mirror(), loss)
    expected = [46.44006675, 12.22110700, 5.71662007, 2.84920031, 0.89900367]
    np.testing.assert_allclose(oracle.PROBABILITIES @ var, expected, rtol=2e-5)
    expected = [-4.98004065, -4.63443760, -4.59818124, -1.08279123, -0.09643279]
    np.testing.assert_allclose(oracle.PROBABILITIES @ cov, expected, rtol=2e-5)
    _, trace, cross = moments_at_rates(variance.mirror(), oracle.gradient_table())
    expected = [17.57212464, 3.85914632, 1.49398742, 0.64991055, 0.19852794]
    np.testing.assert_allclose(oracle.PROBABILITIES @ trace, expected, rtol=2e-5)
    expected = [-1.80494589, -1.14321769, -0.50894599, -0.14776713, -0.01856799]
    np.testing.assert_allclose(oracle.PROBABILITIES @ cross, expected, rtol=2e-5)


def fourier_weights(table, p):
    """W_d of f = S / p: squared coefficients of degree d in the orthonormal product basis."""
    basis = np.where(oracle.BITS == 1, 1 - p, -p) / np.sqrt(p * (1 - p))  # [16, 4]
    law = oracle.bernoulli_law([p])[0]
    weights = np.zeros((len(table), 5))
    for subset in oracle.BITS.astype(bool):
        function = basis[:, subset].prod(1)
        weights[:, subset.sum()] += ((table / p * function) @ law) ** 2
    return weights[:, 1:]


@pytest.mark.slow
def test_covariance_is_the_sum_over_degrees():
    """Var = sum W_d and Cov of views j apart = sum r^d W_d, for MIRROR and for rotations."""
    table = oracle.loss_table()
    half = oracle.PROBABILITIES @ fourier_weights(table, 0.5)
    np.testing.assert_allclose(half, [5.15263608, 0.55921270, 0.00476458, 0.00000671], atol=1e-8)
    for views in (2, 3, 4):
        _, var, cov = moments_at_rates(variance.rotate(views), table[..., None])
        for i, p in enumerate(RATES):
            step = 1 / views
            both = max(0, p - step) + max(0, p - (1 - step))
            r = (both - p**2) / (p * (1 - p))
            weights = fourier_weights(table, p)
            np.testing.assert_allclose(var[:, i], weights.sum(1), rtol=2e-5)
            expected = weights @ (r ** np.arange(1, 5))
            np.testing.assert_allclose(cov[:, i], expected, rtol=1e-4, atol=1e-5)


def test_negative_covariance_is_no_theorem():
    """Misleading context: with S({0}) = S({1}) = 2, S({0, 1}) = 1 the views agree too often."""
    table = np.array([0.0, 2.0, 2.0, 1.0])[np.arange(16) & 3][None, :, None]
    _, var, cov = moments_at_rates(variance.mirror(), table)
    np.testing.assert_allclose([var[0, 2], cov[0, 2]], [2.75, 1.75], rtol=1e-5)


def test_additive_losses_leave_the_minimal_pattern_noise():
    """K views: Q frac(Kp) (1 - frac(Kp)) / (Kp)^2, and zero where Kp is whole."""
    ce = np.array([0.3, 1.1, 0.7, 2.0])
    table = np.repeat((oracle.BITS @ ce)[None], 3, 0)[..., None]
    rates = np.array([0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9])
    for views in (2, 3, 4):
        seen = oracle.run_views(variance.rotate(views), BERNOULLI, 1 - rates)
        first, second = oracle.view_means(seen, table)
        kp = views * rates
        expected = (ce**2).sum() * np.mod(kp, 1) * (1 - np.mod(kp, 1)) / kp**2
        np.testing.assert_allclose(second[0] - first[0, :, 0] ** 2, expected, atol=2e-4)


@pytest.mark.parametrize(
    "eps, views, expected",
    [
        (0.05, 2, 4.30097847),
        (0.05, 3, 2.28497526),
        (0.05, 4, 1.43135098),
        pytest.param(0.05, 8, 0.44174678, marks=pytest.mark.slow),
    ],
)
def test_pattern_noise_of_rotated_views(eps, views, expected):
    """Every view is one of K equally turned ones; A of their mean, levels uniform on [eps, 1]."""
    u, du = oracle.level_nodes(eps, views)
    found = oracle.moments(variance.rotate(views), BERNOULLI, u, du, eps)
    np.testing.assert_allclose(found.pattern, expected, rtol=5e-5)


@pytest.mark.slow
def test_mirror_at_equal_compute():
    """Batch of 8 rows and 2 views, 16 rows, and 8 rows with independent views: nats squared."""
    eps = 1e-3
    u, du = oracle.level_nodes(eps, 2)
    one = oracle.moments(variance.identity(), BERNOULLI, u, du, eps)
    two = oracle.moments(variance.mirror(), BERNOULLI, u, du, eps)
    np.testing.assert_allclose(two.total / 8, 1.85899768, rtol=1e-5)
    np.testing.assert_allclose(one.total / 16, 1.99668061, rtol=1e-5)
    independent = (one.rate + one.data + one.pattern / 2) / 8
    np.testing.assert_allclose(independent, 2.04508285, rtol=1e-5)
    covariance = 2 * two.pattern - one.pattern
    np.testing.assert_allclose(covariance, -2.97736264, rtol=1e-4)
    assert -covariance > one.rate + one.data  # the criterion for winning, and it wins


def test_mirror_gradient_at_equal_compute():
    eps, table = 1e-3, oracle.gradient_table()
    u, du = oracle.level_nodes(eps, 2)
    one = oracle.moments(variance.identity(), BERNOULLI, u, du, eps, table=table)
    two = oracle.moments(variance.mirror(), BERNOULLI, u, du, eps, table=table)
    np.testing.assert_allclose(one.mean, (-0.16024310, -0.00464517, 0.16488828), atol=1e-7)
    np.testing.assert_allclose(one[1:], (11.91686388, 0.04884767, 0.15464762), rtol=1e-5)
    np.testing.assert_allclose(2 * two.pattern - one.pattern, -0.72847622, rtol=1e-4)


def test_two_rotated_ranks_are_as_good_as_reversed_ones():
    found = oracle.fixed_count_moments(variance.rotate_ranks(2))
    np.testing.assert_allclose(found.mean, oracle.MEAN, rtol=1e-6)
    np.testing.assert_allclose(found[1:], (0.55390665, 0.23342413, 0.63706842), rtol=5e-5)


def fixed_count_masks(transform, eligible=(1, 1, 1, 1)):
    """Masks of every (level, order), [V, 4 levels, 24 orders, 4]."""

    @zoo.quick
    def run(eligible):
        draw = oracle.fixed_count_draws(transform, np.array([0.125, 0.375, 0.625, 0.875]))
        ok = jnp.broadcast_to(eligible, draw.noise.shape)
        logsnr = schedules.logistic().icdf(draw.u)
        out = corruption.fixed_count(9).corrupt(jnp.zeros(ok.shape, int), logsnr, draw.noise, ok)
        return out.target_mask

    return np.asarray(run(np.array(eligible, bool))).reshape(-1, 4, 24, 4)


def test_fixed_count_overlap_and_additive_correlation():
    """Overlap max(0, 2k - L) and, for an additive loss and k <= L/2, correlation -k / (L - k)."""
    ce = np.array([0.3, 1.1, 0.7, 2.0])
    for transform in (variance.mirror(), variance.rotate_ranks(2)):
        masks = fixed_count_masks(transform)
        for level, k in enumerate((4, 3, 2, 1)):
            overlap = (masks[0, level] & masks[1, level]).sum(-1)
            np.testing.assert_array_equal(overlap, max(0, 2 * k - 4))
            losses = masks[:, level] @ ce
            if k <= 2:
                np.testing.assert_allclose(np.corrcoef(losses)[0, 1], -k / (4 - k), atol=1e-9)


@pytest.mark.parametrize("eligible", [(1, 1, 1, 1), (1, 0, 1, 1), (0, 1, 0, 1)])
@pytest.mark.parametrize("views", [2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_rotated_ranks_keep_the_law_of_each_view(views, eligible):
    """Every subset of its size is equally likely in every view, prompt positions or not."""
    masks = fixed_count_masks(variance.rotate_ranks(views), eligible)
    for view, level in itertools.product(range(views), range(4)):
        codes = masks[view, level] @ (1 << np.arange(4))
        counts = np.unique(codes, return_counts=True)[1]
        k, n = masks[view, level, 0].sum(), sum(eligible)
        assert len(counts) == len(list(itertools.combinations(range(n), k)))
        assert len(set(counts)) == 1


def drawn(transform, spec):
    """One draw, compiled."""

    @zoo.quick
    def run(key):
        return variance.draw_batch(key, transform, transform.init(spec), spec)

    return run(jax.random.key(0))


@pytest.mark.parametrize("levels, length, views", [(1, 7, 3), (1, 8, 4), (2, 8, 2), (2, 7, 3)])
def test_rotated_ranks(levels, length, views):
    """Rank r becomes (r - floor(j L / K)) mod L, in each segment where levels divide the row."""
    spec = DrawSpec(5, levels, (length,))
    transform = variance.rotate_ranks(views)
    noise = np.asarray(drawn(transform, spec).noise)
    parts = levels if length % levels == 0 else 1
    size = length // parts
    rank = np.argsort(np.argsort(noise.reshape(views, 5, parts, size), -1), -1)
    for view in range(views):
        np.testing.assert_array_equal(rank[view], (rank[0] - view * size // views) % size)
        np.testing.assert_array_equal(np.sort(noise[view], -1), np.sort(noise[0], -1))
    for k in range(1, size + 1):
        times = (rank < k).sum(0)
        assert times.max() - times.min() <= 1


def test_rotated_noise_is_turned_exactly():
    """frac(v + j/K) on the grid: no number repeats, none leaves the open interval."""
    spec = DrawSpec(50, 1, (40,))
    draw = drawn(variance.rotate(3), spec)
    noise = np.asarray(draw.noise, np.float64)
    for view in range(3):
        shift = np.floor(view * 2**23 / 3) / 2**23
        np.testing.assert_array_equal(noise[view], np.mod(noise[0] + shift, 1))
    assert np.all((noise > 0) & (noise < 1))


def test_repeat_draws_independent_noise_at_the_same_level():
    spec = DrawSpec(4000, 1, (2,))
    draw = drawn(variance.repeat(3), spec)
    np.testing.assert_array_equal(draw.u[0], draw.u[2])
    correlation = np.corrcoef(np.asarray(draw.noise[..., 0])) - np.eye(3)
    assert np.abs(correlation).max() < 5 / 4000**0.5


@pytest.mark.parametrize("process", ["bernoulli", "rao_blackwell"])
def test_complement_predicts_every_token_once_per_pair(process):
    spec = DrawSpec(200, 1, (16,))
    draw = drawn(variance.complement(), spec)

    @zoo.quick
    def masks(draw):
        ones = jnp.ones(draw.noise.shape, bool)
        logsnr = schedules.logistic().icdf(draw.u)
        chosen = getattr(corruption, process)(9)
        return chosen.corrupt(jnp.zeros(ones.shape, int), logsnr, draw.noise, ones).target_mask

    np.testing.assert_array_equal(np.asarray(masks(draw)).sum(0), 1)


def test_complement_under_fixed_counts_predicts_one_token_twice():
    """k_1 + k_2 = n + 1, and the masks cover the row."""
    masks = fixed_count_masks(variance.complement())
    np.testing.assert_array_equal(masks.sum((0, -1)), 5)
    np.testing.assert_array_equal(masks.any(0), True)


@pytest.mark.slow
def test_complement_can_win_and_can_lose():
    """One-row variance of the pair with Rao-Blackwell weights, against two independent ones."""
    u, du = oracle.gauss(np.linspace(0, 1, 5), 6)
    process = corruption.rao_blackwell(toys.MASK_ID)
    for rows, expected, wins in (
        (toys.ROWS, 3.19799576, True),
        (((0, 1, 2, 0), (1, 1, 0, 2), (2, 0, 0, 1)), 4.78057447, False),
    ):
        pair = oracle.moments(variance.complement(), process, u, du, rows=rows)
        one = oracle.moments(variance.identity(), process, u, du, rows=rows)
        np.testing.assert_allclose(pair.total, expected, rtol=1e-6)
        assert (pair.total < one.data + (one.pattern + one.rate) / 2) == wins
