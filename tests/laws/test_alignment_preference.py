"""Losses of preference pairs by their expectation over the masks, under each sharing rule.

Scores of K independent draws are enumerated with their probabilities (multisets of the toy's seven
masks), and go through the losses as [K, N]; digits as in ``test_alignment``.
"""

import collections
import functools
import itertools
import math

import alignment_toy as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import alignment

DIGITS, BETA = toy.DIGITS, alignment.per_answer(1.0)
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-10)
MASKS = np.arange(1, 8)  # at least one token is masked
SIZES = toy.HIDDEN[1:].sum(1)
CHANCE = 1 / (3 * np.array([math.comb(3, k) for k in SIZES]))


def single(table, answer):
    """The fixed-count estimates of an answer's bound by mask, [7, ...]."""
    scale = (3 / SIZES).reshape(-1, *(1,) * (table.ndim - 3))
    return scale * table[MASKS, answer].sum(1)


@functools.cache
def estimates():
    """policy, reference and policy gradient by mask, for the chosen and the rejected answer."""
    t = toy.tables()
    return [
        (single(t.theta, y), single(t.reference, y), single(t.gradient, y))
        for y in (toy.CHOSEN, toy.REJECTED)
    ]


def outer(*parts):
    """Sums of independent parts (values [N], probabilities [N])."""
    values, chance = np.zeros(1), np.ones(1)
    for value, own in parts:
        values = (values[:, None] + value).ravel()
        chance = (chance[:, None] * own).ravel()
    return values, chance


def draws(rule):
    """Margins of one draw [N], gradients [N, 27] and probabilities, under a rule of sharing."""
    (pw, rw, gw), (pl, rl, gl) = estimates()
    if rule == "policy_ref":
        index = np.stack([i.ravel() for i in np.indices((7, 7))])
        w, v = index
        return pw[w] - rw[w] - pl[v] + rl[v], gw[w] - gl[v], CHANCE[w] * CHANCE[v]
    if rule == "all_four":
        return pw - rw - pl + rl, gw - gl, CHANCE
    if rule == "pair_only":
        p, r = (i.ravel() for i in np.indices((7, 7)))
        return (pw - pl)[p] - (rw - rl)[r], (gw - gl)[p], CHANCE[p] * CHANCE[r]
    w, x, v, y = (i.ravel() for i in np.indices((7,) * 4))
    chance = CHANCE[w] * CHANCE[x] * CHANCE[v] * CHANCE[y]
    return pw[w] - rw[x] - pl[v] + rl[y], gw[w] - gl[v], chance


def multisets(chance, count):
    """Multisets of ``count`` draws, [N, count], and their probabilities."""
    index = np.array([*itertools.combinations_with_replacement(range(len(chance)), count)])
    ways = np.array(
        [
            math.factorial(count) / math.prod(map(math.factorial, collections.Counter(i).values()))
            for i in index.tolist()
        ]
    )
    return index, ways * chance[index].prod(1)


@functools.cache
def evaluate(estimate):
    def total(scores, chance):
        return chance @ alignment.dpo(scores, BETA, estimate)

    return jax.jit(jax.value_and_grad(total))


def expected(scores, chance, gradients, estimate):
    """Mean loss, and mean gradient, of scores [K, N]; their gradients [K, N, 27] by index."""
    with jax.enable_x64(True):
        loss, slopes = evaluate(estimate)(jnp.asarray(scores), jnp.asarray(chance))
    return float(loss), np.einsum("kn,knj->j", slopes, gradients)


TRUE = np.array(DIGITS["vectors"]["grad_dpo"])


def assert_rule(name, loss, gradient, sigma):
    wanted = DIGITS["dpo"]["rules"][name]
    close(loss - DIGITS["dpo"]["loss"], wanted["loss_bias"])
    close(np.linalg.norm(gradient - TRUE) / np.linalg.norm(TRUE), wanted["grad_rel_err"])
    close(toy.cosine(gradient, TRUE), wanted["grad_cos"])
    close(gradient, wanted["grad"])
    close(sigma - DIGITS["dpo"]["sigma"], wanted["sigma_bias"])
    # The sigmoid of another score as coefficient: a scale alone.
    close(
        (sigma - DIGITS["dpo"]["sigma"]) / (1 - DIGITS["dpo"]["sigma"]),
        -wanted["split_rel_err"] * -1,
    )


