"""Masked processes against enumeration and the closed forms of their weights and variances."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import toy_oracle as oracle
import zoo

from mdm_jax import corruption, objectives, schedules, variance
from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.schedules import masked
from mdm_jax.testing import toys
from mdm_jax.variance.transform import EmptyState

NELBO = (4.37020885, 4.52536593, 2.44006023)
PROBABILITIES = np.array(toys.ROW_PROBABILITIES)


def model_fn(*inputs):
    return toys.Toy().apply(toys.toy_params(), *inputs)


def bit_count(mask):
    return np.array([int(m).bit_count() for m in np.atleast_1d(mask)])


def rank_draws(transform, cells=4):
    """Every (cell of the rate, order of ranks) once: the exact law of counted masks, as a batch."""
    orders = np.array(list(itertools.permutations(range(4))))
    u = np.repeat((np.arange(cells) + 0.5) / cells, len(orders))
    noise = (np.tile(orders, (cells, 1)) + 0.5) / 4
    draw = Draw(
        jnp.asarray(u, jnp.float32)[None, :, None],
        jnp.zeros((1, len(u), 1)),
        jnp.asarray(noise, jnp.float32)[None],
    )
    spec = DrawSpec(len(u), 1, (4,))
    return transform.draw(jax.random.key(0), transform.init(spec), draw, spec), spec


def enumerated_losses(transform, process=corruption.fixed_count, cells=4):
    """Loss of every toy row for every draw of counts, views averaged, [3, cells, orders]."""
    objective = objectives.masked_nelbo(process(toys.MASK_ID))

    @zoo.quick
    def run(batch):
        draw, spec = rank_draws(transform, cells)
        every = lambda a: jnp.repeat(a, spec.batch_size, axis=0)  # noqa: E731
        draw = jax.tree.map(lambda a: jnp.tile(a, (1, 3, 1)), draw)
        stats = objective.loss(model_fn, jax.tree.map(every, batch), draw)
        return stats.weight * stats.raw

    losses = np.asarray(run(toys.toy_batch()), np.float64).mean((0, 2))
    return losses.reshape(3, cells, 24)


def decompose(losses):
    """A, B, C of equally likely (rate, pattern) cells, rows weighted as in the toy's data."""
    pattern = PROBABILITIES @ losses.var(axis=2).mean(axis=1)
    rate = PROBABILITIES @ losses.mean(axis=2).var(axis=1)
    row = losses.mean(axis=(1, 2))
    return pattern, rate, PROBABILITIES @ row**2 - (PROBABILITIES @ row) ** 2


@pytest.mark.parametrize(
    "transform, expected",
    [
        pytest.param(
            variance.identity(), (1.71159384, 0.23342413, 0.63706842), marks=pytest.mark.slow
        ),
        (variance.mirror(), (0.55390665, 0.23342413, 0.63706842)),
    ],
)
def test_fixed_count_by_enumeration_of_its_own_masks(transform, expected):
    """Mean and A, B, C of the master table, from every mask that the implementation can draw."""
    losses = enumerated_losses(transform)
    np.testing.assert_allclose(losses.mean(axis=(1, 2)), NELBO, rtol=2e-6)
    np.testing.assert_allclose(decompose(losses), expected, rtol=2e-5)


