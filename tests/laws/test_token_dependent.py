"""Token-dependent masking and the reporting baseline, by enumeration of the toy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import zoo
from toy_oracle import NELBO, PROBABILITIES, model_fn

from mdm_jax import corruption, objectives, schedules, testing, variance
from mdm_jax.corruption import masked
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.objectives import objective as objectives_objective
from mdm_jax.objectives.objective import sum_losses, token_mean
from mdm_jax.testing import toys
from mdm_jax.variance.transform import Phase, stateless

RARE = np.array([False, False, True, False])  # token 2
EPS = 1e-3


def quadrature():
    """Nodes and weights of rates uniform on [1e-3, 1], even in the logarithm."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    rate = EPS ** ((1 - nodes) / 2)
    return rate, weights / 2 * rate * np.log(1 / EPS) / (1 - EPS)


def enumerated(process, rates_of):
    """Mean and second moment of each toy row's loss, from the process's own masks and weights.

    ``rates_of(rate, tokens) -> q`` are the masking rates that the process is meant to use; they
    weigh the 16 masks. Returns the two, [3], and checks that the process masks as it should.
    """
    rate, law = quadrature()
    bits = ((np.arange(16)[:, None] >> np.arange(4)) & 1).astype(bool)
    mean, second = np.zeros(3), np.zeros(3)
    for row, tokens in enumerate(np.array(toys.ROWS)):
        q = rates_of(rate[:, None], RARE[tokens][None])  # [rates, 4]
        below = np.where(bits[None], q[:, None] * 0.999, q[:, None] + (1 - q[:, None]) * 0.5)
        noise = np.clip(below, 2.0**-24, 1 - 2.0**-24)
        shape = (len(rate), 16)
        x = np.broadcast_to(tokens.astype(np.int32), (*shape, 4))
        logsnr = np.broadcast_to((np.log1p(-rate) - np.log(rate))[:, None, None], (*shape, 1))
        out = zoo.quick(process.corrupt)(
            x, np.asarray(logsnr, np.float32), np.asarray(noise, np.float32), np.ones(x.shape, bool)
        )
        possible = np.all(bits[None] | (q[:, None] < 1), axis=-1)
        np.testing.assert_array_equal(
            np.asarray(out.target_mask)[possible], np.broadcast_to(bits, (*shape, 4))[possible]
        )
        probability = np.prod(np.where(bits[None], q[:, None], 1 - q[:, None]), axis=-1)
        if out.element_log_weight is not None:
            nats = mask_cross_entropies()[row]
            weight = np.exp(np.asarray(out.element_log_weight, np.float64))
            loss = np.sum(np.where(bits, nats, 0.0) * weight, axis=-1)
        else:
            loss = np.exp(np.asarray(out.log_weight, np.float64)[..., 0])
            loss = loss * mask_cross_entropies()[row].sum(1)
        loss = np.where(possible, loss, 0.0)
        mean[row] = law @ (probability * loss).sum(1)
        second[row] = law @ (probability * loss**2).sum(1)
    return mean, second


@functools.cache
def mask_cross_entropies():
    """Cross-entropy of each masked position under every mask, [3, 16, 4]."""
    rows = [jax.tree.map(lambda a, i=i: np.asarray(a)[i], toys.toy_batch()) for i in range(3)]
    return [testing.mask_cross_entropies(model_fn, row, toys.MASK_ID) for row in rows]


@functools.partial(zoo.quick, static_argnums=0)
def loss_stats(objective, draw):
    return objective.loss(model_fn, toys.toy_batch(), draw)


@functools.cache
def truncated_bound():
    """int over rates in [1e-3, 1] of g, divided by the range, for each row."""
    mean, _ = enumerated(corruption.bernoulli(toys.MASK_ID), lambda m, rare: m + 0.0 * rare)
    return mean


def total(mean, second):
    return PROBABILITIES @ second - (PROBABILITIES @ mean) ** 2


def shifted_logit(shift):
    return lambda m, rare: 1 / (1 + (1 - m) / m * np.exp(-shift * rare))


def test_per_token_correction_is_biased_by_the_context():
    process = masked.bernoulli_shifted_rate(toys.MASK_ID, RARE, 0.2)
    mean, second = enumerated(process, lambda m, rare: np.minimum(m + 0.2 * rare, 1.0))
    bias = mean - truncated_bound()
    np.testing.assert_allclose(bias, [0, -0.05112022, 0.49817074], atol=2e-5)
    np.testing.assert_allclose(total(mean, second), 23.17259857, rtol=2e-5)


