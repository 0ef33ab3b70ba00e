"""Properties of scores and losses that have no number: shared noise, ties, shifts, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo

from mdm_jax import alignment, corruption, models, objectives, variance
from mdm_jax.draws import Draw
from mdm_jax.testing import toys
from mdm_jax.types import Batch

MODEL, PARAMS, ROWS = toys.Toy(), toys.toy_params(), toys.toy_batch()
OBJECTIVE = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID))


def bound(*transforms, **options):
    return alignment.sequence_bound(OBJECTIVE, variance.chain(*transforms), **options)


def draw_of(made, transform, rows=3, keys=None):
    spec = OBJECTIVE.spec(rows, toys.LENGTH)
    return made.draw(jax.random.key(3), transform.init(spec), spec, keys)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*zoo.SINGLES, *zoo.CHAINS])
def test_equal_parameters_have_equal_scores(name):
    """At the reference's own parameters margins are 0 and ratios 1, bit for bit."""
    transform = {**zoo.SINGLES, **zoo.CHAINS}[name]()
    made = alignment.sequence_bound(OBJECTIVE, transform, replicates=2, allow_biased=True)

    @jax.jit
    def score(params, reference):
        draw = draw_of(made, transform)
        return alignment.paired_elbo(made, MODEL.apply, params, reference, ROWS, draw)

    pair = score(PARAMS, PARAMS)
    assert pair.policy.shape == (2 * transform.views, 3) and np.all(np.isfinite(pair.policy))
    np.testing.assert_array_equal(pair.policy, pair.reference)
    one, wide = alignment.per_token(0.0), alignment.per_token(0.0)
    new, old = (jnp.mean(values, axis=0) for values in pair[:2])
    losses = alignment.sequence_grpo(new, old, jnp.ones(3), pair.count, one, wide)
    np.testing.assert_array_equal(losses, -1)


@pytest.mark.slow
def test_scores_go_with_the_example():
    """With keys by example a row's score depends on no other row, nor on its place."""
    keys = np.arange(24, dtype=np.uint32).reshape(3, 4, 2)
    made, transform = bound(), variance.chain()
    model_fn = functools.partial(MODEL.apply, PARAMS)

    @jax.jit
    def score(rows, keys):
        return made.values(model_fn, rows, draw_of(made, transform, len(keys), keys))

    whole = score(ROWS, keys)
    for order in ([2, 0, 1], [1]):
        own = jax.tree.map(lambda a: a[np.array(order)], ROWS)  # noqa: B023
        np.testing.assert_array_equal(score(own, keys[order]), whole[:, np.array(order)])


@pytest.mark.slow
def test_replicates_are_independent_draws_of_the_chain():
    transform = variance.chain(variance.mirror())
    draw = jax.jit(lambda: draw_of(bound(variance.mirror(), replicates=3), transform))()
    u = np.asarray(draw.u[:, :, 0])
    assert u.shape == (6, 3)
    np.testing.assert_array_equal(u[::2], u[1::2])  # MIRROR's pairs stay together
    np.testing.assert_allclose(draw.noise[::2], 1 - draw.noise[1::2])
    assert len(np.unique(u[::2])) == 9
    values = np.arange(18.0).reshape(6, 3)
    np.testing.assert_allclose(alignment.replicate_means(values, 3)[0], [1.5, 2.5, 3.5])
    with pytest.raises(ValueError, match="6 views are no 4 replicates"):
        alignment.replicate_means(values, 4)


def test_what_is_no_bound_is_refused():
    for transform in (variance.clipped(0.3, 0.8), variance.uncertainty_weighting()):
        with pytest.raises(ValueError, match="no bounds of the likelihood.*allow_biased"):
            alignment.sequence_bound(OBJECTIVE, transform)
        assert alignment.sequence_bound(OBJECTIVE, transform, allow_biased=True).bias != "exact"
    with pytest.raises(ValueError, match="replicates must be at least 1, got 0"):
        bound(replicates=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        alignment.at_temperature(MODEL.apply, 0.0)


def test_a_temperature_divides_logits_and_readouts():
    def apply(_, inputs, *rest):
        features = jax.nn.one_hot(inputs, 4)
        projection = models.cross_entropy.Projection(tied=True, dtype=jnp.float32)
        weights = jnp.arange(12.0).reshape(3, 4)
        return models.Readout(features, weights, projection, bias=jnp.arange(3.0))

    inputs = jnp.array([[0, 1, 2, 3]])
    whole = apply(None, inputs).logits()
    np.testing.assert_allclose(
        alignment.at_temperature(apply, 0.5)(None, inputs).logits(), 2 * whole
    )
    logits = lambda *a: apply(*a).logits()  # noqa: E731
    np.testing.assert_allclose(alignment.at_temperature(logits, 2.0)(None, inputs), whole / 2)
    assert alignment.at_temperature(logits, 1.0) is logits


def test_a_shift_by_one_token_is_noticed():
    """Outputs for token i at i - 1 score right behind ``shifted_apply`` and nowhere else."""
    tokens = np.array([[0, 1, 2, 1, 0]])
    rows = Batch(tokens, np.arange(5)[None] > 0, np.ones((1, 5), np.int32), np.full(1, 4))
    right = 9.0 * jax.nn.one_hot(tokens, 3)
    early = jnp.concatenate([right[:, 1:], right[:, :1]], axis=1)
    draw = Draw(jnp.full((1, 1, 1), 0.9), 0, jnp.full((1, 1, 5), 0.5))
    fixed = lambda logits: lambda _, inputs, *rest: jnp.broadcast_to(logits, (len(inputs), 5, 3))  # noqa: E731
    for apply, near in (
        (fixed(right), True),
        (fixed(early), False),
        (models.shifted_apply(fixed(early)), True),
    ):
        score = functools.partial(alignment.surrogate_values, functools.partial(apply, None))
        value = jax.jit(lambda: score(rows, draw, alignment.fixed_counts, 3))()[0, 0]  # noqa: B023
        assert (value > -0.01) == near and (near or value < -20)


def test_ties_have_the_gradient_of_the_ratio():
    @jax.jit
    def both(ratio, advantage, low, high):
        loss = lambda r: alignment.clipped(r, advantage, low, high)  # noqa: E731
        return loss(ratio), jax.grad(lambda r: jnp.sum(loss(r)))(ratio)

    ratio, advantage = np.array([1.3, 1.3, 0.7, 0.7]), np.array([1.0, -1, 1, -1])
    for low, high in ((0.2, 0.2), (0.0, 0.0)):
        np.testing.assert_array_equal(both(np.ones(4), advantage, low, high)[1], advantage)
    value, slope = both(ratio, advantage, 0.2, 0.1)
    expected = np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.1) * advantage)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(slope, [0, -1, 1, 0])


