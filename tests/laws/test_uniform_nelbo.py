"""The bound of uniform-token diffusion against matrices, entropies and the masked limit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import uniform_oracle as oracle
import zoo

from mdm_jax import schedules, variance
from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.objectives.losses import bound_rate, uniform_nelbo
from mdm_jax.objectives.objective import sum_losses, token_mean
from mdm_jax.schedules import masked
from mdm_jax.testing import toys
from mdm_jax.testing.toys import row_denoiser
from mdm_jax.types import Batch

LAWS = {
    "uniform_rate": None,
    "cubic": schedules.law_of(masked.power(3.0)),
    "wide": schedules.logistic(-1.0, 2.0),
}
CUBIC = LAWS["cubic"]


def level_nodes(limit=30.0, step=0.5):
    """Levels and weights dm of the trapezoidal rule over the logSNR, which converges fast."""
    level = np.arange(-limit, limit + step / 2, step)
    rate = 1 / (1 + np.exp(level))
    return level, step * rate * (1 - rate)


def odd_denoiser(num_tokens, seed=0):
    """``logits(level [N]) -> [N, K, K]`` given z: sees its own token and the level."""
    rng = np.random.default_rng(seed)
    base, slope = rng.normal(size=(2, num_tokens, num_tokens))

    def logits(level):
        level = np.asarray(level, np.float64)[:, None, None]
        return base + slope * np.tanh(level / 2)

    return logits


def softmax(logits):
    weight = np.exp(logits - logits.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def rates(logits, z, x, level):
    """``bound_rate`` in float64, arguments broadcast to those of logits [..., K]."""
    shape = logits.shape[:-1]
    with jax.enable_x64(True):
        ids = (jnp.asarray(np.broadcast_to(a, shape)) for a in (z, x))
        level = jnp.asarray(np.broadcast_to(level, shape), jnp.float64)
        return np.asarray(zoo.quick(bound_rate)(jnp.asarray(logits, jnp.float64), *ids, level))


def moments(logits, x, level):
    """Mean and second moment of the rate of one token at each level [N], logits [N, K, K] by z."""
    num_tokens = logits.shape[-1]
    found = rates(logits, np.arange(num_tokens), x, level[:, None])
    law = oracle.kernel(1 / (1 + np.exp(-level)), num_tokens)[:, x]
    return (law * found).sum(-1), (law * found**2).sum(-1)


# ---- the integrand -----------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens, x", [(2, 0), (3, 2), (5, 1)])
def test_integral_is_the_limit_of_discrete_steps(num_tokens, x):
    """T and 2T steps, extrapolated; what is left falls by 4 when T doubles."""
    denoiser = odd_denoiser(num_tokens)
    level, dm = level_nodes()
    integral = dm @ moments(denoiser(level), x, level)[0]

    def bound(steps):
        rate = (np.arange(steps + 1) / steps) ** 2

        def clean(survival):
            level = np.log(survival) - np.log1p(-survival) if survival > 0 else -np.inf
            return softmax(denoiser([level])[0])

        return oracle.discrete_bound(clean, x, 1 - rate, num_tokens)

    found = [bound(steps) for steps in (100, 200, 400)]
    left = 2 * np.array(found[1:]) - found[:-1] - integral
    np.testing.assert_allclose(left, 0, atol=3e-5)
    assert 3.5 < left[0] / left[1] < 4.5


@pytest.mark.parametrize("num_tokens", [2, 3, 17])
def test_a_prediction_without_context_costs_its_cross_entropy(num_tokens):
    """At each level the mean is minus the slope of KL(q(z | x) || q(z | c)), so all is -log c_x."""
    logits = np.random.default_rng(num_tokens).normal(size=num_tokens)
    c, x = softmax(logits), num_tokens - 1
    level, dm = level_nodes()
    found, _ = moments(np.broadcast_to(logits, (len(level), num_tokens, num_tokens)), x, level)
    np.testing.assert_allclose(dm @ found, -np.log(c[x]), rtol=1e-9)

    def divergence(rate):
        p, q = (k @ oracle.kernel(1 - rate, num_tokens) for k in (np.eye(num_tokens)[x], c))
        return p @ np.log(p / q)

    for rate, value in zip(1 / (1 + np.exp(level)), found):
        if 0.01 < rate < 0.99:
            slope = (divergence(rate + 1e-5) - divergence(rate - 1e-5)) / 2e-5
            np.testing.assert_allclose(value, -slope, rtol=1e-6)


def test_many_tokens_are_masks():
    """As K grows a replaced token is recognised: it costs CE / m, a kept one nothing."""
    c = np.array([0.5, 0.2, 0.3])
    level = np.array([-2.0, 0.0, 2.0])
    expected = np.stack([-np.log(c[1]) * (1 + np.exp(level)), np.zeros(3)])
    for num_tokens, tolerance in [(10**3, 2e-1), (10**5, 2e-3)]:
        logits = np.full((2, 3, num_tokens), -1e9)
        logits[..., :3] = np.log(c)
        found = rates(logits, np.array([[77], [1]]), 1, level)
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_float32_is_stable_over_all_levels():
    """Values and gradients near both ends, kept and replaced, sharp and flat predictions."""
    rng, num_tokens = np.random.default_rng(3), 40
    level = np.linspace(-16.6, 16.6, 84)
    logits = rng.normal(size=(6, 1, num_tokens)) * np.array([0.1, 1, 4, 10, 20, 0])[:, None, None]
    logits = np.broadcast_to(logits, (6, 84, num_tokens)).astype(np.float32)
    ids = {"kept": (1, 1), "replaced": (0, 1)}

    @zoo.quick
    def both(logits, level):
        found = {}
        for name, (z, x) in ids.items():
            z, x = (jnp.full(logits.shape[:-1], i) for i in (z, x))
            rate = functools.partial(bound_rate, inputs=z, tokens=x, logsnr=level)
            found[name] = rate(logits), jax.grad(lambda a, rate=rate: rate(a).sum())(logits)
        return found

    level = np.broadcast_to(level.astype(np.float32), (6, 84))
    narrow = both(logits, level)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.asarray, both(logits.astype(np.float64), level.astype(np.float64)))
    for name in ids:
        (value, slope), (true_value, true_slope) = narrow[name], wide[name]
        assert value.dtype == np.float32 and np.all(value >= 0)
        # What a rate contributes to an integral over levels is the rate times m (1 - m).
        share = np.exp(-np.abs(level.astype(np.float64)))
        np.testing.assert_allclose(value * share, true_value * share, rtol=2e-4, atol=2e-6)
        np.testing.assert_allclose(
            slope * share[..., None], true_slope * share[..., None], rtol=2e-4, atol=2e-6
        )


def test_levels_out_of_all_measure_are_finite():
    level, z = jnp.array([[-1e4], [-50.0], [50.0], [1e4]]), jnp.array([[0, 2]])

    def total(logits):
        return jnp.sum(bound_rate(logits, *jnp.broadcast_arrays(z, 0 * z, level)))

    logits = jnp.broadcast_to(jnp.array([5.0, 0.0, -40.0]), (4, 2, 3))
    value, slope = zoo.quick(jax.value_and_grad(total))(logits)
    assert np.isfinite(value) and np.all(np.isfinite(slope))


# ---- the objective, over everything it can draw --------------------------------------------------


@functools.cache
def noise_cells(length=4, num_tokens=3):
    """Every outcome of the process once: kept (0) or replaced by token v (1 + v), [N, L]."""
    return oracle.states(length, num_tokens + 1)


def every_draw(rate, length=4, num_tokens=3):
    """Base noise [M, N, L, 2] that leads to each outcome at each rate [M], and probabilities."""
    cells = noise_cells(length, num_tokens)[None]
    rate = np.asarray(rate)[:, None, None]
    first = np.where(cells == 0, (1 + rate) / 2, rate / 2)
    second = (np.maximum(cells - 1, 0) + 0.5) / num_tokens
    law = np.where(cells == 0, 1 - rate, rate / num_tokens).prod(-1)
    return np.stack(np.broadcast_arrays(first, second), -1), law


def enumerated(objective, model_fn, level, density):
    """The objective's expectation per toy row, [3], over all outcomes at levels of one spacing."""
    noise, law = every_draw(1 / (1 + np.exp(level)))
    count = law.size
    u = jnp.tile(jnp.repeat(objective.law.cdf(level), law.shape[1]), 3)[None, :, None]
    noise = jnp.tile(noise.reshape(count, 4, 2), (3, 1, 1))[None]
    batch = jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), toys.toy_batch())
    stats = objective.loss(model_fn, batch, Draw(u, jnp.zeros(u.shape), noise))
    values = (stats.raw * stats.weight)[0, :, 0].reshape(3, *law.shape)
    return jnp.einsum("rmn,mn,m->r", values, law, density * (level[1] - level[0]))