def test_every_subset_of_each_size_is_equally_likely():

    @zoo.quick
    def run():
        draw, _ = rank_draws(variance.mirror())
        x = jnp.zeros((1, 1, 4), jnp.int32)
        logsnr = schedules.logistic().icdf(draw.u)
        process = corruption.fixed_count(9)
        return process.corrupt(x, logsnr, draw.noise, jnp.ones((1, 1, 4), bool)).target_mask

    masks = np.asarray(run()).reshape(2, 4, 24, 4)
    # u is the quantile of the logSNR, so the first quarter holds the highest rates.
    for view, position in itertools.product(range(2), range(4)):
        sizes = masks[view, position].sum(-1)
        assert set(sizes) == {4 - position}
        codes = masks[view, position] @ (1 << np.arange(4))
        assert set(np.unique(codes, return_counts=True)[1]) == {24 // math.comb(4, sizes[0])}
    overlap = (masks[0] & masks[1]).sum(-1)
    size = masks[0].sum(-1)
    np.testing.assert_array_equal(overlap, np.maximum(0, 2 * size - 4))


def test_rounded_counts_alone_and_in_complementary_pairs():
    """Exact alone; a pair is ``a_k S(M) + a_{n-k} S(M^c)``, a_j = n / (2 j), 1 at n and 0 at 0."""
    alone = enumerated_losses(variance.identity(), corruption.rounded_count, cells=8)
    np.testing.assert_allclose(alone.mean(axis=(1, 2)), NELBO, rtol=2e-6)
    pairs = enumerated_losses(variance.complement(), corruption.rounded_count, cells=8)
    table, size = oracle.loss_table(), bit_count(range(16))
    share = np.array([0, 2, 1, 2 / 3, 1])
    pair = share[size] * table + share[4 - size] * table[:, ::-1]
    law = np.array([0, 1 / 4, 1 / 4, 1 / 4, 1 / 4])[size] / scipy.special.binom(4, size)
    mean, second = pair @ law, pair**2 @ law
    np.testing.assert_allclose(mean, NELBO, rtol=1e-7)
    np.testing.assert_allclose(pairs.mean(axis=(1, 2)), mean, rtol=2e-6)
    np.testing.assert_allclose((pairs**2).mean(axis=(1, 2)), second, rtol=1e-5)
    # On this toy the fixed counts k and n + 1 - k do better; total variance over masks and rates.
    fixed = enumerated_losses(variance.complement())
    ours, theirs = (PROBABILITIES @ losses.var(axis=(1, 2)) for losses in (pairs, fixed))
    np.testing.assert_allclose((ours, theirs), (1.259302, 0.882621), rtol=1e-5)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6])
def test_a_pair_of_rounded_counts_predicts_every_token_once(count):
    """For every rate, and constant token losses add up to n without noise."""
    rows = 64
    draw = Draw(
        jnp.asarray((np.arange(rows) + 0.37) / rows, jnp.float32)[None, :, None],
        jnp.zeros((1, rows, 1)),
        jnp.asarray(np.random.default_rng(0).uniform(0.01, 0.99, (1, rows, 6)), jnp.float32),
    )
    transform, spec = variance.complement(), DrawSpec(rows, 1, (6,))

    @zoo.quick
    def run(eligible):
        pair = transform.draw(jax.random.key(0), EmptyState(), draw, spec)
        logsnr = schedules.logistic().icdf(pair.u)
        x = jnp.zeros((1, rows, 6), jnp.int32)
        return corruption.rounded_count(9).corrupt(x, logsnr, pair.noise, eligible)

    eligible = np.broadcast_to(np.arange(6) < count, (1, rows, 6))
    out = jax.tree.map(np.asarray, run(eligible))
    np.testing.assert_array_equal(out.target_mask.sum(0), eligible[0])
    masked_count = out.target_mask.sum(-1)
    assert {*masked_count.ravel()} == {*range(count + 1)}
    total = np.mean(np.exp(out.log_weight[..., 0]) * masked_count, axis=0)
    np.testing.assert_allclose(total, count, rtol=1e-6)


def test_rao_blackwell_weights_and_variance():
    """Weight (n+1)/k: exact mean, the table's variance, (n+1)/n of fixed count's second moment."""
    losses, k = oracle.loss_table(), bit_count(range(16))
    mask_law = np.array([1 / (5 * math.comb(4, int(c))) for c in k])  # m uniform on (0, 1)
    np.testing.assert_allclose(mask_law.sum(), 1)
    weight = np.array([5 / c if c else 0 for c in k])
    mean = (weight * losses) @ mask_law
    second = ((weight * losses) ** 2) @ mask_law
    np.testing.assert_allclose(mean, NELBO, rtol=1e-6)
    total = PROBABILITIES @ second - (PROBABILITIES @ mean) ** 2
    np.testing.assert_allclose(total, 7.28929651, rtol=1e-6)
    fixed = enumerated_losses(variance.identity())
    np.testing.assert_allclose(second, 5 / 4 * (fixed**2).mean(axis=(1, 2)), rtol=1e-5)


