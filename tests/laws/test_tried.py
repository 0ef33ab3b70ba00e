"""Prototypes of methods that were left out, on the enumerated toy, before they are measured."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tried import genmd4, mirror_plus, progressive, storm
from mdm_jax import corruption, objectives, testing
from mdm_jax.draws import Draw
from mdm_jax.testing import toys
from mdm_jax.testing.enumeration import mask_bits
from mdm_jax.types import Batch

EXPONENTS = jnp.array([0.6, 1.0, 2.5])
NODES, WEIGHTS = np.polynomial.legendre.leggauss(48)
U, SHARE = jnp.asarray((NODES + 1) / 2, jnp.float32), jnp.asarray(WEIGHTS / 2, jnp.float32)
MASKS = mask_bits(toys.LENGTH)
MODEL, PARAMS = toys.Toy(), toys.toy_params()


@pytest.fixture(autouse=True)
def promoted():
    """The prototypes are written as scripts are."""
    with jax.numpy_rank_promotion("allow"):
        yield


def enumerated(params, exponents):
    """(losses, log-probabilities) of all masks at all nodes, [masks, nodes], of the second row."""
    tokens = jnp.asarray(toys.ROWS[1])
    inputs = jnp.where(MASKS, toys.MASK_ID, tokens)
    logits = MODEL.apply(params, inputs)[:, None]
    shape = (len(MASKS), len(U), toys.LENGTH)
    mask = jnp.broadcast_to(MASKS[:, None], shape)
    tokens = jnp.broadcast_to(tokens, shape)
    log_t = jnp.broadcast_to(genmd4.POWER * jnp.log(U), shape[:2])
    logits = jnp.broadcast_to(logits, (*shape, logits.shape[-1]))
    value = genmd4.integrand(logits, tokens, mask, exponents, log_t)
    density = genmd4.POWER * jnp.power(U, genmd4.POWER - 1)
    every = jnp.ones(shape, bool)
    return value * density, genmd4.log_mask_probability(mask, tokens, every, exponents, log_t)


def bound(params, exponents):
    losses, log_probability = enumerated(params, exponents)
    return jnp.sum(SHARE * jnp.sum(jnp.exp(log_probability) * losses, axis=0))


def expected_gradient(pairs):
    """Of the surrogate over pairs of masks, given their joint law [masks, masks, nodes]."""

    def surrogate(params, exponents):
        losses, log_probability = enumerated(params, exponents)
        count = len(MASKS)
        first, second = np.divmod(np.arange(count**2), count)
        value = genmd4.with_baselines(
            jnp.stack([losses[first], losses[second]]),
            jnp.stack([log_probability[first], log_probability[second]]),
        )
        law = pairs.reshape(count**2, -1)
        return jnp.sum(SHARE * jnp.sum(law * jnp.mean(value, axis=0), axis=0))

    return jax.grad(surrogate, argnums=(0, 1))(PARAMS, EXPONENTS)


def test_equal_exponents_give_the_masked_bound():
    exact = testing.exact_nelbo(
        functools.partial(MODEL.apply, PARAMS), toys.toy_batch(), toys.MASK_ID
    )
    for exponent in (1.0, 1.7):
        np.testing.assert_allclose(bound(PARAMS, jnp.full(3, exponent)), exact[1], rtol=1e-5)
    assert abs(bound(PARAMS, EXPONENTS) - exact[1]) > 1e-2


def test_of_one_token_the_bound_has_a_closed_form():
    """Revealed as v with probability w_v p_v / S: the bound is above -log of that by a gap."""
    logits = jnp.array([0.3, -1.0, 0.8])
    p = jax.nn.softmax(logits)
    total = jnp.sum(EXPONENTS * p)
    for token in range(3):
        ids = jnp.full((len(U), 1), token)
        log_t = genmd4.POWER * jnp.log(U)
        shown = jnp.broadcast_to(logits, (len(U), 1, 3))
        value = genmd4.integrand(shown, ids, ids >= 0, EXPONENTS, log_t)
        rate = jnp.exp(EXPONENTS[token] * log_t)
        found = jnp.sum(SHARE * rate * value * genmd4.POWER * jnp.power(U, genmd4.POWER - 1))
        ratio = total / EXPONENTS[token]
        exact = -jnp.log(p[token]) + jnp.log(ratio)
        np.testing.assert_allclose(found, exact + ratio - 1 - jnp.log(ratio), rtol=1e-4)


def test_leave_one_out_is_unbiased_for_independent_masks_and_biased_for_opposite_ones():
    exact = jax.grad(bound, argnums=(0, 1))(PARAMS, EXPONENTS)
    law = jnp.exp(enumerated(PARAMS, EXPONENTS)[1])
    found = expected_gradient(law[:, None] * law[None])
    for one, other in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    # MIRROR: masked in one view below the rate, in the other above 1 - rate.
    tokens = np.asarray(toys.ROWS[1])
    rate = np.exp(np.asarray(EXPONENTS)[tokens] * genmd4.POWER * np.log(np.asarray(U))[:, None])
    both = np.maximum(0.0, 2 * rate - 1)
    joint = np.ones((len(MASKS), len(MASKS), len(U)))
    for i, j in itertools.product(range(len(MASKS)), repeat=2):
        for position in range(toys.LENGTH):
            masked = MASKS[i, position], MASKS[j, position]
            own = {2: both, 1: rate - both, 0: 1 - 2 * rate + both}[sum(masked)]
            joint[i, j] *= own[:, position]
    np.testing.assert_allclose(joint.sum(1), law, atol=1e-5)
    mirrored = expected_gradient(jnp.asarray(joint, jnp.float32))
    np.testing.assert_allclose(
        mirrored[0]["params"]["theta"], exact[0]["params"]["theta"], atol=2e-5
    )
    assert np.abs(mirrored[1] - exact[1]).max() > 0.02


def test_storm_is_unbiased_at_parameters_that_are_given():
    """Over all sequences of examples, along two steps; of the gradient of a quadratic form."""
    slopes, offsets = np.array([0.5, 1.0, 3.0]), np.array([-1.0, 0.4, 0.1])
    transform, variances = storm.storm(0.3), {}
    for path in ((0.72, 0.71, 0.7), (2.0, 1.1, 0.7)):
        estimates = []
        for examples in itertools.product(range(3), repeat=len(path)):
            state, before = transform.init(jnp.zeros(())), path[0]
            for at, k in zip(path, examples):
                now, last = (jnp.asarray(slopes[k] * (x - offsets[k])) for x in (at, before))
                estimate, state = transform.update(now, state, previous=last)
                before = at
            estimates.append(float(estimate))
        exact = np.mean(slopes * (path[-1] - offsets))
        assert np.mean(estimates) == pytest.approx(exact, abs=1e-6)
        variances[path[0]] = np.var(estimates)
    single = np.var(slopes * (0.7 - offsets))
    assert variances[0.72] < 0.6 * single < single < variances[2.0]  # it lives on short steps
    # With decay 1 it is the gradient alone.
    plain = storm.storm(1.0)
    state = plain.init(jnp.zeros(()))
    for value in (3.0, -2.0):
        estimate, state = plain.update(jnp.asarray(value), state, previous=jnp.asarray(9.0))
        assert float(estimate) == value


def test_mirror_plus_is_exact_whichever_rows_get_a_second_view():
    """Over all orders of the noise, at all rates of two rows, of which one gets it."""
    objective = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID))
    batch = jax.tree.map(lambda field: field[:2], toys.toy_batch())
    orders = np.array(list(itertools.permutations(range(toys.LENGTH))))
    noise = jnp.asarray((orders + 0.5) / toys.LENGTH, jnp.float32)
    model_fn = functools.partial(MODEL.apply, PARAMS)
    exact = [
        testing.count_losses(
            testing.mask_losses(model_fn, jax.tree.map(lambda a, i=i: a[i], batch), toys.MASK_ID)
        )
        for i in range(2)
    ]

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def losses(u, own):
        draw = Draw(u, jnp.zeros_like(u), jnp.broadcast_to(own, (1, 2, toys.LENGTH)))
        stats = mirror_plus.mirror_plus(objective).loss(model_fn, batch, draw)
        return (stats.weight * stats.raw)[0, :, 0]

    spread = {}
    for cells in itertools.product(range(toys.LENGTH), repeat=2):
        u = (jnp.asarray(cells, jnp.float32)[None, :, None] + 0.5) / toys.LENGTH
        found = np.asarray(losses(u, noise))
        count = [toys.LENGTH - cell for cell in cells]  # masked; the rate falls with u
        wanted = [toys.LENGTH / k * exact[row][k] for row, k in enumerate(count)]
        np.testing.assert_allclose(found.mean(0), wanted, rtol=1e-5)
        spread[cells] = found.var(0)
    # Beside a row with a higher rate there are two views of the first one, hence less variance.
    assert spread[2, 1][0] < 0.7 * spread[2, 3][0]


def test_progressive_masks_reveal_the_surest_places_and_let_rows_through_in_turn():
    stages, length = 4, 16
    tokens = jnp.arange(8 * length, dtype=jnp.int32).reshape(8, length) % 5
    eligible = jnp.arange(length)[None] >= jnp.array([0, 4] * 4)[:, None]  # with prompts, too
    rows = Batch(tokens, eligible, jnp.ones_like(tokens), jnp.full(8, length))
    pool = progressive.start(jax.random.key(0), rows, stages)
    fresh = jax.tree.map(lambda leaf: leaf[:2] + (leaf.dtype == jnp.int32), rows)
    seen = jnp.zeros(8, int)
    for number in range(8):
        own, other = jax.random.split(jax.random.key(1 + number))
        logits = 3 * jax.random.normal(own, (8, length, 5))
        after = progressive.advance(other, pool, logits, fresh, stages)
        stayed = after.stage > 0
        assert int(stayed.sum()) == 6  # the two rows that were through are others now
        assert sorted(np.asarray(after.stage).tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
        count = after.rows.eligible.sum(-1)
        shown = (after.rows.eligible & ~after.masked).sum(-1)
        low, high = after.stage * count / stages, (after.stage + 1) * count / stages
        assert bool(((shown >= jnp.floor(low)) & (shown <= jnp.ceil(high))).all())
        assert bool((shown < count).all()) and not bool((after.masked & ~after.rows.eligible).any())
        sure = jax.nn.softmax(logits).max(-1)
        for row in np.flatnonzero(stayed):
            np.testing.assert_array_equal(after.rows.tokens[row], pool.rows.tokens[row])
            now = np.asarray(pool.masked[row] & ~after.masked[row])
            left = np.asarray(after.masked[row])
            assert not np.any(left & ~np.asarray(pool.masked[row]))  # never masked again
            if now.any() and left.any():
                assert sure[row][now].min() >= sure[row][left].max()
        seen, pool = seen + ~stayed, after
    np.testing.assert_array_equal(seen, 2)  # in eight steps of four stages every slot twice
    with pytest.raises(ValueError, match="do not divide"):
        progressive.start(jax.random.key(9), rows, 3)


def test_the_first_pool_and_the_fresh_rows_are_different_rows():
    batches = iter(np.arange(20).reshape(10, 2))
    np.testing.assert_array_equal(progressive.first_rows(batches, 4), np.arange(8))
    np.testing.assert_array_equal(next(batches), [8, 9])