@pytest.mark.parametrize("name", LAWS)
def test_ideal_denoiser_reaches_the_entropy_under_every_law(name):
    """Through corruption and objective, -log p(x) for each row: 256 outcomes at each level."""
    with jax.enable_x64(True):
        objective = uniform_nelbo(3, LAWS[name])
        assert objective.bias == "exact" and objective.corruption.mask_id is None
        level = np.arange(-20.0, 20.1, 0.5)

        def run():
            density = jnp.exp(objective.law.log_pdf(level))
            return enumerated(objective, row_denoiser(), level, density)

        found = zoo.quick(run)()
    np.testing.assert_allclose(found, -np.log(toys.ROW_PROBABILITIES), rtol=2e-6)


def test_denoiser_is_the_enumerated_one():
    denoise = zoo.quick(row_denoiser())
    with jax.enable_x64(True):
        for level in (-3.0, 0.4, 5.0):
            noisy = oracle.states(4, 3)
            logits = denoise(jnp.asarray(noisy), jnp.full((81, 1), level, jnp.float64))
            survival = 1 / (1 + np.exp(-level))
            expected = oracle.leave_one_out(toys.ROWS, toys.ROW_PROBABILITIES, survival, 3)
            np.testing.assert_allclose(np.exp(logits), expected, atol=1e-12)


