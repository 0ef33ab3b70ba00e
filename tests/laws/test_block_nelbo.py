"""The block bound: exact values on the toy, its limits, prompts, variance transforms, training."""

import functools
import itertools

import block_toy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from block_toy import BLOCK_MEAN, BLOCK_NELBO, PROBABILITIES
from zoo import quick

from mdm_jax import (
    corruption,
    meter,
    objectives,
    schedules,
    testing,
    training,
    variance,
)
from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.models.decoders import block_apply
from mdm_jax.objectives.losses import block_nelbo
from mdm_jax.schedules import masked
from mdm_jax.testing import toys

SIZES = (1, 2, 4)
SMALLEST = 2.0**-24


def fixed_count(block_size):
    return block_nelbo(corruption.fixed_count(toys.MASK_ID), block_size)


def toy_fn(block_size):
    return functools.partial(block_toy.block_apply(block_size), toys.toy_params())


def enumerated(block_size, batch, objective=None):
    """Mean loss of every row and block over all counts and orders of the fixed-count process.

    The same numbers go to all blocks at once: a block's loss depends on its own alone.
    """
    objective = objective or fixed_count(block_size)
    rows, blocks = len(batch.tokens), toys.LENGTH // block_size
    orders = list(itertools.permutations(range(block_size)))
    draws = list(itertools.product(range(1, block_size + 1), orders))
    u = np.array([1 - (k - 0.5) / block_size for k, _ in draws], np.float32)
    noise = (np.array([order for _, order in draws], np.float32) + 0.5) / block_size

    @quick
    def run():
        count = len(draws)
        each = jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a), count, axis=0), batch)
        draw = Draw(
            u=jnp.tile(jnp.asarray(u)[:, None], (rows, blocks))[None],
            log_weight=jnp.zeros((1, rows * count, blocks)),
            noise=jnp.tile(jnp.asarray(noise), (rows, blocks))[None],
        )
        stats = objective.loss(toy_fn(block_size), each, draw)
        return (stats.weight * stats.raw)[0].reshape(rows, count, blocks)

    return np.asarray(run(), np.float64).mean(1)


@pytest.mark.parametrize("block_size", SIZES)
def test_the_bound_of_the_toy(block_size):
    """Every count and order once, through corruption and objective."""
    values = enumerated(block_size, toys.toy_batch())
    np.testing.assert_allclose(values.sum(1), BLOCK_NELBO[block_size], rtol=1e-6)
    np.testing.assert_allclose(PROBABILITIES @ values.sum(1), BLOCK_MEAN[block_size], rtol=1e-6)


def block_moments(block_size, low, high):
    """Total variance of S_b / (m L') over rows, blocks, m ~ U(low, high) and Bernoulli masks, and
    the part of rates and masks, from the losses and weights that the objective returns."""
    objective = block_nelbo(corruption.bernoulli(toys.MASK_ID), block_size)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    if high > low:
        rate = low * (high / low) ** ((nodes + 1) / 2)
        law = weights / 2 * rate * np.log(high / low) / (high - low)
    else:
        rate, law = np.array([1 - SMALLEST]), np.ones(1)
    bits = (np.arange(2**block_size)[:, None] >> np.arange(block_size)) & 1
    size, blocks = bits.sum(1), toys.LENGTH // block_size
    count = len(rate) * len(bits)

    with jax.enable_x64(True):

        @quick
        def run(rate):
            masked_there = jnp.asarray(bits, bool)[None]
            noise = jnp.where(masked_there, rate[:, None, None] / 2, (1 + rate[:, None, None]) / 2)
            noise = jnp.tile(noise.reshape(count, block_size), (3, blocks))[None]
            u = jnp.tile(jnp.repeat(1 - rate, len(bits))[:, None], (3, blocks))[None]
            batch = jax.tree.map(lambda a: jnp.repeat(a, count, axis=0), toys.toy_batch())
            draw = Draw(u, jnp.zeros_like(u), noise)
            stats = objective.loss(toy_fn(block_size), batch, draw)
            value = stats.weight * stats.raw / stats.eligible
            return value[0].reshape(3, len(rate), len(bits), blocks)

        value = np.asarray(run(jnp.asarray(rate)), np.float64)
    chance = law[:, None] * rate[:, None] ** size * (1 - rate[:, None]) ** (block_size - size)
    first = np.einsum("rm,xrmb->xb", chance, value)
    second = np.einsum("rm,xrmb->xb", chance, value**2)
    masking = PROBABILITIES @ (second - first**2).mean(1)
    mean = PROBABILITIES @ first.mean(1)
    return PROBABILITIES @ second.mean(1) - mean**2, masking


@pytest.mark.parametrize(
    "block_size, interval, total, masking",
    [
        (1, (1e-3, 1.0), 8.37048789, 8.09646241),
        (1, (1.0, 1.0), 0.27402548, 0.0),
        (2, (1e-3, 1.0), 4.41651355, 4.32621354),
        (4, (1e-3, 1.0), 1.99668061, 1.95690366),
    ],
)
def test_variance_of_the_block_losses(block_size, interval, total, masking):
    found = block_moments(block_size, *interval)
    np.testing.assert_allclose(found, (total, masking), rtol=2e-6, atol=1e-6)