def test_finite_differences_of_every_policy_loss():
    """Away from ties and ends of clips, in float64."""
    random = np.random.default_rng(0)
    scores, other, factor = random.normal(size=(3, 2, 3))
    ones, low = np.ones((2, 3)), alignment.per_token(0.2)
    counts = np.array([[2, 3, 4], [5, 1, 2]])
    losses = {
        "policy_gradient": lambda s: alignment.policy_gradient(s, factor),
        "sequence_grpo": lambda s: alignment.sequence_grpo(s, other, factor, counts, low, low),
        "token_grpo": lambda s: alignment.token_grpo(s, other, factor[:, 0], ones > 0, low, low),
        "spg": lambda s: alignment.spg(s, 0.3 * s**2, factor, 0.4),
        "weighted_likelihood": lambda s: alignment.weighted_likelihood(s, factor, ones),
        "rejection": lambda s: alignment.rejection(s, factor > np.median(factor)),
        "kl_k1": lambda s: alignment.kl_k1(s, other),
        "kl_k2": lambda s: alignment.kl_k2(s, other),
        "kl_k3": lambda s: alignment.kl_k3(s, other),
    }
    with jax.enable_x64(True):

        @jax.jit
        def evaluate(s):
            steps = 1e-6 * jnp.eye(6).reshape(6, 2, 3)
            found = {}
            for name, loss in losses.items():
                total = lambda t: jnp.sum(loss(t))  # noqa: B023, E731
                slopes = jax.vmap(lambda h: (total(s + h) - total(s - h)) / 2e-6)(steps)  # noqa: B023
                found[name] = jax.grad(total)(s), slopes.reshape(2, 3)
            return found

        made = jax.tree.map(np.asarray, evaluate(jnp.asarray(scores)))
    clipped = ("sequence_grpo", "token_grpo")
    assert any(np.any(made[name][0] == 0) for name in clipped)
    for name, (slope, wanted) in made.items():
        assert np.any(slope), name
        np.testing.assert_allclose(slope, wanted, rtol=1e-6, atol=1e-8, err_msg=name)


def test_normalisations_of_token_losses():
    scored = jnp.array([[True, True, True, False], [True, False, False, False]])
    new = jnp.where(scored, -1.0, 7.0)
    clip = alignment.per_token(0.5)
    losses = alignment.token_grpo(new, new, jnp.array([1.0, -2.0]), scored, clip, clip)
    np.testing.assert_array_equal(losses, [[-1, -1, -1, 0], [2, 0, 0, 0]])
    divided = [
        [np.asarray(a).tolist() for a in kind(losses, scored)]
        for kind in (alignment.over_all_tokens, alignment.over_own_tokens, alignment.over_canvas)
    ]
    assert divided == [
        [[-3, 2], [3, 1]],
        [[-1, 2], [1, 1]],
        [[-0.75, 0.5], [1, 1]],
    ]


def test_answers_without_a_reward_count_for_nothing():
    # 0.1 three times has a mean that is not 0.1 in float32, and no gradient all the same.
    rewards = np.array([[1.0, 0.0, np.nan], [0.5, 0.5, 0.5], [np.nan] * 3, [0.1] * 3])
    weight = np.array([[1.0, 1, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1]])

    @jax.jit
    def evaluate(r, w):
        likelihood = lambda s: jnp.sum(alignment.weighted_likelihood(s, r, w))  # noqa: E731
        kinds = alignment.centred, alignment.leave_one_out, alignment.standardised
        slopes = jax.grad(likelihood)(jnp.zeros(r.shape))
        return *(kind(r, w) for kind in kinds), slopes, alignment.has_signal(r, w)

    centred, left_out, standardised, slopes, live = evaluate(rewards, weight)
    wanted = np.zeros((4, 3))
    wanted[0] = 0.5, -0.5, 0
    np.testing.assert_array_equal(centred, wanted)
    np.testing.assert_array_equal(left_out, 2 * wanted)
    np.testing.assert_allclose(standardised, wanted * np.sqrt(2), rtol=1e-6)
    np.testing.assert_array_equal(live, [True, False, False, False])
    np.testing.assert_allclose(slopes[1:], 0, atol=1e-7)
    assert slopes[0, 0] < 0 < slopes[0, 1] and slopes[0, 2] == 0


def test_labels_are_stated():
    labels = {"exact", "biased", "none"}
    assert all({m.elbo, m.policy_gradient} <= labels for m in alignment.METHODS.values())
    exact = [name for name, m in alignment.METHODS.items() if m.policy_gradient == "exact"]
    assert exact == ["trace"]