def test_the_exact_loss_and_its_gradient():
    (pw, rw, gw), (pl, rl, gl) = estimates()
    margin = CHANCE @ (pw - rw - pl + rl)
    gradients = (CHANCE @ (gw - gl))[None, None]
    close(margin, DIGITS["dpo"]["score"])
    loss, gradient = expected(np.array([[margin]]), np.ones(1), gradients, alignment.plain)
    close([loss, np.linalg.norm(gradient)], [DIGITS["dpo"]["loss"], DIGITS["dpo"]["grad_norm"]])
    close(gradient, DIGITS["vectors"]["grad_dpo"])


def spread(values, chance):
    return chance @ values**2 - (chance @ values) ** 2


def test_variances_of_scores_from_several_passes():
    """Policy on the reference's masks: MIRROR, complements, strata of the level, two draws."""
    tables, total = toy.tables(), collections.Counter()
    for name, rows in (("w", toy.CHOSEN), ("l", toy.REJECTED)):
        parts = DIGITS["dpo"]["parts"]
        policy, reference = (single(t, rows) for t in (tables.theta, tables.reference))
        close(spread(policy, CHANCE), parts[f"V_theta_{name}"])
        close(spread(reference, CHANCE), parts[f"V_ref_{name}"])
        both = (
            spread(policy, CHANCE) + spread(reference, CHANCE) - spread(policy - reference, CHANCE)
        )
        scale = 2 * math.sqrt(parts[f"V_theta_{name}"] * parts[f"V_ref_{name}"])
        close(both / scale, parts[f"corr_{name}"])
        difference = policy - reference
        total["iid_2fwd"] += spread(difference, CHANCE) / 2
        total["iid_3fwd"] += spread(difference, CHANCE) / 3
        level = [
            spread(difference[own], 3 * CHANCE[own]) for own in (np.arange(1, 4)[:, None] == SIZES)
        ]
        total["stratified_3fwd"] += sum(level) / 9
        for kind, atoms, made in (
            ("mirror_2fwd", toy.counted(3), toy.mirrored),
            ("complement_2fwd", toy.counted(4), alignment.complementary),
        ):
            views = toy.views_of(made, atoms)
            of = [toy.read(t, views)[:, rows] for t in (tables.theta, tables.reference)]
            total[kind] += spread(of[0] - of[1], atoms.probability)
    for kind, value in total.items():
        close(value, DIGITS["dpo"][f"score_var_policy_ref_{kind}"])


@pytest.mark.parametrize("rule", DIGITS["dpo"]["score_var_K1"])
def test_variance_of_the_score(rule):
    margin, _, chance = draws(rule)
    close(chance @ margin**2 - (chance @ margin) ** 2, DIGITS["dpo"]["score_var_K1"][rule])


@pytest.mark.parametrize(
    "rule, count",
    [("policy_ref", 1), ("policy_ref", 2), ("all_four", 1), ("all_four", 2), ("all_four", 4)]
    + [("independent", 1), ("pair_only", 1), ("pair_only", 2)],
)
def test_expected_loss_and_gradient(rule, count):
    margin, gradient, chance = draws(rule)
    index, ways = multisets(chance, count)
    scores = margin[index].T
    loss, mean = expected(scores, ways, gradient[index].swapaxes(0, 1), alignment.plain)
    sigma = ways @ (1 / (1 + np.exp(-scores.mean(0))))
    assert_rule(f"{rule}_K{count}", loss, mean, sigma)


def parts_of(rule):
    """Margins [7] and gradients [7, 27] of independent masks, whose sums :func:`draws` has."""
    (pw, rw, gw), (pl, rl, gl) = estimates()
    return {
        "policy_ref": [(pw - rw, gw), (rl - pl, -gl)],
        "all_four": [(pw - rw - pl + rl, gw - gl)],
        "pair_only": [(pw - pl, gw - gl), (rl - rw, 0 * gw)],
        "independent": [(pw, gw), (-rw, 0 * gw), (-pl, -gl), (rl, 0 * gl)],
    }[rule]