def test_rao_blackwell_process_uses_these_weights():
    """The implementation's weight for every mask, at several rates (it must not see the rate)."""
    bits = (np.arange(16)[:, None] >> np.arange(4)) & 1
    noise = np.where(bits, 0.1, 0.9).astype(np.float32)
    eligible, x = np.ones((16, 4), bool), np.zeros((16, 4), np.int32)
    corrupt = zoo.quick(corruption.rao_blackwell(9).corrupt)
    for rate in (0.2, 0.5, 0.8):
        logsnr = np.full((16, 1), schedules.logsnr_from_masking_rate(rate))
        out = corrupt(x, logsnr, noise, eligible)
        np.testing.assert_array_equal(out.target_mask, bits.astype(bool))
        np.testing.assert_array_equal(out.inputs, np.where(bits, 9, 0))
        k = bits.sum(-1)
        np.testing.assert_allclose(
            np.exp(out.log_weight[:, 0]), np.where(k > 0, 5 / np.maximum(k, 1), 1.0), rtol=1e-6
        )


def test_clipped_rao_blackwell_weights():
    """E[1/m | k] for m uniform on [1e-3, 1] and four tokens, and the variance it leads to."""
    weight = zoo.quick(corruption.expected_inverse_rate, static_argnums=(2, 3))(
        np.arange(1, 5), np.full(4, 4), 1e-3, 1.0
    )
    expected = [4.98007968, 2.49998504, 1.66666666, 1.25000000]
    np.testing.assert_allclose(weight, expected, rtol=2e-6)
    eps, losses, size = 1e-3, oracle.loss_table(), bit_count(range(16))
    nodes, quadrature = np.polynomial.legendre.leggauss(40)
    m = (nodes + 1) / 2 * (1 - eps) + eps
    law = np.stack([m ** int(c) * (1 - m) ** (4 - int(c)) for c in size]) @ (quadrature / 2)
    w = np.concatenate([[0.0], np.asarray(weight, np.float64)])[size]
    mean, second = (w * losses) @ law, ((w * losses) ** 2) @ law
    np.testing.assert_allclose(PROBABILITIES @ mean, 4.03112015, rtol=1e-6)
    total = PROBABILITIES @ second - (PROBABILITIES @ mean) ** 2
    np.testing.assert_allclose(total, 7.25723931, rtol=1e-6)


@pytest.mark.parametrize("low, high", [(0.3, 1.0), (0.3, 0.8), (1e-3, 1.0), (0.0, 1.0)])
def test_clipped_rao_blackwell_weights_of_long_rows(low, high):
    """Also where the interval lies far in the tail of the law of m given k: float64 tails."""
    count, k = np.array([1024] * 7 + [4096, 1]), np.array([1, 2, 100, 300, 512, 900, 1024, 4096, 1])
    run = zoo.quick(corruption.expected_inverse_rate, static_argnums=(2, 3))
    found = run(k, count, low, high)

    def probability(a, b):
        below = scipy.special.betainc(a, b, high) - scipy.special.betainc(a, b, low)
        above = scipy.special.betaincc(a, b, low) - scipy.special.betaincc(a, b, high)
        return np.where(a / (a + b) < low, above, below)

    rest = count - k + 1
    with np.errstate(invalid="ignore"):  # float64 has its own end, 700 nats below 1
        expected = (count + 1) / k * probability(k, rest) / probability(k + 1, rest)
    known = np.isfinite(expected)
    assert known[2] and known.sum() > 5
    np.testing.assert_allclose(np.asarray(found)[known], expected[known], rtol=2e-6)
    assert np.all((found >= (1 - 1e-6) / high) & (found <= (1 + 1e-6) / max(low, 1e-9)))


def test_clipped_rao_blackwell_wants_the_law_of_its_rates():
    process = corruption.rao_blackwell_clipped(9, 0.3, 0.8)
    law = schedules.law_of(masked.clipped(0.3, 0.8))
    assert process.bias == objectives.masked_nelbo(process, law).bias == "truncated"
    assert objectives.block_nelbo(process, 2, law).bias == "truncated"
    for other in (None, schedules.law_of(masked.clipped(0.3, 1.0))):
        with pytest.raises(ValueError, match="rates from 0.3 to 0.8 .* schedules.masked.clipped"):
            objectives.masked_nelbo(process, other)
    with pytest.raises(ValueError, match="the law covers 0 to 1"):
        objectives.block_nelbo(process, 2)
    whole = corruption.rao_blackwell_clipped(9, 0.0, 1.0)
    assert whole.bias == objectives.masked_nelbo(whole).bias == "exact"
    default = corruption.rao_blackwell_clipped(9, 1e-3, 1.0)
    assert objectives.masked_nelbo(default, oracle.truncated_law(1e-3)).bias == "truncated"


