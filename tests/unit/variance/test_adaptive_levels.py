"""Noise levels that adapt to the loss: hand-sized examples, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_oracle as oracle
import zoo
from adaptive_toys import (
    FINE,
    SHIFT,
    density,
    eps_error,
    fresh,
    learn,
    logsnr_of,
    one_batch,
    x0_error,
)

from mdm_jax import variance
from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.variance.densities import QuantileDensity, second_moment, squared_mean
from mdm_jax.variance.learned.bins import LossHistory
from mdm_jax.variance.learned.curves import (
    LogisticShape,
    PiecewiseLinear,
    logistic_curve,
    piecewise_linear_curve,
    squared_misfit,
)
from mdm_jax.variance.learned.quantile_net import monotone_net, second_moment_gradient
from mdm_jax.variance.learned.uncertainty import uncertainty_loss
from mdm_jax.variance.ppots import PpotsState

pytestmark = pytest.mark.first


def test_piecewise_linear_curve():
    """K = 3, widths (.2, .3, .5), heights (1, .5, .5)."""
    curve = piecewise_linear_curve(3)
    logs = PiecewiseLinear(jnp.log(jnp.array([2.0, 3, 5])), jnp.log(jnp.array([2, 1, 1.0])))
    logs = logs._replace(heights=logs.heights - jnp.log(2.0))

    @zoo.quick
    def run(xi, share):
        drawn = curve.log_density(logs, xi)
        misfit = squared_misfit(curve, logs, xi, 1.1, drawn)
        return curve.value(logs, xi), drawn, curve.quantile(logs, share), misfit

    value, drawn, places, misfit = run(np.float32([0.35]), np.float32([0.9, 0.625]))
    np.testing.assert_allclose(value, 1.25, rtol=1e-5)
    np.testing.assert_allclose(drawn, np.log(0.833333333333), atol=1e-5)
    np.testing.assert_allclose(places, [0.8, 0.35], rtol=1e-5)
    np.testing.assert_allclose(misfit, 0.027, rtol=1e-4)


def test_logistic_curve():
    """m = .3, v = 2, F(1) = 1.5."""
    curve = logistic_curve()
    inverse = lambda a: np.log(np.expm1(a))  # noqa: E731
    shape = LogisticShape(*(jnp.float32(a) for a in (0.3, inverse(1.0), inverse(1.5))))
    np.testing.assert_allclose(curve.value(shape, 0.6), 1.5 * 0.552537907240, rtol=1e-6)
    np.testing.assert_allclose(curve.log_density(shape, 0.6), np.log(2.060331402524), rtol=1e-6)
    np.testing.assert_allclose(curve.quantile(shape, 0.25), 0.437994288003, rtol=1e-6)


def test_ema_bins_by_hand():
    """Averages (1, 1), decay .9, a batch of 2 and 4 in the first of two bins."""
    ones = jnp.ones(2)
    state = PpotsState(ones, ones, ones, jnp.int32(9), jnp.int32(0))
    for floor, expected in ((1e-6, (0.545454545455, 0.454545454545)), (0.01, (0.545, 0.455))):
        transform = variance.ema_bins(2, decay=0.9, floor=floor, warmup_steps=0)
        new = zoo.quick(transform.update)(state, *one_batch([[0.1, 0.4]], [[2.0, 4.0]]))
        np.testing.assert_allclose(new.mean, [1.2, 1.0], rtol=1e-6)
        masses = density(transform, new, [0.25, 0.75]) / 2
        np.testing.assert_allclose(masses, expected, rtol=3e-6)


def test_ema_bins_follow_either_moment():
    """Bins never visited count as average; the mean square moves once per step as well."""
    batch = one_batch([[0.1, 0.2, 0.4]], [[2.0, 4.0, 6.0]])
    state = learn(variance.ema_bins(3, decay=0.5), batch)
    np.testing.assert_allclose(state.mean, [1.5, 3.0, 0], rtol=1e-6)
    np.testing.assert_allclose(state.second, [5.0, 18.0, 0], rtol=1e-6)
    np.testing.assert_allclose(state.weight, [0.5, 0.5, 0])
    moments = {
        squared_mean: (3, 6, 4.5),
        second_moment: np.sqrt([10, 36, 23]),
    }
    for target, masses in moments.items():
        transform = variance.ema_bins(3, floor=1e-6, warmup_steps=1, target=target)
        found = density(transform, state, [0.2, 0.5, 0.8]) / 3
        np.testing.assert_allclose(found, np.array(masses) / np.sum(masses), rtol=1e-5)
        np.testing.assert_allclose(density(transform, fresh(transform), [0.2, 0.8]), 1, rtol=1e-6)


def test_loss_history_by_hand():
    """Two bins of two: histories (1, 1), (3, 4)."""
    transform = variance.loss_history(2, 2, floor=0.001)
    half = learn(transform, one_batch([[0.1, 0.9, 0.2]], [[1.0, 3.0, 1.0]]))
    np.testing.assert_allclose(density(transform, half, [0.2, 0.8]), 1, rtol=1e-6)
    state = zoo.quick(transform.update)(half, *one_batch([[0.7]], [[4.0]]))
    np.testing.assert_array_equal(state.values, [[1, 1], [3, 4]])
    found = density(transform, state, [0.25, 0.75])
    np.testing.assert_allclose(found / 2, (0.220760728002, 0.779239271998), rtol=1e-6)
    profile = zoo.quick(transform.profile)(state, np.float32([[0.25], [0.75]]))
    weights = np.exp(profile.log_weight)[:, 0]
    np.testing.assert_allclose(weights, (2.264895593181, 0.641651438740), rtol=1e-6)


def test_loss_history_takes_a_batch_in_its_order():
    """Against a Python list per bin, with many more values of one bin than it holds."""
    transform = variance.loss_history(3, 4)
    update, state = jax.jit(transform.update), fresh(transform)
    rng, kept = np.random.default_rng(0), [[], [], []]
    for _ in range(7):
        u, raw = rng.uniform(size=(1, 9)) ** 2, rng.uniform(size=(1, 9)).astype(np.float32)
        state = update(state, *one_batch(u, raw))
        for place, value in zip(u[0], raw[0]):
            kept[int(3 * place)].append(value)
    for ring, values in zip(state.values, kept):
        np.testing.assert_array_equal(np.sort(ring), np.sort(values[-4:]))
    assert state.count.max() < 8 and state.count.min() >= 4
    two = [[0.1, 0.5], [0.1, 0.9]], [[2.0, 3.0], [4.0, 5.0]]  # a pair of views, and two levels
    paired = learn(transform, one_batch(*two))
    np.testing.assert_array_equal(paired.values[:, 0], [3, 3, 5])
    np.testing.assert_array_equal(paired.count, [1, 1, 1])


def test_uncertainty_loss_by_hand():
    value, slope = jax.value_and_grad(uncertainty_loss, argnums=1)(2.0, 0.5)
    np.testing.assert_allclose([value, slope], [1.713061319425, -0.213061319425], rtol=1e-6)


def test_systematic_levels_of_the_cosine_law():
    """Offset .37, B = 4: times (.37, .62, .87, .12), u = 1 - t."""
    with jax.enable_x64():
        found = gaussian_schedules.cosine().icdf(1 - (0.37 + np.arange(4) / 4) % 1)
    expected = [0.8405163081, -0.7725038436, -3.1492031661, 3.3134762510]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


# What the published targets are worth.


def relative_variance(found, second, mean, weights):
    return weights @ (second / found) / (weights @ mean) ** 2 - 1


def test_fifty_bins_in_proportion_to_the_loss():
    """N(0, .5^2), the bound, logSNR in [-10, 10]: masses, and 2.0023 where the optimum has 2."""
    u, du = oracle.gauss(np.linspace(0, 1, 51), 8)
    error = np.asarray(eps_error(u), np.float64)
    means = jnp.asarray((error * du).reshape(50, 8).sum(1) * 50, jnp.float32)
    ones = jnp.ones(50)
    state = PpotsState(ones, means, ones, jnp.int32(0), jnp.int32(0))
    transform = variance.ema_bins(50, floor=1e-7, warmup_steps=0)
    found = density(transform, state, u)
    known = [0.0000006480, 0.0000353549, 0.0079186549, 0.0108920371, 0.0460603413, 0.0464263371]
    masses = (found / 50).reshape(50, 8)[[0, 10, 24, 25, 40, 49], 0]
    np.testing.assert_allclose(masses, known, rtol=1e-5, atol=1.5e-7)  # a grid point is 1.2e-7
    variance_ratio = relative_variance(found, 3 * error**2, error, du)
    np.testing.assert_allclose(variance_ratio, 2.0023186946, rtol=1e-5)


def test_ten_levels_by_their_history():
    """Cosine, ten midpoints, exact second moments: 5 with equal shares, 2 by the resampler."""
    u = (np.arange(10) + 0.5) / 10
    error = np.asarray(jax.nn.sigmoid(gaussian_schedules.cosine().icdf(u) + SHIFT), np.float64)
    history = jnp.broadcast_to(jnp.asarray(3**0.5 * error, jnp.float32)[:, None], (10, 2))
    counts = jnp.full(10, 2, jnp.int32)
    state = LossHistory(history, counts, jnp.int32(0), jnp.int32(0))
    found = density(variance.loss_history(10, 2, floor=1e-3), state, u)
    known = [0.29255420, 0.24364939, 0.17782728, 0.11987942, 0.07659672]
    known += [0.04632464, 0.02582144, 0.01242638, 0.00435717, 0.00056336]
    uniform = relative_variance(np.ones(10), 3 * error**2, error, np.full(10, 0.1))
    resampled = relative_variance(found, 3 * error**2, error, np.full(10, 0.1))
    np.testing.assert_allclose(uniform, 4.99999987, rtol=1e-6)
    np.testing.assert_allclose(resampled, 2.00006252, rtol=1e-6)
    np.testing.assert_allclose(found[::-1] / 10, known, atol=2e-7)


def test_slope_of_the_clean_error_is_a_logistic_law():
    """100 bins on [-10, 10], F = mmse of N(0, .5^2): its quantiles, and the density at 1."""
    edges = np.linspace(0, 1, 101)
    rises = np.diff(np.asarray(x0_error(1 - edges), np.float64))
    transform = variance.cdcd_warp(100)
    state = fresh(transform)
    curves = state.curves._replace(heights=jnp.log(jnp.asarray(rises, jnp.float32))[None])
    state = state._replace(averages=curves)
    start = Draw(jnp.array([[[0.1], [0.5], [0.9]]]), jnp.zeros((1, 3, 1)), jnp.zeros((1, 3, 1)))
    drawn = zoo.quick(transform.draw, static_argnums=3)(
        jax.random.key(0), state, start, DrawSpec(3, 1, (1,))
    )
    expected = [-0.8118821051, 1.3859163174, 3.5829999847]
    np.testing.assert_allclose(logsnr_of(drawn.u).ravel(), expected, atol=2e-3)  # floor of a cell
    np.testing.assert_array_equal(drawn.log_weight, 0)
    at = density(transform, state, [0.549, 0.551]).mean() / 20  # the bins on both sides of 1
    np.testing.assert_allclose(at, 0.240900685933, rtol=5e-3)


@pytest.mark.slow
def test_score_function_gradient_of_a_family():
    """p proportional to sigmoid(lambda + eta), the bound: slope at .4, minimum at 2 ln .5."""
    nodes, weights = oracle.gauss(np.linspace(-10, 10, 41), 20)
    with jax.enable_x64():
        level = jnp.asarray(nodes)
        squares = 3 * jnp.square(0.5 * jax.nn.sigmoid(level + SHIFT))

        def log_density(eta):
            total = jax.nn.softplus(10 + eta) - jax.nn.softplus(eta - 10)
            return jax.nn.log_sigmoid(level + eta) - jnp.log(total)

        def moment(eta):
            return weights @ (squares * jnp.exp(-log_density(eta)))

        def gradient(eta):
            density = jnp.exp(log_density(eta))
            share = weights * density
            return second_moment_gradient(log_density, eta, squares / density**2, share.dot)

        np.testing.assert_allclose(moment(0.4), 60.69639082, rtol=1e-9)
        np.testing.assert_allclose(gradient(0.4), 4.52877226, rtol=1e-8)
        difference = (moment(0.4 + 1e-5) - moment(0.4 - 1e-5)) / 2e-5
        np.testing.assert_allclose(gradient(0.4), difference, rtol=1e-7)
        np.testing.assert_allclose(gradient(SHIFT), 0, atol=1e-8)


def double(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), tree)


def test_network_gradient_is_that_of_the_second_moment():
    """Score function at fixed levels, pathwise through moving levels, and finite differences."""
    u, du = oracle.gauss(np.linspace(0, 1, 21), 10)
    with jax.enable_x64():
        net = double(zoo.STATES["quantile_steep"][1].net)
        u, du = jnp.asarray(u), jnp.asarray(du)

        def moment(net):
            loss = 0.1 + eps_error(net.icdf(u))
            return du @ jnp.square(loss * jnp.exp(net.log_slope(u)))

        rng = np.random.default_rng(0)
        tangent = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), net)

        @zoo.quick
        def gradients(net):
            level = net.icdf(u)
            squares = jnp.square((0.1 + eps_error(level)) * jnp.exp(net.log_slope(u)))
            fixed = jax.lax.stop_gradient(level)
            score = second_moment_gradient(lambda n: n.log_pdf(fixed), net, squares, du.dot)
            return score, jax.grad(moment)(net)

        score, pathwise = gradients(net)
        step = zoo.quick(lambda s: moment(jax.tree.map(lambda a, b: a + s * b, net, tangent)))
        difference = (step(1e-5) - step(-1e-5)) / 2e-5
        both = zip(jax.tree.leaves(score), jax.tree.leaves(pathwise), jax.tree.leaves(tangent))
        along = 0.0
        for by_score, by_path, direction in both:
            np.testing.assert_allclose(by_score, by_path, rtol=1e-6, atol=1e-8)
            along += np.sum(np.asarray(by_score * direction))
        np.testing.assert_allclose(along, difference, rtol=1e-6)


@pytest.mark.parametrize("resolution", [1, 4, pytest.param(32, marks=pytest.mark.slow)])
def test_network_starts_at_the_identity_and_inverts_itself(resolution):
    u = np.float32(np.append(FINE[::50], [2.0**-24, 1 - 2.0**-24]))
    net = monotone_net(resolution)
    assert isinstance(net, QuantileDensity)

    @zoo.quick
    def run(u):
        steep = zoo.STATES["quantile_steep"][1].net
        return net.icdf(u), net.log_pdf(u), steep.cdf(steep.icdf(u))

    same, log_density, back = run(u)
    np.testing.assert_allclose(same, u, atol=1e-6)
    np.testing.assert_allclose(log_density, 0, atol=2e-6)
    np.testing.assert_allclose(back, u, atol=1e-6)
    with jax.enable_x64():
        ends = zoo.quick(lambda ends: double(net)._value(ends))(np.array([0.0, 1.0]))
    np.testing.assert_allclose(ends, [0, 1], atol=1e-12)


# Several levels per row.


def test_levels_of_a_row_share_their_fraction_of_the_loss():
    """Types of standard deviation .2 and 1: logistic laws at 3.2188758248682006 and 0."""
    edges = np.linspace(0, 1, 101)
    stds = np.array([0.2, 1.0])
    shifts = 2 * np.log(stds)
    np.testing.assert_allclose(-shifts, [3.2188758248682006, 0], atol=1e-12)
    level = logsnr_of(1 - edges)[None] + shifts[:, None]
    rises = np.diff(stds[:, None] ** 2 / (1 + np.exp(level)))
    transform = variance.cdtd_warp()
    state = fresh(transform, 2)
    curves = state.curves._replace(heights=jnp.log(jnp.asarray(rises, jnp.float32)))
    u = jnp.array([[[0.25, 0.9], [0.5, 0.1], [0.75, 0.4]]])  # the second level's own is not used
    start = Draw(u, jnp.zeros_like(u), jnp.zeros((1, 3, 2)))
    state = state._replace(averages=curves)
    drawn = zoo.quick(transform.draw, static_argnums=3)(
        jax.random.key(0), state, start, DrawSpec(3, 2, (2,))
    )
    expected = np.log([1 / 3, 1, 3])[:, None] - shifts
    np.testing.assert_allclose(logsnr_of(drawn.u[0]), expected, atol=6e-3)  # 100 linear pieces
    np.testing.assert_array_equal(drawn.log_weight, 0)


def test_groups_share_a_curve_and_normalisers_make_their_losses_alike():
    """Two levels of one group with losses 1 and 3 and units 1 and 3 are one curve's data."""
    u = jnp.full((1, 8, 2), 0.3)
    raw = jnp.broadcast_to(jnp.array([1.0, 3.0]), (1, 8, 2))
    shared = variance.cdtd_warp(groups=(0, 0), normalisers=(1.0, 3.0))
    one = variance.cdcd_warp()
    learnt = learn(shared, one_batch(u, raw), 2)
    alone = learn(one, one_batch(u[..., 0], raw[..., 0]))
    for a, b in zip(learnt.curves, alone.curves):
        assert a.shape == (1, 100)
        np.testing.assert_allclose(a, b, rtol=1e-6)
    apart = variance.cdtd_warp()
    found = learn(apart, one_batch(u, raw), 2).curves.heights
    assert found.shape == (2, 100) and np.any(found[0] != found[1])


