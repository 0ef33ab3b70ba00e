"""P-POTS that learns from the gradient norm at the logits: the objective's, and its moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mdm_jax import corruption, draws, objectives, variance
from mdm_jax.draws import DrawSpec, LossStats
from mdm_jax.types import Batch
from mdm_jax.variance.densities import log_spaced_edges
from mdm_jax.variance.ppots import level_moments

ROWS, LENGTH, TOKENS = 6, 8, 5
MASK = TOKENS - 1
SPEC = DrawSpec(64, 1, (1,))


def _network(seed=0):
    """Logits that depend on position and input, surer of some tokens than of others."""
    table = 3 * np.random.default_rng(seed).normal(size=(LENGTH, TOKENS, TOKENS))
    table = jnp.asarray(table, jnp.float32)
    return lambda inputs, *_: table[jnp.arange(LENGTH), inputs]


def _batch():
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, MASK, (ROWS, LENGTH)), jnp.int32)
    whole = jnp.ones((ROWS, LENGTH), bool)
    return Batch(tokens, whole, whole.astype(jnp.int32), jnp.full((ROWS,), LENGTH))


RARE, RAISED = np.array([True, False, True, False]), 0.2
PROCESSES = {
    "fixed_count": corruption.fixed_count(MASK),
    "bernoulli": corruption.bernoulli(MASK),
    "bernoulli_shifted_rate": corruption.bernoulli_shifted_rate(MASK, RARE, RAISED),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_slopes_are_those_of_the_logits_but_for_a_factor_of_at_most_two(name):
    """The sum of (1 - p)^2, exactly, which |p - one_hot|^2 at the logits is not far from."""
    process = PROCESSES[name]
    objective, batch, model_fn = objectives.masked_nelbo(process), _batch(), _network()
    identity = variance.identity()
    spec = objective.spec(ROWS, LENGTH)

    @tiny.jit
    def both(key, shift):
        """Draw and statistics, and the slopes of the rows' losses where logits are shifted."""
        draw = variance.draw_batch(key, identity, identity.init(spec), spec)

        def losses(shift):
            stats = objective.loss(lambda *inputs: model_fn(*inputs) + shift, batch, draw)
            return jnp.sum(stats.raw[0, :, 0])

        masked = process.corrupt(
            batch.tokens, objective.law.icdf(draw.u[0]), draw.noise[0], batch.eligible
        )
        stats = objective.loss(model_fn, batch, draw)
        return draw, stats, masked.target_mask, jax.jacrev(losses)(shift)

    shift = jnp.zeros((ROWS, LENGTH, TOKENS))
    draw, stats, masked, slope = jax.tree.map(np.asarray, both(jax.random.key(0), shift))
    found = stats.gradient_norms[0, :, 0]

    tokens = np.asarray(batch.tokens)
    logits = np.asarray(model_fn(np.full_like(tokens, MASK)), np.float64)[..., :MASK]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    right = np.take_along_axis(weights, tokens[..., None], -1)[..., 0] / weights.sum(-1)
    rate = np.ones_like(right)  # of which a token's loss is divided by, if it has its own
    if name == "bernoulli_shifted_rate":
        own = 1 - draw.u[0].astype(np.float64)
        rate = np.where(RARE[tokens], np.minimum(own + RAISED, 1), own)
    wanted = np.where(masked, ((1 - right) / rate) ** 2, 0.0).sum(1)
    assert np.any(wanted > 0) and np.ptp(right) > 0.5
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    squared = np.sum(np.square(slope), axis=(1, 2))
    assert np.all(found <= squared * (1 + 1e-5)) and np.all(squared <= 2 * found * (1 + 1e-5))


def test_slopes_have_no_path_to_parameters():
    objective, batch, model_fn = (
        objectives.masked_nelbo(corruption.fixed_count(MASK)),
        _batch(),
        _network(),
    )
    identity, spec = variance.identity(), objective.spec(ROWS, LENGTH)

    def total(shift, key):
        draw = variance.draw_batch(key, identity, identity.init(spec), spec)
        return jnp.sum(objective.loss(lambda *a: model_fn(*a) + shift, batch, draw).gradient_norms)

    total, slope = tiny.jit(jax.value_and_grad(total))(0.5, jax.random.key(0))
    assert total > 0 and slope == 0