def test_row_denoiser_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="one of them|below 3 and J probabilities, got shapes"):
        row_denoiser([[0, 1], [3, 1]], [0.5, 0.5], 3)
    with pytest.raises(ValueError, match=r"got shapes \(2, 2\) and \(3,\)"):
        row_denoiser([[0, 1], [2, 1]], [0.5, 0.2, 0.3], 3)


def toy_fn(params):
    return lambda *args: toys.Toy(params["params"]["theta"].dtype).apply(params, *args)


@functools.cache
def exact_toy():
    """Bound [3] of the toy network's rows and its gradient in theta [3, 3], by enumeration.

    The gradient by central differences: no path through our autodiff.
    """
    with jax.enable_x64(True):
        level, objective = np.arange(-22.0, 22.1, 1.0), uniform_nelbo(3)

        @zoo.quick
        def bound(theta):
            density = jnp.exp(objective.law.log_pdf(level))
            return enumerated(objective, toy_fn({"params": {"theta": theta}}), level, density)

        theta, columns = np.array(toys.THETA), []
        for shift in 1e-4 * np.eye(3):
            columns.append((bound(theta + shift) - bound(theta - shift)) / 2e-4)
        return np.asarray(bound(theta)), np.stack(columns, axis=1)


def test_every_network_is_above_the_entropy():
    """The mean exceeds the data's entropy; a network without masks costs otherwise than with."""
    bound, _ = exact_toy()
    entropy = -np.dot(toys.ROW_PROBABILITIES, np.log(toys.ROW_PROBABILITIES))
    assert np.dot(toys.ROW_PROBABILITIES, bound) > entropy + 1


CHAINS = {
    "identity": variance.identity,
    "stratified_mirror": zoo.CHAINS["stratified_mirror"],
    "complement": zoo.SINGLES["complement"],
    "rotate": zoo.SINGLES["rotate"],
    "rotate_ranks": zoo.SINGLES["rotate_ranks"],
    "ppots_binned": zoo.SINGLES["ppots_binned"],
}
SPEC = DrawSpec(7, 1, (4, 2))
TOY_ROWS = np.arange(7) % 3
NUM_DRAWS = 2000