@pytest.mark.parametrize(
    "rule, count",
    [("policy_ref", 4), ("all_four", 8), ("independent", 2), ("pair_only", 4)]
    + [pytest.param(rule, 8, marks=pytest.mark.slow) for rule in ("policy_ref", "pair_only")],
)
def test_expected_loss_and_gradient_of_many_draws(rule, count):
    """The plain loss reads the mean of the draws alone: sums over multisets of each mask."""
    index, ways = multisets(CHANCE, count)
    parts = [(each[index].mean(1), slope[index].mean(1)) for each, slope in parts_of(rule)]
    score, chance = outer(*((mean, ways) for mean, _ in parts))
    with jax.enable_x64(True):
        loss, slopes = evaluate(alignment.plain)(jnp.asarray(score)[None], jnp.asarray(chance))
    slopes = np.asarray(slopes).reshape(*[len(ways)] * len(parts))
    gradient = np.zeros(27)
    for axis, (_, mean) in enumerate(parts):
        others = tuple(other for other in range(len(parts)) if other != axis)
        gradient += slopes.sum(others) @ mean
    sigma = chance @ (1 / (1 + np.exp(-score)))
    assert_rule(f"{rule}_K{count}", float(loss), gradient, sigma)


def test_cross_fitting_has_the_exact_direction_and_less_variance():
    margin, gradient, chance = draws("policy_ref")
    index = np.indices((len(margin),) * 2).reshape(2, -1)
    ways = chance[index].prod(0)
    scores, gradients = margin[index], gradient[index]
    for name, estimate in (("naive", alignment.plain), ("crossfit", alignment.crossfitted)):
        wanted = DIGITS["dpo"]["crossfit_K2"][name]
        with jax.enable_x64(True):
            loss = lambda s: alignment.dpo(s, BETA, estimate)  # noqa: B023, E731
            both = lambda s: (loss(s), jax.grad(lambda t: jnp.sum(loss(t)))(s))  # noqa: B023, E731
            value, slopes = map(np.asarray, jax.jit(both)(jnp.asarray(scores)))
        rows = np.einsum("kn,knj->nj", slopes, gradients)
        mean = ways @ rows
        close(np.linalg.norm(mean - TRUE) / np.linalg.norm(TRUE), wanted["rel_err"])
        close(toy.cosine(mean, TRUE), wanted["cos"])
        close(ways @ np.sum(rows**2, axis=1) - mean @ mean, wanted["variance"])
        close(ways @ np.asarray(value), DIGITS["dpo"]["loss"] + 0.05653068466989153)


def test_a_cross_fitted_square_has_the_exact_gradient():
    """IPO: in direction and length, which the plain loss misses by half the mask variance."""
    margin, gradient, chance = draws("all_four")
    index = np.indices((len(margin),) * 3).reshape(3, -1)
    ways, truth = chance[index].prod(0), chance @ margin
    wanted = 2 * (truth - 0.5) * (chance @ gradient)
    for estimate, exact in ((alignment.crossfitted, True), (alignment.plain, False)):
        with jax.enable_x64(True):
            loss = lambda s: jnp.asarray(ways) @ alignment.ipo(s, BETA, estimate)  # noqa: B023, E731
            slopes = np.asarray(jax.jit(jax.grad(loss))(jnp.asarray(margin[index])))
        mean = np.einsum("kn,knj->j", slopes, gradient[index])
        assert np.allclose(mean, wanted, rtol=1e-9) == exact