def test_a_factor_on_the_loss_is_on_what_is_fitted():
    """The error of eps times exp(-lambda) is that of the clean data."""
    u = np.array([[0.2, 0.5, 0.6]])
    converted = variance.cdcd_warp(10, log_factor=lambda u: -logsnr_of(u))
    plain = variance.cdcd_warp(10)
    found = learn(converted, one_batch(u, eps_error(u))).curves
    expected = learn(plain, one_batch(u, x0_error(u))).curves
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


def test_the_fit_repays_the_density_that_levels_were_drawn_from():
    """The gradient of ``(F - l)^2 / q`` with q of the averages, whatever the fitted curve is, and
    of the penalty 0.0015 F(1)^2 on its noisy end."""
    transform, curve = (
        variance.cdcd_warp(3, decay=0.9),
        piecewise_linear_curve(3),
    )
    steep = PiecewiseLinear(
        jnp.log(jnp.array([[2.0, 3.0, 5.0]])), jnp.log(jnp.array([[1.0, 0.5, 4.0]]))
    )
    state = fresh(transform)
    adam, *rest = state.optimizer
    begun = (adam._replace(count=jnp.int32(1)), *rest)
    state = state._replace(averages=steep, optimizer=begun)
    u, loss = np.array([[0.1, 0.4, 0.9]]), np.array([[1.0, 3.0, 2.0]])
    learnt = zoo.quick(transform.update)(state, *one_batch(u, loss))

    def misfit(curves, weights):
        each = curve.value(jax.tree.map(lambda leaf: leaf[0], curves), jnp.asarray(1 - u[0]))
        return (
            jnp.mean(weights * (each - loss[0]) ** 2) + 0.0015 * jnp.exp(curves.heights).sum() ** 2
        )

    slopes = zoo.quick(jax.grad(misfit))

    def first_moments(q):  # Adam's, a tenth of the gradient after one step
        gradient = slopes(state.curves, np.exp(-q))
        return 0.1 * np.concatenate([np.ravel(leaf) for leaf in gradient])

    found = np.concatenate([np.ravel(leaf) for leaf in learnt.optimizer[0].mu])
    drawn = np.asarray(zoo.quick(transform.profile)(state, np.float32(u[0])).log_density)
    np.testing.assert_allclose(found, first_moments(drawn), rtol=1e-4, atol=1e-6)
    assert np.abs(first_moments(drawn) - first_moments(0 * drawn)).max() > 0.01