@functools.cache
def chain_estimates():
    """Name -> loss [N, 7] and gradient in theta [N, 7, 3] of every row and draw, views averaged."""
    objective, whole = uniform_nelbo(3, CUBIC), jnp.ones((1, 4), bool)

    def draw_all(key):
        made = ((name, make()) for name, make in CHAINS.items())
        return {n: variance.draw_batch(key, t, t.init(SPEC), SPEC) for n, t in made}

    def loss(params, row, u, log_weight, noise):
        batch = Batch(jnp.asarray(toys.ROWS)[row][None], whole, whole.astype(int), jnp.full(1, 4))
        draw = Draw(u[None, None], log_weight[None, None], noise[None, None])
        return sum_losses(draw, objective.loss(toy_fn(params), batch, draw)).loss

    keys = jax.random.split(jax.random.key(0), NUM_DRAWS)
    drawn = jax.tree.map(np.asarray, zoo.quick(jax.vmap(draw_all))(keys))
    # All views of all rows of all chains in one program.
    flat = [[a.reshape(-1, *a.shape[3:]) for a in draw] for draw in drawn.values()]
    u, log_weight, noise = (np.concatenate(parts) for parts in zip(*flat))
    row = np.tile(TOY_ROWS, len(u) // 7)
    run = zoo.quick(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0, 0, 0, 0)))
    value, slope = run(toys.toy_params(), row, u, log_weight, noise)
    slope, found, start = slope["params"]["theta"], {}, 0
    for name, draw in drawn.items():
        shape = draw.u.shape[:3]
        part = slice(start, start := start + int(np.prod(shape)))
        each = (np.asarray(a[part], np.float64).reshape(*shape, -1) for a in (value, slope))
        losses, slopes = (a.mean(1) for a in each)
        found[name] = losses[..., 0], slopes
    return found


@pytest.mark.parametrize("name", CHAINS)
def test_chains_keep_loss_and_gradient(name):
    """Mean over draws against enumeration, 5 standard errors of the spread over whole batches."""
    for samples, expected in zip(chain_estimates()[name], exact_toy()):
        error = samples.std(0, ddof=1) / NUM_DRAWS**0.5
        assert np.all(np.abs(samples.mean(0) - expected[TOY_ROWS]) < 5 * error + 1e-5)
        assert np.all(error < 0.25)


def test_second_moment_is_finite_where_it_should_be():
    """Where rates get small a uniform law never stops adding to it; the cubic law does."""
    level = np.arange(0.0, 24.0, 0.25)
    logits = np.log(np.array([0.6, 0.3, 0.1]))
    second = moments(np.broadcast_to(logits, (len(level), 3, 3)), 0, level)[1]
    rate = 1 / (1 + np.exp(level))
    target = rate * (1 - rate)
    parts = [(level > a) & (level <= a + 3) for a in (12, 15, 18)]
    density = np.exp(np.asarray(CUBIC.log_pdf(level), np.float64))
    for law, falls in [(target, False), (density, True)]:
        added = [np.sum(second[part] * target[part] ** 2 / law[part]) for part in parts]
        assert (added[2] < 0.4 * added[1] < 0.16 * added[0]) == falls
        assert (added[2] > added[1] > added[0]) != falls


# ---- batches -------------------------------------------------------------------------------------


