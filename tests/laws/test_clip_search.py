"""The search for a range of masking rates, on the toy cut into blocks of two."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import zoo
from test_corruption import PROBABILITIES

from mdm_jax import corruption, meter, objectives, schedules, variance
from mdm_jax.meter import clip_search
from mdm_jax.schedules import masked
from mdm_jax.testing import toys
from mdm_jax.types import Batch
from mdm_jax.variance.warps import set_clip_range

RANGES = ((1e-3, 1.0), (0.3, 0.8), (0.5, 1.0))
RAW = (4.41651355, 0.82392319, 0.37160791)
RELATIVE = (3.95405355, 0.73186669, 0.31985750)


def block_apply(block_size, params, inputs, logsnr, clean):
    """Block toy: block b sees itself and the clean blocks before it. ``clean`` are the tokens,
    which the tests pass where documents usually go."""
    del logsnr
    block = np.arange(toys.LENGTH) // block_size
    logits = []
    for b in range(toys.LENGTH // block_size):
        seen = jnp.where(block < b, clean, jnp.where(block == b, inputs, toys.MASK_ID))
        logits.append(toys.Toy().apply(params, seen)[:, b * block_size : (b + 1) * block_size])
    return jnp.concatenate(logits, axis=1)


@functools.cache
def block_losses(block_size):
    """S_b(x, M_b) and its gradient for every block, row and mask of the block."""
    bits = ((np.arange(2**block_size)[:, None] >> np.arange(block_size)) & 1).astype(bool)
    tokens = np.array(toys.ROWS)
    whole = np.tile(bits, toys.LENGTH // block_size)  # the same mask in every block
    clean = jnp.asarray(np.repeat(tokens, len(bits), axis=0))
    inputs = np.where(whole, toys.MASK_ID, tokens[:, None]).reshape(-1, toys.LENGTH)

    def losses(params):
        logits = block_apply(block_size, params, jnp.asarray(inputs), None, clean)
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, clean)
        kept = jnp.where(np.tile(whole, (3, 1)), nats, 0.0)
        return kept.reshape(3, len(bits), -1, block_size).sum(-1)

    both = zoo.quick(lambda params: (losses(params), jax.jacrev(losses)(params)))
    value, gradient = both(toys.toy_params())
    gradient = np.asarray(gradient["params"]["theta"], np.float64)
    return np.asarray(value, np.float64), gradient, bits.sum(1)


def exact_moments(values, size, interval):
    """Mean and variance of S_b / (m L') over rows, blocks, m ~ U(interval) and Bernoulli masks.

    values [3, masks, blocks, parameters]; moments over the last axis are summed.
    """
    low, high = interval
    length = int(size.max())
    nodes, weights = np.polynomial.legendre.leggauss(60)
    rate = low * (high / low) ** ((nodes + 1) / 2)
    law = weights / 2 * rate * np.log(high / low) / (high - low) if high > low else weights / 2
    pattern = rate[:, None] ** size * (1 - rate[:, None]) ** (length - size)
    scaled = values / length
    first = np.einsum("r,rm,xmbp->xbp", law / rate, pattern, scaled)
    second = np.einsum("r,rm,xmbp->xb", law / rate**2, pattern, scaled**2)
    mean = (PROBABILITIES @ first.mean(1)) if values.shape[-1] == 1 else None
    mean = np.tensordot(PROBABILITIES, first.mean(1), 1)
    return mean, PROBABILITIES @ second.mean(1) - np.sum(mean**2)


@pytest.mark.parametrize("number", range(3))
def test_block_toy_has_the_published_scores(number):
    values, _, size = block_losses(2)
    mean, spread = exact_moments(values[..., None], size, RANGES[number])
    np.testing.assert_allclose(spread, RAW[number], rtol=3e-6)
    np.testing.assert_allclose(spread / mean[0] ** 2, RELATIVE[number], rtol=3e-6)


def test_all_criteria_prefer_the_upper_half_on_the_exact_toy():
    values, gradients, size = block_losses(2)
    intervals = meter.candidate_intervals(2)
    scores = []
    for interval in intervals:
        mean, spread = exact_moments(values[..., None], size, interval)
        slope, noise = exact_moments(gradients, size, interval)
        scores.append((spread, spread / mean[0] ** 2, noise / np.sum(slope**2)))
    for column in np.array(scores).T:
        assert intervals[int(np.argmin(column))] == (0.5, 1.0)


def blocks_objective(process="bernoulli", num_levels=2, law=None):
    return objectives.masked_nelbo(
        getattr(corruption, process)(toys.MASK_ID), law, num_levels=num_levels
    )


@functools.cache
def batches(count=4, rows=1500):
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        pick = rng.choice(3, rows, p=PROBABILITIES)
        batch = Batch(*(np.asarray(field)[pick] for field in toys.toy_batch()))
        found.append(batch._replace(documents=batch.tokens))  # see block_apply
    return tuple(found)


def search(objective=None, given=None, step=0, progress=None, block_size=2, **options):
    given = given or batches()
    find = meter.make_clip_search(
        functools.partial(block_apply, block_size),
        objective or blocks_objective(),
        given[0].tokens.shape,
        **options,
    )
    return find(toys.toy_params(), given, jax.random.key(0), step=step, progress=progress)


def test_loss_moments_of_the_implementation_match_the_exact_ones():
    """Within 5 standard errors over 4 batches of 1500 rows, and a bound on these."""
    objective = blocks_objective()
    measure = clip_search.block_loss_moments(
        functools.partial(block_apply, 2), objective, objective.spec(1500, 4)
    )
    moments = measure(toys.toy_params(), batches(), jax.random.key(1), RANGES[1:])
    error = np.maximum(moments.standard_error, 0.01 * np.array(RAW[1:]))
    assert np.all(np.abs(moments.variance - RAW[1:]) < 5 * error)
    assert np.all(moments.standard_error < 0.1 * np.array(RAW[1:]))
    np.testing.assert_allclose(moments.variance / moments.mean**2, RELATIVE[1:], rtol=0.15)


@pytest.mark.parametrize(
    "criterion, exact", [("raw_variance", RAW), ("relative_variance", RELATIVE)]
)
def test_search_by_loss_finds_the_upper_half(criterion, exact):
    done = []
    choice = search(criterion=getattr(meter, criterion), progress=done.append, step=7)
    assert (choice.low, choice.high) == (0.5, 1.0)
    assert choice.criterion == criterion
    assert (choice.block_size, choice.step, len(choice.scores)) == (2, 7, 36)
    assert sum(done) == 4
    for interval, score in zip(RANGES[1:], exact[1:]):
        found = choice.scores[choice.intervals.index(interval)]
        np.testing.assert_allclose(found, score, rtol=0.06)  # raw and relative differ by 14%
    assert min(choice.scores) == choice.scores[choice.intervals.index((0.5, 1.0))]


def test_search_by_gradient_prefers_the_upper_half():
    """Among the two that the exact toy puts far apart; few batches tell neighbours not apart."""
    many = tuple(
        jax.tree.map(lambda f, i=i: f[i * 40 : i * 40 + 40], batches()[0]) for i in range(30)
    )
    choice = search(given=many, intervals=((1e-3, 1.0), (0.5, 1.0)))
    assert choice.criterion == "gradient_noise_to_signal"
    assert (choice.low, choice.high) == (0.5, 1.0)
    _, gradients, size = block_losses(2)
    slope, noise = exact_moments(gradients, size, (0.5, 1.0))
    # Of one batch of 80 blocks, all of them independent but for the row that two of them share;
    # 30 batches of three parameters leave an error of about 15%.
    np.testing.assert_allclose(choice.scores[1], noise / np.sum(slope**2) / 80, rtol=0.5)


def test_choice_survives_a_checkpoint():
    choice = search(criterion=meter.raw_variance, intervals=RANGES)
    restored = meter.ClipChoice.from_dict(json.loads(json.dumps(choice.to_dict())))
    assert restored == choice
    clipped = variance.clipped(choice.low, choice.high)
    assert clipped.bias == "truncated"
    with pytest.raises(ValueError, match="has the fields low, high"):
        meter.ClipChoice.from_dict({"low": 0.5})


def test_feasibility_of_block_size_and_range():
    assert list(clip_search.reachable_counts(10, 0.3, 0.5)) == [3, 4, 5]
    assert list(clip_search.reachable_counts(2, 1e-3, 0.5)) == [1]
    for size in (1, 2, 4, 16):
        for low, high in meter.candidate_intervals(size):
            meter.check_feasible(size, low, high)
    with pytest.raises(ValueError, match=r"out of 4 has a fraction in \[0.3, 0.45\]"):
        meter.check_feasible(4, 0.3, 0.45)
    for low, high in ((0.8, 0.3), (1.0, 1.0)):
        with pytest.raises(ValueError, match="needs 0 <= low < high <= 1"):
            meter.check_feasible(4, low, high)
    with pytest.raises(ValueError, match="fraction in"):
        search(intervals=((0.6, 0.9),))


def test_blocks_of_one_token_choose_the_autoregressive_loss():
    """Near rate 1 hardly any masking variance is left; the bound of single tokens is exact. What is
    chosen can be trained on."""
    objective = blocks_objective(num_levels=4)
    choice = search(objective, batches(2, 600), block_size=1, criterion=meter.raw_variance)
    assert (choice.low, choice.high) == (0.999, 1.0)
    # Per-block variance 0.27402548 at rate 1, of which nothing comes from masks.
    np.testing.assert_allclose(choice.scores[1], 0.27402548, rtol=0.05)


def test_searches_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="at least 2 batches"):
        search(given=batches()[:1])
    law = schedules.law_of(masked.cosine_md4())
    with pytest.raises(ValueError, match="uniform law"):
        search(objective=blocks_objective(law=law))
    empty = tuple(b._replace(eligible=np.zeros_like(b.eligible)) for b in batches())
    with pytest.raises(ValueError, match="0 blocks with eligible"):
        search(given=empty, criterion=meter.raw_variance)


def test_a_search_compiles_once_and_moves_the_range_in_the_state():
    """As the trainer uses it: the step keeps its shapes, the state its structure."""
    calls = []

    def apply(params, *inputs):
        calls.append(1)
        return block_apply(2, params, *inputs)

    find = meter.make_clip_search(
        apply, blocks_objective(), (1500, 4), criterion=meter.relative_variance
    )
    few = batches()[:2]
    choice = find(toys.toy_params(), few, jax.random.key(0), step=3)
    traced = len(calls)
    find(jax.tree.map(lambda leaf: leaf + 0.1, toys.toy_params()), few, jax.random.key(1))
    assert len(calls) == traced
    chain = variance.chain(variance.stratified(), variance.clipped_adaptive())
    spec = blocks_objective().spec(8, 4)
    before = chain.init(spec)
    after = set_clip_range(before, choice.low, choice.high)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    draw = jax.jit(lambda state: variance.draw_batch(jax.random.key(2), chain, state, spec))
    rates = 1 - draw(after).u
    assert choice.low - 1e-6 <= rates.min() and rates.max() <= choice.high + 1e-6
    np.testing.assert_allclose(draw(after).log_weight, np.log(choice.high - choice.low), rtol=1e-6)
    assert draw._cache_size() == 1