def draw_of(objective, rows, seed=0):
    """Two mirrored views of independent uniforms."""
    spec, rng = objective.spec(rows, toys.LENGTH), np.random.default_rng(seed)
    u = np.tile(rng.random((1, rows, spec.num_levels)), (2, 1, 1))
    noise = rng.random((1, rows, *spec.event_shape))
    numbers = (u, np.zeros_like(u), np.concatenate([noise, 1 - noise]))
    return Draw(*(jnp.asarray(a, jnp.float32) for a in numbers))


def loss_of(objective, model_fn, batch, draw):
    return quick(functools.partial(objective.loss, model_fn))(batch, draw)


def test_one_block_is_the_plain_bound():
    """With the same draw, two views, prompt and empty row included."""
    plain = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID))
    block = fixed_count(toys.LENGTH)
    assert block.spec(3, 4) == plain.spec(3, 4)._replace(separate_levels=True)
    eligible = jnp.array([[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
    batch, draw = toys.toy_batch()._replace(eligible=eligible), draw_of(block, 3)
    model_fn = functools.partial(toys.Toy().apply, toys.toy_params())
    first = loss_of(block, toy_fn(toys.LENGTH), batch, draw)
    second = loss_of(plain, model_fn, batch, draw)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), first, second)
    assert np.all(first.raw[:, 2] == 0) and np.all(first.raw[:, :2] > 0)


def test_blocks_count_their_own_eligible_tokens():
    """A block that is partly prompt is a row of its eligible tokens; one of prompt is nothing."""
    eligible = jnp.array([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]], bool)
    batch = toys.toy_batch()._replace(eligible=eligible)
    values = enumerated(2, batch)
    # The last block sees everything before it, as the plain model does with the first half given.
    row = jax.tree.map(lambda a: a[:1], batch)
    model_fn = functools.partial(toys.Toy().apply, toys.toy_params())
    plain = testing.exact_nelbo(model_fn, row, toys.MASK_ID)
    np.testing.assert_allclose(values[0], [0.0, plain[0]], atol=1e-6)
    losses = block_toy.block_losses(2)
    np.testing.assert_allclose(values[1, 0], losses[1, 0, 2], rtol=1e-6)  # the second place alone
    np.testing.assert_array_equal(values[2], 0.0)
    draw = draw_of(fixed_count(2), 3)
    stats = loss_of(fixed_count(2), toy_fn(2), batch, draw)
    assert stats.raw.shape == stats.weight.shape == (2, 3, 2)
    np.testing.assert_array_equal(stats.eligible[0], [[0, 2], [1, 2], [0, 0]])
    np.testing.assert_array_equal(stats.targets[:, 2], 0)
    np.testing.assert_allclose(stats.weight[:, 1, 0], 1.0)


def test_every_block_has_a_level_and_noise_of_its_own():
    """Another level or noise in block 1 changes its loss and no other's."""
    objective = fixed_count(2)
    draw = draw_of(objective, 3, seed=1)
    run = quick(functools.partial(objective.loss, toy_fn(2), toys.toy_batch()))
    loss = lambda d: np.asarray(run(d).raw)  # noqa: E731
    before = loss(draw)
    flipped = draw._replace(u=draw.u.at[..., 1].set(1 - draw.u[..., 1]))
    turned = draw._replace(noise=draw.noise.at[..., 2:].set(1 - draw.noise[..., 2:]))
    for other in (flipped, turned):
        np.testing.assert_array_equal(loss(other)[..., 0], before[..., 0])
        assert np.any(loss(other)[..., 1] != before[..., 1])


def test_a_bounded_law_is_labelled_truncated():
    law = schedules.law_of(masked.clipped(0.3, 0.8))
    process = corruption.fixed_count(3)
    assert block_nelbo(process, 2, law).bias == "truncated"
    assert block_nelbo(process, 2).bias == "exact"
    assert block_nelbo(process, 2).name == "block_nelbo"


def test_what_makes_no_blocks_is_refused():
    with pytest.raises(ValueError, match="block_size of at least 1, got 0"):
        fixed_count(0)
    with pytest.raises(ValueError, match="blocks of 3 tokens do not divide a row of 4 evenly"):
        fixed_count(3).spec(2, 4)
    with pytest.raises(ValueError, match="needs a process with a mask token"):
        block_nelbo(corruption.fixed_count(3)._replace(mask_id=None), 2)
    wrong = draw_of(fixed_count(4), 3)
    with pytest.raises(ValueError, match="2 blocks of 2 tokens need a noise level each.* has 1"):
        fixed_count(2).loss(toy_fn(2), toys.toy_batch(), wrong)


# --- variance transforms ------------------------------------------------------------------------