def _learnt(transform, slopes_of, raw_of, steps=400):
    """Its state after batches whose slopes and losses are functions of the quantile."""

    def step(state, key):
        draw = variance.draw_batch(key, transform, state, SPEC)
        ones = jnp.ones_like(draw.u)
        stats = LossStats(raw_of(draw.u), 2 * ones, 4 * ones, ones, slopes_of(draw.u))
        return transform.update(state, draw, stats), None

    keys = jax.random.split(jax.random.key(0), steps)
    return tiny.jit(lambda state: jax.lax.scan(step, state, keys)[0])(transform.init(SPEC))


def test_moments_are_those_of_weight_and_slopes_whatever_the_loss():
    """Slopes that are constant in each bin leave no error of sampling."""
    edges = log_spaced_edges(4, 1e-2)
    levels = np.array([1.0, 9.0, 0.25, 4.0], np.float32)

    def slopes(u):
        return jnp.asarray(levels)[jnp.searchsorted(jnp.asarray(edges[1:-1]), u, side="right")]

    transform = variance.ppots_slopes(num_bins=4, smallest_rate=1e-2, warmup_steps=5)
    state = _learnt(transform, slopes, lambda u: 100 * u)
    assert state.rejected == 0
    found = level_moments(state)
    np.testing.assert_allclose(found.second, levels * (2 / 4) ** 2, rtol=1e-4)
    # The density between two quantiles of one bin: the share of its root, above a floor of a fifth.
    middles = (edges[1:] + edges[:-1]) / 2
    density = np.exp(tiny.jit(transform.profile)(state, middles).log_density)
    root = np.sqrt(levels)
    wanted = 0.8 * root / np.sum(root * np.diff(edges)) + 0.2
    np.testing.assert_allclose(density, wanted, rtol=1e-3)


def test_moments_decay_with_every_draw_of_a_bin():
    """Three draws of the first of bins [0, .9), [.9, .99), [.99, 1) and one of the second."""
    transform = variance.ppots_slopes(num_bins=3, smallest_rate=0.01, decay=0.5)
    u = jnp.asarray([0.1, 0.5, 0.7, 0.95]).reshape(1, 4, 1)
    ones = jnp.ones_like(u)
    stats = LossStats(ones, ones, ones, ones, 4 * ones)
    draw = draws.Draw(u, 0 * ones, 0.5 * ones)
    state = tiny.jit(transform.update)(transform.init(SPEC), draw, stats)
    np.testing.assert_allclose(state.weight, [1 - 0.5**3, 1 - 0.5, 0])
    np.testing.assert_allclose(state.second, [4 * (1 - 0.5**3), 4 * 0.5, 0])


def test_a_step_that_is_skipped_teaches_nothing():
    transform = variance.ppots_slopes(num_bins=4)
    state = transform.init(SPEC)

    @tiny.jit
    def step(state, key):
        draw = variance.draw_batch(key, transform, state, SPEC)
        ones = jnp.ones_like(draw.u)
        return transform.update(state, draw, LossStats(jnp.nan * ones, ones, ones, ones, ones))

    after = jax.tree.map(np.asarray, step(state, jax.random.key(0)))
    assert after.rejected == 1 and after.steps == 0 and np.all(after.weight == 0)


def test_statistics_without_slopes_are_refused():
    transform = variance.ppots_slopes(num_bins=4)
    state = transform.init(SPEC)
    draw = draws.iid(jax.random.key(0), SPEC)
    ones = np.ones(draw.u.shape, np.float32)
    with pytest.raises(
        ValueError, match="LossStats.gradient_norms, which this objective does not fill in"
    ):
        transform.update(state, draw, LossStats(ones, ones, ones, ones))