def mixed_batch(padding=0):
    """A prompt row, a padded row, an empty row and a whole row."""
    tokens = jnp.array([[0, 1, 2, 0], [1, 2, 0, 0], [0, 0, 0, 0], [2, 1, 0, 2]], jnp.int32)
    eligible = jnp.array([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    tokens = jnp.where(eligible | (jnp.arange(4)[:, None] == 0), tokens, padding)
    return Batch(tokens, eligible, eligible.astype(jnp.int32), jnp.array([2, 2, 0, 4], jnp.int32))


def some_draw(spec, views=2):
    """Independent numbers; no transform to compile."""
    rng = np.random.default_rng(0)
    levels = (views, spec.batch_size, spec.num_levels)
    u, noise = (
        rng.uniform(size=shape).astype(np.float32)
        for shape in (levels, (views, spec.batch_size, *spec.event_shape))
    )
    return Draw(u, np.zeros(levels, np.float32), noise)


def test_unscored_positions_carry_nothing():
    """No gradient on prompt and padding, whose ids may be special ones without a logit."""
    objective = uniform_nelbo(3)
    spec = objective.spec(4, 4)
    assert spec == DrawSpec(4, 1, (4, 2))
    draw = some_draw(spec)

    @zoo.quick
    def both(batch):
        def loss(logits):
            stats = objective.loss(lambda *_: logits, batch, draw)
            return sum_losses(draw, stats).loss, stats

        return jax.value_and_grad(loss, has_aux=True)(jnp.zeros((8, 4, 5)).at[..., 3:].set(9.0))

    (value, stats), gradient = both(mixed_batch())
    gradient = np.asarray(gradient).reshape(4, 2, 4, 5)
    eligible = np.asarray(mixed_batch().eligible)
    assert not np.any(np.abs(gradient).sum((1, 3))[~eligible])
    assert np.all(np.abs(gradient).sum((1, 3))[eligible] > 0)
    np.testing.assert_array_equal(gradient[..., 3:], 0)
    np.testing.assert_array_equal(stats.eligible[:, :, 0], [[2, 2, 0, 4]] * 2)
    np.testing.assert_array_equal(stats.targets[:, :, 0], [[2, 2, 0, 4]] * 2)
    np.testing.assert_array_equal(stats.raw[:, 2], 0)
    (other, _), other_gradient = both(mixed_batch(padding=4))
    assert value == other and np.isfinite(value)
    np.testing.assert_array_equal(gradient.ravel(), np.asarray(other_gradient).ravel())


def test_all_empty_batch_has_zero_loss_and_gradient():
    objective = uniform_nelbo(3)
    nothing = jnp.zeros((2, 4), jnp.int32)
    batch = Batch(nothing, nothing.astype(bool), nothing, jnp.zeros((2,), jnp.int32))
    draw = some_draw(objective.spec(2, 4))

    def loss(params):
        sums = sum_losses(draw, objective.loss(toy_fn(params), batch, draw))
        return token_mean(sums.loss, sums.eligible)

    value, gradient = zoo.quick(jax.value_and_grad(loss))(toys.toy_params())
    assert value == 0
    np.testing.assert_array_equal(gradient["params"]["theta"], 0.0)


def test_segments_are_independent_terms():
    """Two levels per row: each segment's tokens are scored at its own level."""
    objective = uniform_nelbo(3, num_levels=2)
    spec = objective.spec(3, 4)
    assert spec == DrawSpec(3, 2, (4, 2))
    draw = some_draw(spec)
    logits = np.broadcast_to(np.array([1.0, 0.0, 0.0], np.float32), (6, 4, 3))

    @zoo.quick
    def run(draw):
        seen = []

        def model_fn(inputs, logsnr, documents):
            seen.append((inputs, logsnr))
            return jnp.asarray(logits)

        return objective.loss(model_fn, toys.toy_batch(), draw), seen[0]

    stats, (inputs, logsnr) = run(draw)
    assert stats.raw.shape == stats.weight.shape == (2, 3, 2)
    tokens = np.repeat(toys.ROWS, 2, axis=0)
    each = rates(logits, np.asarray(inputs), tokens, np.repeat(logsnr, 2, axis=-1))
    by_hand = each.reshape(3, 2, 2, 2).sum(-1).swapaxes(0, 1)
    np.testing.assert_allclose(stats.raw, by_hand, rtol=1e-5)
    with pytest.raises(ValueError, match="3 noise levels do not divide"):
        uniform_nelbo(3, num_levels=3).spec(2, 4)


def test_labels_and_errors():
    law = schedules.law_of(masked.clipped(0.3, 0.8))
    assert uniform_nelbo(3, law).bias == "truncated"
    with pytest.raises(ValueError, match="needs 2 <= num_tokens <= .*, got 1"):
        uniform_nelbo(1)
    objective = uniform_nelbo(4)
    u = jnp.full((1, 3, 1), 0.5)
    draw = Draw(u, u, jnp.full((1, 3, 4, 2), 0.5))
    with pytest.raises(ValueError, match="bound over 4 tokens needs as many logits, got 3"):
        jax.eval_shape(lambda: objective.loss(toy_fn(toys.toy_params()), toys.toy_batch(), draw))