def test_per_token_correction_of_a_logit_shift_is_biased_too():
    exact = masked.bernoulli_shifted_logit(toys.MASK_ID, RARE, np.log(2.0))

    def corrupt(x, logsnr, noise, eligible):
        out = exact.corrupt(x, logsnr, noise, eligible)
        logit = -logsnr + jnp.where(jnp.asarray(RARE)[x], jnp.log(2.0), 0.0)
        return out._replace(
            log_weight=jnp.zeros_like(logsnr), element_log_weight=-jax.nn.log_sigmoid(logit)
        )

    mean, _ = enumerated(exact._replace(corrupt=corrupt), shifted_logit(np.log(2.0)))
    np.testing.assert_allclose(PROBABILITIES @ (mean - truncated_bound()), 0.05263221, atol=2e-5)


def test_full_ratio_is_exact():
    process = masked.bernoulli_shifted_logit(toys.MASK_ID, RARE, np.log(2.0))
    mean, second = enumerated(process, shifted_logit(np.log(2.0)))
    np.testing.assert_allclose(mean, truncated_bound(), rtol=5e-6)
    np.testing.assert_allclose(total(mean, second), 26.60173327, rtol=2e-5)


def test_capped_number_of_shifted_positions_is_exact_too():
    process = masked.bernoulli_shifted_logit(toys.MASK_ID, RARE, 1.5, max_shifted=1)

    def rates(m, rare):
        first = rare & (np.cumsum(rare, axis=-1) == 1)
        return shifted_logit(1.5)(m, first)

    mean, _ = enumerated(process, rates)
    np.testing.assert_allclose(mean, truncated_bound(), rtol=5e-6)


def test_cap_counts_within_each_level():
    place = masked._count_before
    chosen = jnp.array([[True, True, False, True, True, True]])
    np.testing.assert_array_equal(place(chosen, 2, None), [[0, 1, 2, 0, 1, 2]])
    ids = jnp.array([[0, 1, 0, 0, 1, 1]])
    np.testing.assert_array_equal(place(chosen, 2, ids)[0], [0, 0, 1, 1, 1, 2])


def test_prompt_and_padding_are_never_touched():
    tokens = np.full((2, 4), 2, np.int32)
    eligible = np.array([[True, False, True, False], [False] * 4])
    logsnr, noise = np.full((2, 1), -3.0, np.float32), np.full((2, 4), 0.5, np.float32)
    exact = masked.bernoulli_shifted_logit(toys.MASK_ID, RARE, 1.0)
    out = zoo.quick(exact.corrupt)(tokens, logsnr, noise, eligible)
    np.testing.assert_array_equal(out.target_mask, eligible)
    log_m, log_q = -np.log1p(np.exp(-3.0)), -np.log1p(np.exp(-4.0))
    expected = [[2 * (log_m - log_q) - log_m], [-log_m]]  # two rare targets, and none
    np.testing.assert_allclose(out.log_weight, expected, rtol=1e-6)
    rated = masked.bernoulli_shifted_rate(toys.MASK_ID, RARE)
    out = zoo.quick(rated.corrupt)(tokens, logsnr, noise, eligible)
    np.testing.assert_array_equal(out.target_mask, eligible)


def test_published_form_is_labelled_biased_whatever_the_law():
    process = corruption.bernoulli_shifted_rate(toys.MASK_ID, RARE)
    assert objectives.masked_nelbo(process).bias == "biased"
    law = gaussian_schedules.truncated(schedules.logistic(), -3.0, 3.0)
    assert objectives.masked_nelbo(process, law).bias == "biased"
    exact = corruption.bernoulli_shifted_logit(toys.MASK_ID, RARE, 1.0)
    assert objectives.masked_nelbo(exact).bias == "exact"
    assert objectives.masked_nelbo(exact, law).bias == "truncated"


def test_element_weights_equal_the_bound_where_nothing_is_rare():
    """With no rare token both forms are plain Bernoulli masks."""
    nothing = np.zeros(4, bool)
    plain = objectives.masked_nelbo(corruption.bernoulli(toys.MASK_ID))
    process = masked.bernoulli_shifted_rate(toys.MASK_ID, nothing)
    weighted = objectives.masked_nelbo(process)
    ratio = objectives.masked_nelbo(masked.bernoulli_shifted_logit(3, nothing, 2.0))
    spec, mirror = plain.spec(3, 4), variance.mirror()
    draw = zoo.quick(lambda key: variance.draw_batch(key, mirror, (), spec))(jax.random.key(1))
    losses = []
    for objective in (plain, weighted, ratio):
        stats = loss_stats(objective, draw)
        losses.append(np.asarray(stats.raw) * np.asarray(stats.weight))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: masked.bernoulli_shifted_rate(3, [1, 2]), "bool vector"),
    ],
)
def test_wrong_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def objective_and_draw(key, transform=None, batch_size=3):
    objective = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID))
    transform = transform or variance.identity()
    spec = objective.spec(batch_size, 4)
    return objective, variance.draw_batch(key, transform, transform.init(spec), spec)