def test_stratified_levels_cover_every_block_of_the_batch():
    """Each block takes every cell of width 1/B once over the rows, and the levels of one row are
    independent: their correlation vanishes and their range is that of independent uniforms.

    4 blocks, 16 rows, 500 batches; 5 standard errors.
    """
    objective, rows, batches = fixed_count(1), 16, 500
    spec = objective.spec(rows, toys.LENGTH)
    assert spec == DrawSpec(rows, 4, (4,), separate_levels=True)
    chain = variance.stratified()
    keys = jax.random.split(jax.random.key(0), batches)
    u = quick(jax.vmap(lambda key: variance.draw_batch(key, chain, (), spec).u[0]))(keys)
    u = np.asarray(u, np.float64)
    cells = np.sort((u * rows).astype(int), axis=1)
    assert (cells == np.arange(rows)[None, :, None]).all()
    deviation = (u - 0.5) * 12**0.5
    for a, b in itertools.combinations(range(4), 2):
        product = (deviation[..., a] * deviation[..., b]).mean(1)  # of independent permutations
        assert abs(product.mean()) < 5 * product.std() / batches**0.5
    spread = (u.max(-1) - u.min(-1)).mean(1)
    assert abs(spread.mean() - 3 / 5) < 5 * spread.std() / batches**0.5


@pytest.mark.parametrize(
    "transform",
    [
        *(
            pytest.param(chain, marks=pytest.mark.slow)
            for chain in (
                variance.chain(variance.stratified(), variance.mirror()),
                variance.chain(variance.complement(), variance.rotate_ranks(2)),
            )
        ),
        pytest.param(
            variance.chain(variance.stratified_levels(2), variance.clipped_mixture(0.3, 0.8, 0.3)),
            marks=pytest.mark.slow,
        ),
        variance.chain(
            variance.stratified_blocks(),
            variance.clipped_mixture(0.3, 0.8, 0.3),
            variance.mirror(),
        ),
    ],
    ids=lambda chain: "-".join(member.name for member in chain.members),
)
def test_transforms_keep_the_bound(transform):
    """2000 batches of three rows in blocks of two; 5 standard errors per row."""
    objective, batches = fixed_count(2), 2000
    spec = objective.spec(3, toys.LENGTH)
    state = transform.init(spec)

    @quick
    @jax.vmap
    def losses(key):
        draw = variance.draw_batch(key, transform, state, spec)
        stats = objective.loss(toy_fn(2), toys.toy_batch(), draw)
        return jnp.mean(jnp.exp(draw.log_weight) * stats.weight * stats.raw, axis=0).sum(-1)

    values = np.asarray(losses(jax.random.split(jax.random.key(3), batches)), np.float64)
    error = values.std(0, ddof=1) / batches**0.5
    # The views of complement and rotate_ranks cover blocks of two so well that nothing is left.
    assert np.all(np.abs(values.mean(0) - BLOCK_NELBO[2]) < 5 * error + 1e-6)
    assert np.all(error < 0.1)


# --- clipped ranges -----------------------------------------------------------------------------

UPPER_HALF = (0.5, 1.0)


@functools.cache
def batches(count=3, rows=1000):
    rng = np.random.default_rng(0)
    picks = [rng.choice(3, rows, p=PROBABILITIES) for _ in range(count)]
    return tuple(jax.tree.map(lambda a, p=p: np.asarray(a)[p], toys.toy_batch()) for p in picks)


@pytest.mark.parametrize(
    "block_size, criterion, intervals, best",
    [
        pytest.param(1, "raw_variance", None, (0.999, 1.0), marks=pytest.mark.slow),
        (2, "relative_variance", ((1e-3, 1.0), (0.3, 0.8), UPPER_HALF), UPPER_HALF),
        pytest.param(
            *(4, "gradient_noise_to_signal", ((1e-3, 1.0), UPPER_HALF), UPPER_HALF),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_clip_search_takes_the_objective(block_size, criterion, intervals, best):
    """The exact moments of the objective and the search on samples of it agree."""
    objective = block_nelbo(corruption.bernoulli(toys.MASK_ID), block_size)
    apply_fn = block_toy.block_apply(block_size)
    criterion = getattr(meter, criterion)
    find = meter.make_clip_search(
        apply_fn, objective, (1000, 4), criterion=criterion, intervals=intervals
    )
    choice = find(toys.toy_params(), batches(), jax.random.key(0))
    assert choice.block_size == block_size
    assert (choice.low, choice.high) == best
    if criterion is meter.raw_variance:
        np.testing.assert_allclose(choice.scores[1], 0.27402548, rtol=0.1)


# --- training -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plain_model_goes_on_as_a_block_model():
    """The train step runs on a plain model's parameters and lowers the block loss."""
    model = tiny.transformer()
    params = tiny.parameters(model, tiny.LENGTH)
    objective = block_nelbo(corruption.fixed_count(tiny.MASK_ID), 2)
    spec, chain = objective.spec(8, tiny.LENGTH), tiny.transform()
    optimizer = optax.adam(3e-2)
    step = tiny.jit(
        training.make_train_step(block_apply(model, 2), objective, chain, optimizer, spec, seed=0)
    )
    state = training.new_state(params, optimizer, chain, spec)
    losses = []
    for _ in range(12):
        state, metrics = step(state, tiny.batch(8))
        assert metrics.skipped == 0
        losses.append(float(metrics.loss))
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
