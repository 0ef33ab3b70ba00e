"""The masked bound: exactness for any law, normalisation, prompts, padding, empty rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from toy_oracle import NELBO, model_fn
from variants import slow_except

from mdm_jax import corruption, gaussian, objectives, schedules, variance
from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.gaussian import recipes
from mdm_jax.objectives import objective as objectives_objective
from mdm_jax.objectives.objective import sum_losses, token_mean
from mdm_jax.schedules import masked
from mdm_jax.testing import toys
from mdm_jax.types import Batch
from mdm_jax.variance.transform import EmptyState

FULL_LAWS = {
    "linear": masked.linear(),
    "cosine_md4": masked.cosine_md4(),
    "cosine_mdlm": masked.cosine_mdlm(),
    "cosine_squared": masked.cosine_squared(),
    "power": masked.power(2.0),
}


@pytest.mark.parametrize("name", slow_except({"cosine_squared"}, FULL_LAWS))
def test_every_full_law_has_the_same_mean(name):
    """Importance weights make the mean loss the bound; 5 standard errors of 20000 draws."""
    objective = objectives.masked_nelbo(
        corruption.fixed_count(toys.MASK_ID), schedules.law_of(FULL_LAWS[name])
    )
    assert objective.bias == "exact"
    count = 20_000
    spec = objective.spec(3, toys.LENGTH)
    keys = jax.random.split(jax.random.key(7), count)

    @jax.jit
    @jax.vmap
    def losses(key):
        draw = variance.draw_batch(key, variance.stratified(), EmptyState(), spec)
        stats = objective.loss(model_fn, toys.toy_batch(), draw)
        return (stats.weight * stats.raw)[0, :, 0]

    values = np.asarray(losses(keys), np.float64)
    error = values.std(0, ddof=1) / count**0.5
    assert np.all(np.abs(values.mean(0) - NELBO) < 5 * error)
    assert np.all(error < 0.05)


def test_bounded_law_is_labelled_truncated():
    law = schedules.law_of(masked.clipped(0.3, 0.8))
    assert objectives.masked_nelbo(corruption.fixed_count(3), law).bias == "truncated"


def test_process_without_mask_is_refused():
    process = corruption.fixed_count(3)._replace(mask_id=None, name="other")
    with pytest.raises(ValueError, match="needs a process with a mask token, not 'other'"):
        objectives.masked_nelbo(process)


def test_levels_that_do_not_divide_are_refused():
    objective = objectives.masked_nelbo(corruption.fixed_count(3), num_levels=3)
    with pytest.raises(ValueError, match="3 noise levels do not divide"):
        objective.spec(2, 4)


def _mixed_batch():
    """A prompt row, a padded row, an empty row and a whole row."""
    tokens = jnp.array([[0, 1, 2, 0], [1, 2, 0, 0], [0, 0, 0, 0], [2, 1, 0, 2]], jnp.int32)
    eligible = jnp.array([[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    documents = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], jnp.int32)
    return Batch(tokens, eligible, documents, jnp.array([2, 2, 0, 4], jnp.int32))


def _draw(spec, seed=0):
    transform = variance.chain(variance.stratified(), variance.mirror())
    draw = tiny.jit(lambda key: variance.draw_batch(key, transform, transform.init(spec), spec))
    return draw(jax.random.key(seed))


def _loss(objective, batch, draw):
    return tiny.jit(lambda: objective.loss(model_fn, batch, draw))()


def test_sums_normalise_by_eligible_tokens_of_the_whole_batch():
    objective = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID))
    draw = _draw(objective.spec(4, 4))
    stats = _loss(objective, _mixed_batch(), draw)
    assert stats.raw.shape == (2, 4, 1)
    np.testing.assert_array_equal(stats.eligible[:, :, 0], [[2, 2, 0, 4]] * 2)
    np.testing.assert_array_equal(stats.raw[:, 2], 0.0)
    sums = sum_losses(draw, stats)
    assert sums.eligible == 8
    by_hand = np.mean(np.sum(stats.weight * stats.raw, axis=(1, 2))) / 8
    np.testing.assert_allclose(token_mean(sums.loss, sums.eligible), by_hand, rtol=1e-6)


def test_segments_are_independent_terms():
    """With S levels the row's loss is the sum of the segments', each with its own weight."""
    objective = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID), num_levels=2)
    spec = objective.spec(3, 4)
    assert spec == DrawSpec(3, 2, (4,))
    stats = _loss(objective, toys.toy_batch(), _draw(spec))
    assert stats.raw.shape == stats.weight.shape == (2, 3, 2)
    assert np.all(stats.targets >= 1)
    np.testing.assert_allclose(stats.weight, 2 / stats.targets, rtol=1e-6)


@pytest.mark.parametrize("levels, expected", [(1, 1.0), (3, 0.75)])
def test_several_levels_per_row_estimate_no_bound(levels, expected):
    """Rows 000 and 111, the ideal network, Bernoulli masks: entropy ln 2, with a level per token
    3/4 of it, by quadrature over levels and enumeration of masks."""
    objective = objectives.masked_nelbo(corruption.bernoulli(2), num_levels=levels)
    assert objective.bias == ("exact" if levels == 1 else "biased")
    nodes, weights = np.polynomial.legendre.leggauss(3)
    grid = np.array(list(itertools.product((nodes + 1) / 2, repeat=levels)))
    mass = np.array(list(itertools.product(weights / 2, repeat=levels))).prod(1)
    rate = np.broadcast_to(1 - grid, (len(grid), levels)).repeat(3 // levels, axis=1)[:, None]
    bits = np.array(list(itertools.product([False, True], repeat=3)))
    law = mass[:, None] * np.where(bits, rate, 1 - rate).prod(-1)
    noise = np.where(bits, rate / 2, (1 + rate) / 2).reshape(1, -1, 3)
    u = np.repeat(grid, len(bits), axis=0)[None]
    rows = u.shape[1]

    def ideal(inputs, *_):
        """Whatever token is visible is everywhere."""
        seen = jnp.stack([jnp.any(inputs == token, axis=-1) for token in (0, 1)], axis=-1)
        return jnp.broadcast_to(jnp.where(seen, 60.0, 0.0)[:, None], (rows, 3, 2))

    draw = Draw(*(jnp.asarray(a, jnp.float32) for a in (u, np.zeros_like(u), noise)))
    ones = jnp.ones((rows, 3), jnp.int32)
    batch = Batch(ones, ones > 0, ones, jnp.full(rows, 3))  # by symmetry one row will do
    stats = tiny.jit(lambda: objective.loss(ideal, batch, draw))()
    loss = np.asarray(stats.weight * stats.raw, np.float64).sum(-1).ravel()
    np.testing.assert_allclose(law.ravel() @ loss, expected * np.log(2), rtol=1e-5)


def test_levels_must_be_positive():
    laws = schedules.law_of(masked.clipped(0.3, 0.8))
    makers = (
        lambda s: objectives.masked_nelbo(corruption.fixed_count(3), laws, num_levels=s),
        lambda s: objectives.uniform_nelbo(3, laws, num_levels=s),
        lambda s: gaussian.gaussian_loss(recipes.vdm(), num_levels=s),
    )
    for make in makers:
        assert (make(1).bias, make(2).bias) == ("truncated", "biased")
        with pytest.raises(ValueError, match="needs num_levels >= 1 noise levels per row, got 0"):
            make(0)
    assert objectives.block_nelbo(corruption.fixed_count(3), 2).bias == "exact"


def test_unscored_positions_carry_no_gradient():
    """The gradient with respect to logits vanishes on prompt, padding and unmasked positions."""
    objective = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID))
    batch, spec = _mixed_batch(), objective.spec(4, 4)
    draw = _draw(spec, seed=2)

    def loss(logits):
        stats = objective.loss(lambda *_: logits, batch, draw)
        return sum_losses(draw, stats).loss

    gradient = np.asarray(tiny.jit(jax.grad(loss))(jnp.zeros((8, 4, 3))))
    touched = np.abs(gradient).sum(-1).reshape(4, 2, 4).sum(1) > 0
    assert not np.any(touched & ~np.asarray(batch.eligible))
    assert np.all(touched[3])  # the two mirrored views cover a whole row at most rates


def test_all_empty_batch_has_zero_loss_and_gradient():
    objective = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID))
    nothing = jnp.zeros((2, 4), jnp.int32)
    batch = Batch(nothing, nothing.astype(bool), nothing, jnp.zeros((2,), jnp.int32))
    draw = _draw(objective.spec(2, 4))

    def loss(params):
        stats = objective.loss(lambda *a: toys.Toy().apply(params, *a), batch, draw)
        sums = sum_losses(draw, stats)
        return token_mean(sums.loss, sums.eligible)

    value, gradient = tiny.jit(jax.value_and_grad(loss))(toys.toy_params())
    assert value == 0
    np.testing.assert_array_equal(gradient["params"]["theta"], 0.0)


def test_all_masked_row_has_weight_one():
    objective = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID))
    u = jnp.full((1, 3, 1), 2.0**-24)  # quantile of the lowest logSNR: everything masked
    draw = Draw(u, jnp.zeros_like(u), jnp.full((1, 3, 4), 0.5))
    stats = _loss(objective, toys.toy_batch(), draw)
    np.testing.assert_array_equal(stats.targets[0, :, 0], [4, 4, 4])
    np.testing.assert_allclose(stats.weight, 1.0, rtol=1e-6)
    np.testing.assert_allclose(stats.raw[0, :, 0], [4.54866716, 4.92656156, 3.91924897], rtol=1e-6)


def test_views_stay_next_to_their_row():
    values = jnp.arange(12).reshape(2, 3, 2)
    flat = objectives_objective.flatten_views(values)
    np.testing.assert_array_equal(flat[:2], [[0, 1], [6, 7]])
    np.testing.assert_array_equal(objectives_objective.unflatten_views(flat, 2), values)