def test_baseline_leaves_the_gradient_bit_for_bit():
    learnt = objectives_objective.Baseline(
        jnp.linspace(3.0, 8.0, 16), jnp.ones((16,)), jnp.zeros((), jnp.int32)
    )
    objective, draw = objective_and_draw(jax.random.key(4), variance.mirror())

    def loss(params, reported):
        stats = objective.loss(lambda *a: toys.Toy().apply(params, *a), toys.toy_batch(), draw)
        total = reported(stats)
        return token_mean(total, sum_losses(draw, stats).eligible)

    graded = tiny.jit(jax.value_and_grad(loss), static_argnums=1)
    plain = graded(toys.toy_params(), lambda stats: sum_losses(draw, stats).loss)
    with_baseline = graded(
        toys.toy_params(), lambda stats: objectives_objective.reported_loss(learnt, draw, stats)
    )
    assert abs(plain[0] - with_baseline[0]) > 0.1  # the number is another one
    for a, b in zip(jax.tree.leaves(plain[1]), jax.tree.leaves(with_baseline[1])):
        np.testing.assert_array_equal(a, b)


def test_baseline_keeps_the_mean_and_lowers_the_spread_of_the_report():
    """Also with importance weights; 20000 batches, 5 standard errors."""

    def warp(_key, draw, _spec):
        return draw._replace(u=draw.u**1.5, log_weight=jnp.log(1.5) + jnp.log(draw.u) / 2)

    transform = stateless("power", Phase.WARP, warp)

    @jax.jit
    def learn(state, key):
        objective, draw = objective_and_draw(key, transform)
        stats = objective.loss(model_fn, toys.toy_batch(), draw)
        return objectives_objective.update_baseline(state, draw, stats, decay=0.95), None

    keys = jax.random.split(jax.random.key(5), 400)
    learnt, _ = jax.lax.scan(learn, objectives_objective.new_baseline(8), keys)
    # Per-token losses of the four counts, averaged over the three rows.
    assert np.all((learnt.mean > 0.6) & (learnt.mean < 1.3))
    assert learnt.rejected == 0

    @jax.jit
    @jax.vmap
    def report(key):
        objective, draw = objective_and_draw(key, transform)
        stats = objective.loss(model_fn, toys.toy_batch(), draw)
        return sum_losses(draw, stats).loss, objectives_objective.reported_loss(learnt, draw, stats)

    plain, reported = (
        np.asarray(a, np.float64) for a in report(jax.random.split(jax.random.key(6), 20_000))
    )
    error = reported.std() / len(reported) ** 0.5
    assert abs(reported.mean() - sum(NELBO)) < 5 * error
    assert reported.var() < 0.8 * plain.var()


def test_baseline_averages_rows_of_one_bin_and_rejects_what_is_not_finite():
    objective, draw = objective_and_draw(jax.random.key(7))
    draw = draw._replace(u=jnp.array([[[0.1], [0.2], [0.9]]]))
    stats = loss_stats(objective, draw)
    per_token = np.asarray(stats.raw * stats.weight / 4)[0, :, 0]
    update = tiny.jit(functools.partial(objectives_objective.update_baseline, decay=0.5))
    once = update(objectives_objective.new_baseline(2), draw, stats)
    np.testing.assert_allclose(once.mean, [per_token[:2].mean(), per_token[2]], rtol=1e-6)
    twice = update(once, draw, stats)
    np.testing.assert_allclose(twice.mean, once.mean, rtol=1e-6)
    bad = stats._replace(raw=stats.raw.at[0, 0, 0].set(jnp.nan))
    kept = update(twice, draw, bad)
    np.testing.assert_array_equal(kept.mean, twice.mean)
    assert kept.rejected == 1
    empty = stats._replace(eligible=jnp.zeros_like(stats.eligible))
    np.testing.assert_array_equal(update(twice, draw, empty).mean, twice.mean)
    with pytest.raises(ValueError, match="bins must be"):
        objectives_objective.new_baseline(0)