def test_clipped_rao_blackwell_process():
    noise = np.asarray([[0.1, 0.9, 0.9, 0.9]], np.float32)
    logsnr, ones = np.zeros((1, 1), np.float32), np.ones((1, 4), bool)
    process = corruption.rao_blackwell_clipped(9, 1e-3, 1.0)
    out = zoo.quick(process.corrupt)(np.zeros((1, 4), np.int32), logsnr, noise, ones)
    np.testing.assert_allclose(np.exp(out.log_weight), [[4.98007968]], rtol=2e-6)
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        corruption.rao_blackwell_clipped(9, 0.5, 0.5)


def test_dividing_by_the_realised_count_is_low_by_one_in_n_plus_one():
    losses, k = oracle.loss_table(), bit_count(range(16))
    law = np.array([1 / (5 * math.comb(4, int(c))) for c in k])
    estimate = PROBABILITIES @ ((np.where(k > 0, 4 / np.maximum(k, 1), 0) * losses) @ law)
    np.testing.assert_allclose(estimate, 3.22458100, rtol=1e-6)


@pytest.mark.parametrize(
    "eps, expected_mean, expected_total",
    [(0.05, 4.05069770, 12.19947041), (1e-3, 4.03112015, 31.94688969)],
)
def test_bernoulli_masks_weight_and_truncated_law(eps, expected_mean, expected_total):
    """Mean and total variance for rates uniform on [eps, 1], by quadrature over rates and
    enumeration of patterns with the implementation's own masks and weights."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    rate = eps ** ((1 - nodes) / 2)  # equal steps of the logarithm: the square has a 1/m tail
    weights = weights / 2 * rate * np.log(1 / eps) / (1 - eps)
    bits = ((np.arange(16)[:, None] >> np.arange(4)) & 1).astype(bool)
    noise = np.where(bits[None], rate[:, None, None] / 2, (1 + rate[:, None, None]) / 2)
    shape = (len(rate), 16, 4)
    logsnr = np.broadcast_to(np.log1p(-rate) - np.log(rate), (16, len(rate))).T[..., None]
    out = zoo.quick(corruption.bernoulli(9).corrupt)(
        np.zeros(shape, np.int32), np.float32(logsnr), np.float32(noise), np.ones(shape, bool)
    )
    np.testing.assert_array_equal(out.target_mask, np.broadcast_to(bits, shape))
    size = bits.sum(-1)
    law = rate[:, None] ** size * (1 - rate[:, None]) ** (4 - size) * weights[:, None]
    values = np.exp(np.asarray(out.log_weight[..., 0], np.float64)) * oracle.loss_table()[:, None]
    mean = (values * law).sum((1, 2))
    second = (values**2 * law).sum((1, 2))
    np.testing.assert_allclose(PROBABILITIES @ mean, expected_mean, rtol=2e-6)
    total = PROBABILITIES @ second - (PROBABILITIES @ mean) ** 2
    np.testing.assert_allclose(total, expected_total, rtol=1e-5)


def test_eligibility_prompt_empty_and_full_rows():
    """Prompt is never masked; k is clipped to [1, n]; a row without targets masks nothing."""
    x = np.arange(24, dtype=np.int32).reshape(4, 6)
    eligible = np.array([[0, 0, 1, 1, 1, 0], [0] * 6, [1] * 6, [0, 0, 0, 0, 0, 1]], bool)
    noise = np.random.default_rng(0).uniform(1e-6, 1, (4, 6)).astype(np.float32)
    for name in ("fixed_count", "rounded_count", "rao_blackwell", "bernoulli"):
        corrupt = zoo.quick(getattr(corruption, name)(99).corrupt)
        for logsnr in (-30.0, 0.0, 30.0):
            out = corrupt(x, np.full((4, 1), logsnr, np.float32), noise, eligible)
            mask = np.asarray(out.target_mask)
            assert not np.any(mask & ~eligible)
            assert not mask[1].any()
            np.testing.assert_array_equal(out.inputs, np.where(mask, 99, x))
            assert np.all(np.isfinite(out.log_weight))
            if name == "fixed_count":
                expected = {-30.0: (3, 0, 6, 1), 0.0: (2, 0, 4, 1), 30.0: (1, 0, 1, 1)}[logsnr]
                np.testing.assert_array_equal(mask.sum(-1), expected)
                weight = np.array([3, 1, 6, 1]) / np.maximum(mask.sum(-1), 1)
                np.testing.assert_allclose(np.exp(out.log_weight[:, 0]), weight, rtol=1e-6)


def test_levels_per_segment():
    """Each contiguous segment, or each level of level_ids, is corrupted by its own level alone."""
    length, corrupt = 12, zoo.quick(corruption.fixed_count(7).corrupt)
    noise = np.random.default_rng(1).uniform(1e-6, 1, (3, length)).astype(np.float32)
    x, eligible = np.zeros((3, length), np.int32), np.ones((3, length), bool)
    logsnr = np.tile(np.float32([30.0, 0.0, -30.0]), (3, 1))
    out = corrupt(x, logsnr, noise, eligible)
    mask = np.asarray(out.target_mask).reshape(3, 3, 4)
    np.testing.assert_array_equal(mask.sum(-1), [[1, 3, 4]] * 3)
    np.testing.assert_allclose(np.exp(out.log_weight), [[4, 4 / 3, 1]] * 3, rtol=1e-6)
    for segment in range(3):
        part = slice(4 * segment, 4 * segment + 4)
        alone = corrupt(x[:, part], logsnr[:, segment, None], noise[:, part], eligible[:, part])
        np.testing.assert_array_equal(mask[:, segment], alone.target_mask)

    order = np.random.default_rng(0).permutation(length)
    ids = np.repeat(np.arange(3), 4)[order][None]
    shuffled = corrupt(x, logsnr, noise[:, order], eligible, ids)
    np.testing.assert_array_equal(shuffled.target_mask, mask.reshape(3, length)[:, order])
    np.testing.assert_allclose(shuffled.log_weight, out.log_weight)
    with pytest.raises(ValueError, match="5 noise levels do not divide"):
        corruption.spread_levels(jnp.zeros((1, 5)), length)


def test_sum_and_spread_levels_are_adjoint():
    values = jax.random.normal(jax.random.key(2), (2, 3))
    elements = jax.random.normal(jax.random.key(3), (2, 6))
    ids = jnp.array([[0, 2, 1, 0, 0, 2], [1, 1, 2, 2, 0, 1]])
    for level_ids in (None, ids):
        left = jnp.sum(corruption.spread_levels(values, 6, level_ids) * elements)
        right = jnp.sum(values * corruption.sum_levels(elements, 3, level_ids))
        np.testing.assert_allclose(left, right, rtol=1e-5)


def test_cross_entropy_excludes_the_mask_token():
    logits, token = np.array([[[1.0, 2.0, 3.0, 50.0]]], np.float32), np.array([[2]])

    @zoo.quick
    def run(logits):
        nats = objectives.token_nats(logits, token, True, mask_id=3)
        without = objectives.token_nats(logits[..., :3], token, True, mask_id=3)
        gradient = jax.grad(lambda a: objectives.token_nats(a, token, True, 3).sum())(logits)
        return nats, without, gradient

    nats, without, gradient = run(logits)
    expected = -np.log(np.exp(3) / np.exp([1, 2, 3]).sum())
    np.testing.assert_allclose(nats, [[expected]], rtol=1e-6)
    np.testing.assert_allclose(nats, without, rtol=1e-6)
    assert np.asarray(gradient)[0, 0, 3] == 0
    halved = jax.ShapeDtypeStruct(logits.shape, jnp.bfloat16)
    assert jax.eval_shape(run, halved)[0].dtype == jnp.float32


def test_negative_mask_id_is_refused():
    for name in ("fixed_count", "rounded_count", "bernoulli", "rao_blackwell"):
        with pytest.raises(ValueError, match=f"{name}: mask_id must be a token id, got -1"):
            getattr(corruption, name)(-1)
    with pytest.raises(ValueError, match="mask_id"):
        corruption.rao_blackwell_clipped(-1, 0.0, 1.0)


def test_empty_state_is_a_pytree_without_leaves():
    assert jax.tree.leaves(EmptyState()) == []