def test_levels_without_targets_are_left_out_of_the_fit():
    transform = variance.cdcd_warp(10)
    with_empty = one_batch([[0.1, 0.6, 0.9]], [[2.0, 6.0, 0.0]], 4.0, [[2.0, 3.0, 0.0]])
    without = one_batch([[0.1, 0.6]], [[2.0, 6.0]], 4.0, [[2.0, 3.0]])
    found = [learn(transform, b).curves for b in (with_empty, without)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), *found)


def test_learned_quantile_does_not_depend_on_the_unit_of_the_loss():
    transform = variance.learned_quantile(4)
    u = [[0.1, 0.4, 0.9]]
    small, large = (learn(transform, one_batch(u, [[c, 3 * c, c]])).net for c in (1, 1e4))
    np.testing.assert_allclose(small.height, large.height, rtol=1e-5)
    assert np.any(np.asarray(small.height) != np.asarray(fresh(transform).net.height))


LEARNERS = ("ppots", "ppots_slopes", "ppots_level_variance", "ema_bins", "loss_history")
LEARNERS += (
    "learned_quantile",
    "uncertainty_weighting",
    "cdcd_warp",
    "cdtd_warp",
    "cdtd_warp_logistic",
)


def test_a_curve_starts_at_the_scale_of_the_first_losses_that_say_something():
    u = np.array([[0.1, 0.3, 0.5, 0.7, 0.8, 0.95]])
    curve = variance.cdcd_warp(4)
    silent = learn(curve, one_batch(u, 0 * u))
    update, taught = zoo.quick(curve.update), one_batch(u, 1 + 5 * u)
    told = [update(state, *taught).curves for state in (fresh(curve), silent)]
    jax.tree.map(np.testing.assert_array_equal, *told)