def test_finite_differences_of_every_loss():
    """Plain losses have the gradient of their value; that of cross-fitted ones is the same."""
    random = np.random.default_rng(0)
    scores, good = random.normal(size=(3, 4)), np.array([True, False, True, False])
    losses = {
        "dpo": lambda s, e: alignment.dpo(s, alignment.per_answer(0.7), e),
        "ipo": lambda s, e: alignment.ipo(s, alignment.per_answer(0.7), e),
        "simpo": lambda s, e: alignment.simpo(s, 0.3 * s**2, alignment.per_token(2.0), 0.4, e),
    }
    with jax.enable_x64(True):
        for loss in losses.values():

            @jax.jit
            def evaluate(s, loss=loss):
                total = lambda t: jnp.sum(loss(t, alignment.plain))  # noqa: E731
                steps = 1e-6 * jnp.eye(12).reshape(12, 3, 4)
                slopes = jax.vmap(lambda h: (total(s + h) - total(s - h)) / 2e-6)(steps)
                values = [loss(s, e) for e in (alignment.plain, alignment.crossfitted)]
                return jax.grad(total)(s), slopes.reshape(3, 4), *values

            slope, wanted, plain, crossed = evaluate(jnp.asarray(scores))
            close(slope, wanted, rtol=1e-6, atol=1e-8)
            close(plain, crossed)
        # KTO's reference point has no gradient: hold it while differencing.
        beta = alignment.per_answer(0.7)
        got = alignment.kto(
            jnp.asarray(scores), good, beta, weights=(1.0, 2.0), estimate=alignment.plain
        )
    mean = scores.mean(0)
    z = max(mean.mean(), 0)
    gain = np.where(good, 1, -1) * 0.7 * (mean - z)
    close(got, np.where(good, 1, 2) / (1 + np.exp(gain)))


def test_swapping_the_pair_negates_the_margin():
    random = np.random.default_rng(1)
    pairs = [alignment.ElboPair(*random.normal(size=(2, 4, 3)), np.full(3, 5)) for _ in range(2)]
    forward = alignment.margins(*pairs, replicates=2)
    assert forward.shape == (2, 3)
    np.testing.assert_array_equal(forward, -alignment.margins(*pairs[::-1], replicates=2))


def test_held_out_figures_and_their_errors():
    """Margins 1 and -1 +- 1, 0: by hand; the masks' error of a mean is that of its replicates."""
    policy = np.zeros((2, 2, 3))  # [R, 2, B]
    policy[:, 0] = [[1.5, 0.0, 0.0], [0.5, -2.0, 0.0]]
    reference = np.full((2, 2, 3), 7.0)
    tokens = np.array([[4, 4, 4], [2, 2, 2]])
    figures = alignment.preference_figures([policy + 7, reference], tokens, "dpo", BETA)
    # Right, wrong, equal: 1/2.
    close(figures.accuracy, [0.5, 0.5 / math.sqrt(3), math.nan])
    margins, noise = np.array([1.0, -1.0, 0.0]), np.array([0.5, 1.0, 0.0])
    close(figures.margin, [0, 1 / math.sqrt(3), np.sqrt(np.sum(noise**2)) / 3], atol=1e-7)
    close(figures.losses, np.log1p(np.exp(-margins)), rtol=1e-5)
    three = np.zeros((3, 2, 1))
    three[0, 0] = 3.0  # 3, 0, 0: standard deviation sqrt(3) of one, 1 of the mean
    of_three = alignment.preference_figures([three + 7, 0 * three], tokens[:, :1], "dpo", BETA)
    close(of_three.margin.monte_carlo_error, 1.0)
    record = figures.to_dict()
    assert record["preference_accuracy"] == 0.5 and len(record) == 9
    one = alignment.preference_figures([policy[:1]], tokens, "simpo", alignment.per_token(2.0))
    close(one.margin[:2], [1.5 / 4 / 3, np.std([1.5 / 4, 0, 0], ddof=1) / math.sqrt(3)], rtol=1e-5)
    assert one.to_dict()["preference_margin_monte_carlo_error"] is None


def test_constants_state_their_unit():
    scores = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="nats_per_answer here.*0.1 in nats_per_token.*factor L"):
        alignment.dpo(scores, alignment.per_token(0.1))
    with pytest.raises(TypeError, match="alignment.per_answer.0.1."):
        alignment.ipo(scores, 0.1)
    with pytest.raises(ValueError, match="nats_per_token here"):
        alignment.simpo(scores, scores, alignment.per_answer(2.0))
    clip = alignment.per_answer(0.2)
    with pytest.raises(ValueError, match="clip of sequence_grpo"):
        alignment.sequence_grpo(*[jnp.zeros(3)] * 4, clip, clip)
    with pytest.raises(ValueError, match="two or more independent replicates.*got 1"):
        alignment.dpo(scores[:1], BETA)