def test_a_learner_with_nothing_to_learn_stays_where_it_is():
    """Losses that are all zero, and rows without eligible tokens, at the start and after a batch
    that did teach something (Adam's momentum would go on); losses whose squares underflow."""
    assert set(LEARNERS) >= {learner for learner, _ in zoo.STATES.values()}
    u = np.array([[0.1, 0.3, 0.5, 0.7, 0.8, 0.95]])
    taught, silent = one_batch(u, 1 + 5 * u), (one_batch(u, 0 * u), one_batch(u, 1 + u, 0.0))
    pairs = jax.tree.map(lambda *leaves: np.stack([*leaves, *leaves]), *silent)

    @zoo.quick
    def run(states, batches):
        updates = {name: jax.vmap(zoo.FACTORIES[name]().update) for name in LEARNERS}
        return {name: update(states[name], *batches) for name, update in updates.items()}

    begun = {name: fresh(zoo.FACTORIES[name]()) for name in LEARNERS}
    begun = jax.tree.map(lambda leaf: np.stack([leaf] * 4), begun)
    learnt = run(begun, jax.tree.map(lambda leaf: np.stack([leaf] * 4), taught))
    befores = jax.tree.map(lambda a, b: np.stack([*a[:2], *b[2:]]), begun, learnt)
    for name, after in run(befores, pairs).items():
        before = befores[name]
        np.testing.assert_array_equal(after.steps, before.steps + 1)
        jax.tree.map(np.testing.assert_array_equal, after._replace(steps=before.steps), before)
        moved = [np.any(leaf[0] != leaf[-1]) for leaf in jax.tree.leaves(before)]
        assert sum(moved) > 1, name
    network = variance.learned_quantile(4)
    small = learn(network, one_batch(u, 1e-25 * (1 + u))).net
    jax.tree.map(np.testing.assert_array_equal, small, fresh(network).net)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: variance.cdtd_warp(groups=(0, 2)), "without gaps"),
        (lambda: variance.cdtd_warp(normalisers=(1.0, 0.0)), "positive normalisers"),
        (lambda: fresh(variance.cdtd_warp(groups=(0, 1, 0)), 2), "3 groups do not fit 2 levels"),
        (lambda: fresh(variance.cdtd_warp(normalisers=(1.0,)), 2), "1 normalisers do not fit 2"),
    ],
)
def test_errors_say_what_is_allowed(call, words):
    with pytest.raises(ValueError, match=words):
        call()
