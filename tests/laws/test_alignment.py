"""Scores of answers, preference losses and policy gradients against enumeration, in float64.

The digits are those of ``tests/data/alignment_toy.json``; ``alignment_toy`` has the toy.
"""

import functools

import alignment_toy as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import alignment, corruption, objectives, variance
from mdm_jax.draws import Draw

DIGITS, W, L = toy.DIGITS, toy.CHOSEN, toy.REJECTED
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-12)

# name -> surrogate, its atoms
SURROGATES = {
    "fixed": (alignment.fixed_counts, lambda: toy.counted(3)),
    "mirror": (toy.mirrored, lambda: toy.counted(3)),
    "complement": (alignment.complementary, lambda: toy.counted(4)),
    "coupled": (alignment.coupled, lambda: toy.rated(0.2, 0.8)),
    "coupled_unweighted": (alignment.coupled_unweighted, lambda: toy.rated(0.2, 0.8)),
    "unigrpo_01": (alignment.mean_over_masked, lambda: toy.rated(0.0, 1.0)),
    "unigrpo_1_9": (
        functools.partial(alignment.mean_over_masked, low=0.1, high=0.9),
        lambda: toy.rated(0.1, 0.9),
    ),
    "onestep": (functools.partial(alignment.one_step, hide_prompt=0.0), lambda: toy.counted(1)),
}


@functools.cache
def found(name):
    """Probabilities [V], values [V, 27] and gradients [V, 27, 27] of a surrogate."""
    surrogate, atoms = SURROGATES[name]
    atoms, tables = atoms(), toy.tables()
    views = toy.views_of(surrogate, atoms)
    return atoms.probability, toy.read(tables.theta, views), toy.read(tables.gradient, views)


@functools.cache
def exact():
    """log pi [27] of policy and reference and its gradient [27, 27], by all orders."""
    tables = toy.tables()
    orders, gradients = toy.log_orders(tables.theta), toy.log_orders(tables.gradient)
    posterior = np.exp(orders) / np.exp(orders).sum(0)
    with jax.enable_x64(True):
        log_pi = np.asarray(alignment.iw_orders(jnp.asarray(orders)))
        log_ref = np.asarray(alignment.iw_orders(jnp.asarray(toy.log_orders(tables.reference))))
    return log_pi, log_ref, np.einsum("oy,oyk->yk", posterior, gradients)


def direction(gradients, advantages=None):
    """The expected direction of ``policy_gradient`` for expected gradients [27, 27] of a score."""
    pi = np.exp(exact()[0])
    with jax.enable_x64(True):
        if advantages is None:
            advantages = alignment.centred(jnp.asarray(toy.REWARDS), jnp.asarray(pi))
        loss = lambda scores: jnp.sum(pi * alignment.policy_gradient(scores, advantages))  # noqa: E731
        return -np.asarray(jax.grad(loss)(jnp.zeros(27))) @ gradients


def assert_method(name, gradient):
    """Cosine, norm ratio and relative error of an expected direction; returns the last."""
    wanted, truth = DIGITS["pg"]["methods"][name], np.array(DIGITS["vectors"]["grad_J"])
    error = np.linalg.norm(gradient - truth) / np.linalg.norm(truth)
    close(toy.cosine(gradient, truth), wanted["cos"])
    close(np.linalg.norm(gradient) / np.linalg.norm(truth), wanted["norm_ratio"])
    close(error, wanted["rel_err"], atol=1e-9)
    close(gradient, wanted["grad"], atol=1e-9)
    return error


def test_the_toy_is_the_published_one():
    close(toy.REFERENCE, DIGITS["vectors"]["theta_ref"])
    close(toy.THETA, DIGITS["vectors"]["theta"])
    log_pi, log_ref, gradient = exact()
    close(log_pi, DIGITS["vectors"]["logpi_all"])
    close([log_ref[W], log_ref[L]], [DIGITS["logpi"]["ref_w"], DIGITS["logpi"]["ref_l"]])
    close(np.exp(log_pi).sum(), 1, rtol=1e-13)
    close((np.exp(log_pi) * toy.REWARDS) @ gradient, DIGITS["vectors"]["grad_J"], atol=1e-10)


def test_bounds_go_through_the_objective_and_share_one_corruption():
    calls = []
    process = corruption.fixed_count(toy.MASK)

    def counting(*args):
        calls.append(args)
        return process.corrupt(*args)

    objective = objectives.masked_nelbo(process._replace(corrupt=counting))
    bound = alignment.sequence_bound(objective, variance.chain())
    atoms, rows, tables = toy.counted(3), toy.batch(), toy.tables()
    with jax.enable_x64(True):
        # Quantiles of the law of the level: 1 - masking rate.
        draw = Draw(1 - jnp.asarray(atoms.draw.u), *map(jnp.asarray, atoms.draw[1:]))

        def paired(*params):
            return alignment.paired_elbo(bound, toy.network, *params, rows, draw)

        @jax.jit
        def evaluate(theta, reference):
            pair = paired(theta, reference)
            policy = jax.jacrev(lambda p: jnp.mean(paired(p, reference).policy, axis=0))(theta)
            return pair, policy, jax.grad(lambda p: jnp.sum(paired(theta, p).reference))(reference)

        same = jax.jit(paired)(*[jnp.asarray(toy.THETA)] * 2)
        np.testing.assert_array_equal(same.policy, same.reference)  # bit for bit
        made = evaluate(jnp.asarray(toy.THETA), jnp.asarray(toy.REFERENCE))
        pair, gradient, of_reference = jax.tree.map(np.asarray, made)
    assert len(calls) == 4  # one for each time that a pair was asked for
    views = toy.views_of(alignment.fixed_counts, atoms)
    close(pair.policy, toy.read(tables.theta, views))
    close(pair.reference, toy.read(tables.reference, views))
    np.testing.assert_array_equal(of_reference, 0)
    np.testing.assert_array_equal(pair.count, 3)
    close(np.mean(pair.policy, 0), DIGITS["vectors"]["elbo_all"], rtol=1e-13)
    close(gradient[W], DIGITS["vectors"]["grad_elbo_w"])
    close(np.exp(np.mean(pair.policy, 0)).sum(), DIGITS["elbo"]["sum_exp"])


@pytest.mark.parametrize("name", SURROGATES)
def test_means_and_variances_of_every_surrogate(name):
    probability, values, gradients = found(name)
    close(probability.sum(), 1)
    mean = probability @ values
    spread = np.einsum("v,vyk->yk", probability, gradients)
    total = np.einsum("v,vyk->y", probability, gradients**2) - np.sum(spread**2, axis=1)
    for answer, row in (("w", W), ("l", L)):
        wanted = DIGITS["estimator"][name][answer]
        close(mean[row], wanted["mean"])
        close((probability @ values**2 - mean**2)[row], wanted["var"])
        close(total[row], wanted["grad_var"], atol=1e-9)
    bound = np.array(DIGITS["vectors"]["elbo_all"])
    if name in ("fixed", "mirror", "complement"):
        close(mean, bound, rtol=1e-12)
    if name == "unigrpo_01":
        close(mean, bound * 3 / 4)


def test_bernoulli_masks_have_no_finite_variance():
    """Through the objective, for rates from 1e-3 and from 1e-6."""
    bound = alignment.sequence_bound(
        objectives.masked_nelbo(corruption.bernoulli(toy.MASK)), variance.chain()
    )
    with jax.enable_x64(True):
        run = jax.jit(
            lambda draw: bound.values(functools.partial(toy.network, toy.THETA), toy.batch(), draw)
        )
        for name, low in (("bern_1e3", 1e-3), ("bern_1e6", 1e-6)):
            atoms = toy.rated(low, 1.0, nodes=32, log=True)
            rate = low + (1 - low) * atoms.draw.u
            draw = Draw(jnp.asarray(1 - rate), *map(jnp.asarray, atoms.draw[1:]))
            values = np.asarray(run(draw))
            mean = atoms.probability @ values
            close(mean[W], DIGITS["estimator"][name]["w"]["mean"])
            variances = atoms.probability @ values**2 - mean**2
            close(variances[W], DIGITS["estimator"][name]["w"]["var"], rtol=1e-5)


def test_one_step_scores_hide_the_prompt():
    tables, rows = toy.tables(), toy.batch(with_prompt=True)
    draw = Draw(np.zeros((2, 27, 1)), 0, np.tile([0.1, 0.5, 0.5, 0.5], (2, 27, 1)))
    draw.noise[1, :, 0] = 0.2
    views = jax.jit(lambda draw: alignment.one_step(draw, rows))(draw)
    np.testing.assert_array_equal(views.hidden[0, :, :, 0], [[True] * 27, [False] * 27])
    np.testing.assert_array_equal(views.weight, np.broadcast_to([0, 1, 1, 1], (1, 2, 27, 4)))
    hidden, visible = tables.prompt_hidden[7].sum(-1), tables.theta[7].sum(-1)
    for answer, row in (("w", W), ("l", L)):
        wanted = DIGITS["d1"][answer]
        close([visible[row], hidden[row]], [wanted["visible"], wanted["masked"]])
        close(0.85 * visible[row] + 0.15 * hidden[row], wanted["mean_p15"])
    gradient = 0.85 * tables.gradient[7].sum(1) + 0.15 * tables.prompt_hidden_gradient[7].sum(1)
    assert assert_method("d1_p15", direction(gradient)) > 0.05
    above = (visible > exact()[0]).sum(), (visible < DIGITS["vectors"]["elbo_all"]).sum()
    assert above == (DIGITS["d1"]["above_logpi"], DIGITS["d1"]["below_elbo"])


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_quadrature_is_exact_from_half_as_many_nodes_as_tokens(nodes):
    points = (np.polynomial.legendre.leggauss(nodes)[0] + 1) / 2
    masked = toy.HIDDEN[np.stack(np.meshgrid(*[np.arange(8)] * nodes, indexing="ij"), -1)]
    masked = masked.reshape(-1, nodes, 3)  # every mask at every node
    rate = points[None, :, None]
    noise = np.where(masked, rate / 2, (1 + rate) / 2)
    chance = np.prod(np.where(masked, rate, 1 - rate), axis=(1, 2))
    noise = np.broadcast_to(noise.reshape(-1, 1, 3), (noise.size // 3, 27, 3))
    atoms = toy.Atoms(Draw(np.zeros((len(noise), 27, 1)), 0.0, noise), chance)
    views = toy.views_of(alignment.quadrature, atoms, nodes=nodes)
    values = toy.read(toy.tables().theta, views)
    mean, wanted = chance @ values, DIGITS["gdpo"]["L3"][f"N{nodes}"]
    close((mean - DIGITS["vectors"]["elbo_all"])[W], wanted["bias"], rtol=1e-5, atol=1e-12)
    close((chance @ values**2 - mean**2)[W], wanted["var_K1"])


@jax.jit
def upper_bounds(scores, weight, power):
    """``eubo`` [N, 27] and its gradients, of draws [N, m, 27, 3]."""

    def bound(s, w):
        return alignment.eubo(s[None], alignment.Views(None, w[None]), np.full(27, 3), power)

    def both(s, w):
        return bound(s, w), jax.grad(lambda t: jnp.sum(bound(t, w)))(s)

    return jax.vmap(both)(scores, weight)


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_upper_bounds_of_spg(power):
    tables = toy.tables()
    atoms = toy.counted(3)
    views = toy.views_of(alignment.fixed_counts, atoms)
    scores = tables.theta[np.sum(views.hidden * [1, 2, 4], -1), np.arange(27)]
    gradients = tables.gradient[np.sum(views.hidden * [1, 2, 4], -1), np.arange(27)]
    wanted, name = DIGITS[f"spg_eubo_b{power}"], f"b{power}"
    pairs = [np.repeat(np.arange(18), 18), np.tile(np.arange(18), 18)]

    def of(draws):
        """Values [N, 27] and gradients [N, 27, 27] for draws [N, m] of atoms."""
        picked = jax.tree.map(lambda a: jnp.asarray(a[0, draws]), (scores, views.weight, gradients))

        value, slope = upper_bounds(*picked[:2], power)
        return np.asarray(value), np.einsum("nmyi,nmyik->nyk", slope, picked[2])

    with jax.enable_x64(True):
        exact_value, exact_gradient = of(np.arange(18)[None])  # all atoms: the exact mean
        one, one_gradient = of(np.arange(18)[:, None])
        two, two_gradient = of(np.stack(pairs, 1))
    close([exact_value[0, W], exact_value[0, L]], [wanted["w"], wanted["l"]])
    gap = exact_value[0] - exact()[0]
    close(gap.min(), wanted["min_minus_logpi"])
    assert (gap < 0).sum() == wanted["below_logpi"]
    close([one.mean(0)[W], one.mean(0)[L]], [wanted["m1"]["w"], wanted["m1"]["l"]])
    close([two.mean(0)[W], two.mean(0)[L]], [wanted["m2"]["w"], wanted["m2"]["l"]])
    lower = found("fixed")[2].mean(0)
    close(one_gradient.mean(0), lower, atol=1e-12)
    pi = np.exp(exact()[0])

    def along(upper, mix):
        with jax.enable_x64(True):
            advantages = alignment.centred(jnp.asarray(toy.REWARDS), jnp.asarray(pi))
            loss = lambda s: jnp.sum(pi * alignment.spg(*s, advantages, mix))  # noqa: E731
            slopes = np.asarray(jax.grad(loss)(jnp.zeros((2, 27))))
        return -(slopes[0] @ lower + slopes[1] @ upper)

    assert_method(f"spg_eubo_m1_{name}", along(one_gradient.mean(0), 1.0))
    assert_method(f"spg_eubo_m2_{name}", along(two_gradient.mean(0), 1.0))
    assert assert_method(f"spg_eubo_exact_{name}", along(exact_gradient[0], 1.0)) > 0.05
    assert assert_method(f"spg_mix_exact_{name}", along(exact_gradient[0], 0.5)) > 0.05


# --- policy gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SURROGATES if name != "mirror"])
def test_expected_directions_of_surrogates(name):
    probability, _, gradients = found(name)
    gradient = direction(np.einsum("v,vyk->yk", probability, gradients))
    assert assert_method(name, gradient) > 0.05  # all are labelled biased


def test_the_trace_alone_is_exact():
    """All steps, and one step drawn at random, over answers and orders of the sampler."""
    rows, steps = toy.order_steps()
    tables, (log_pi, _, _) = toy.tables(), exact()
    joint = np.exp(toy.log_orders(tables.theta)) / 6
    close(joint.sum(0), np.exp(log_pi))
    with jax.enable_x64(True):
        advantages = np.asarray(alignment.centred(jnp.asarray(toy.REWARDS), jnp.exp(log_pi)))
    whole = toy.log_orders(tables.gradient)
    exact_gradient = np.einsum("oy,y,oyk->k", joint, advantages, whole)
    assert assert_method("trace", exact_gradient) < 1e-9
    atoms = toy.counted(3, len(rows))
    one = toy.views_of(alignment.sampled_trace(steps), atoms, toy.batch(rows))
    np.testing.assert_array_equal(one.weight.max((0, 3)), 3)
    sampled = toy.read(tables.gradient, one).reshape(18, 6, 27, 27)
    gradient = np.einsum("oy,y,voyk->k", joint, advantages, sampled) / 18
    assert np.linalg.norm(gradient - exact_gradient) < 1e-9 * np.linalg.norm(exact_gradient)
    for wanted, each, chance in (("trace", whole[None], 1), ("trace_one_step", sampled, 18)):
        square = np.einsum("oy,y,voyk->", joint, advantages**2, each**2) / chance
        close(square - exact_gradient @ exact_gradient, DIGITS["pg"]["variance"][wanted]["total"])


@pytest.mark.parametrize("name", ["fixed", "complement", "coupled", "unigrpo_01", "onestep"])
def test_variance_of_one_answer_and_one_draw(name):
    probability, _, gradients = found(name)
    pi = np.exp(exact()[0])
    advantages = toy.REWARDS - pi @ toy.REWARDS
    expected = np.einsum("v,vyk->yk", probability, gradients)
    square = np.einsum("v,y,vyk->", probability, pi * advantages**2, gradients**2)
    mean = (pi * advantages) @ expected
    close(square - mean @ mean, DIGITS["pg"]["variance"][name]["total"])
    of_masks = square - (pi * advantages**2) @ np.sum(expected**2, axis=1)
    close(of_masks, DIGITS["pg"]["variance"][name]["mask_part"], atol=1e-9)


def test_masks_within_a_group():
    """Two answers, leave-one-out: on one mask they share it, and win little."""
    probability, _, g = found("fixed")
    pi = np.exp(exact()[0])
    pairs, chance = np.indices((27, 27)).reshape(2, -1), np.outer(pi, pi).ravel()
    with jax.enable_x64(True):
        groups = jnp.asarray(toy.REWARDS[pairs.T])
        factor = np.asarray(alignment.leave_one_out(groups, jnp.ones(groups.shape)))  # [729, 2]
    first, second = (np.einsum("v,vyk->yk", probability, g) for _ in range(2))
    squares = np.einsum("v,vyk->y", probability, g**2)
    inner = np.einsum("v,vyk,vzk->yz", probability, g, g)  # on the same mask
    own = np.sum(factor**2 * squares[pairs.T], axis=1) / 4
    cross = factor.prod(1) / 2
    mean = chance @ (factor[:, :1] * first[pairs[0]] + factor[:, 1:] * second[pairs[1]]) / 2
    wanted = DIGITS["pg"]["group2"]
    for name, products in (("shared", inner), ("independent", first @ second.T)):
        total = chance @ (own + cross * products[pairs[0], pairs[1]])
        close(total - mean @ mean, wanted[name])
    close(mean @ mean, wanted["mean_sq"])


def test_importance_weighted_orders():
    """Q orders drawn independently: between the bound and log p, in value and in gradient."""
    orders = toy.log_orders(toy.tables().theta)
    gradients = toy.log_orders(toy.tables().gradient)
    log_pi = exact()[0]
    for count in (2, 4):
        index = np.stack(np.meshgrid(*[np.arange(6)] * count, indexing="ij"), -1).reshape(-1, count)
        with jax.enable_x64(True):
            picked = jnp.asarray(orders[index])  # [N, Q, 27]
            value = jax.jit(jax.vmap(alignment.iw_orders))(picked)
        close(np.exp(log_pi) @ (log_pi - np.asarray(value).mean(0)), DIGITS[f"iw_gap_Q{count}"])
        weight = np.exp(orders[index]) / np.exp(orders[index]).sum(1, keepdims=True)
        mean = np.einsum("nqy,nqyk->yk", weight, gradients[index]) / len(index)
        assert_method(f"iw_orders_Q{count}", direction(mean))


def test_left_to_right_is_another_sampler():
    steps = alignment.left_to_right(toy.batch())
    np.testing.assert_array_equal(steps, np.broadcast_to([0, 1, 2], (27, 3)))
    tables = toy.tables()
    value, gradient = toy.log_orders(tables.theta)[0], toy.log_orders(tables.gradient)[0]
    chance = np.exp(value)
    close(chance @ toy.REWARDS, DIGITS["J_left_to_right"])
    own = (chance * (toy.REWARDS - chance @ toy.REWARDS)) @ gradient
    assert_method("justgrpo_vs_random_order_J", own)


def test_weighted_likelihood_and_rejection():
    log_pi, _, exact_gradient = exact()
    pi, lower = np.exp(log_pi), found("fixed")[2].mean(0)
    tables = toy.tables()
    hidden = 0.85 * tables.gradient[7].sum(1) + 0.15 * tables.prompt_hidden_gradient[7].sum(1)
    kept = toy.REWARDS == 1
    with jax.enable_x64(True):
        slope = jax.grad(
            lambda s: jnp.sum(alignment.weighted_likelihood(s, jnp.asarray(toy.REWARDS), pi))
        )(jnp.zeros(27))
        raft = jax.grad(lambda s: jnp.sum(pi * alignment.rejection(s, kept)))(jnp.zeros(27))
    assert_method("wd1_elbo", -np.asarray(slope) @ lower)
    assert_method("wd1_onestep", -np.asarray(slope) @ hidden)
    raft = -np.asarray(raft) / (pi @ kept)
    assert_method("raft_elbo", raft @ lower)
    assert_method("raft_exact", raft @ exact_gradient)
    # The best of four: right unless all four are wrong.
    right, found_right = pi @ kept, 1 - (1 - pi @ kept) ** 4
    best = pi * np.where(kept, found_right / right, (1 - found_right) / (1 - right))
    close(best.sum(), 1)
    assert_method("bestof4_elbo", best @ lower)
    rewards, weight = (
        np.array([[0.0, 1, 1], [0, 0, 0], [1, 0, 0]]),
        np.array([[1, 1, 1], [0, 0, 0], [0, 1, 1]]),
    )
    picked = alignment.best_of_group(rewards, weight)
    np.testing.assert_array_equal(picked, [[0, 1, 0], [0, 0, 0], [0, 1, 0]])


def test_group_advantages_in_expectation():
    """Over all 2^G outcomes of 0/1 rewards: factors on the policy gradient, dead groups."""
    p, kinds = DIGITS["J"], {
        "mean": alignment.centred,
        "leave_one_out": alignment.leave_one_out,
        "std_bessel": alignment.standardised,
        "std_pop": functools.partial(alignment.standardised, ddof=0),
    }  # fmt: skip

    @jax.jit
    def evaluate(rewards, weight):
        advantages = {name: kind(rewards, weight) for name, kind in kinds.items()}
        return advantages, alignment.has_signal(rewards, weight)

    # Groups of fewer than eight have answers of weight 0, whatever their reward.
    rewards = ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(float)
    for size in (2, 4, 6, 8):
        used = np.broadcast_to(np.arange(8) < size, rewards.shape)
        chance = np.where(used, np.where(rewards == 1, p, 1 - p), 0.5).prod(1)
        with jax.enable_x64(True):
            made = evaluate(jnp.asarray(rewards), jnp.asarray(used * 1.0))
            advantages, live = jax.tree.map(np.asarray, made)
        wanted = DIGITS["group"][f"G{size}"]
        for name, each in advantages.items():
            np.testing.assert_array_equal(each[~live], 0)  # equal rewards
            np.testing.assert_array_equal(each[:, size:], 0)
            factor = chance @ np.sum(each * rewards, axis=1) / size / (p * (1 - p))
            close(factor, wanted[name])
        close(chance @ ~live, wanted["dead_groups"])


@jax.jit
def divergences(new, reference):
    """Values and gradients by name, of scores [N, 27]; the squares' estimates are single ones."""
    kinds = {
        "k1": alignment.kl_k1,
        "k1_score": alignment.kl_k1_score,
        "k2": lambda new, reference: alignment.kl_k2(new[None], reference[None]),
        "k3": alignment.kl_k3,
    }

    def both(kind):
        return kind(new, reference), jax.grad(lambda n: jnp.sum(kind(n, reference)))(new)

    return {name: both(kind) for name, kind in kinds.items()}


def test_divergences():
    log_pi, log_ref, gradient = exact()
    pi, lower = np.exp(log_pi), found("fixed")[2].mean(0)
    views = toy.views_of(alignment.fixed_counts, toy.counted(3))
    noisy = found("fixed")[1], toy.read(toy.tables().reference, views)
    bounds = [values.mean(0, keepdims=True) for values in noisy]
    truth = pi @ ((log_pi - log_ref)[:, None] * gradient)
    wanted = DIGITS["kl"]
    close(np.linalg.norm(truth), wanted["grad_norm"])
    two = np.stack([np.repeat(np.arange(18), 18), np.tile(np.arange(18), 18)])
    with jax.enable_x64(True):
        run = lambda *pair: jax.tree.map(np.asarray, divergences(*map(jnp.asarray, pair)))  # noqa: E731
        whole, bounded = run(log_pi[None], log_ref[None]), run(*bounds)
        shared, independent = run(*noisy), run(noisy[0][two[0]], noisy[1][two[1]])
        # From two independent estimates: no mask variance in the mean of the gradient.
        pairs = [jnp.asarray(a[two]) for a in noisy]
        cross = jax.grad(lambda n: jnp.sum(alignment.kl_k2_crossfitted(n, pairs[1])))
        crossed = np.asarray(jax.jit(cross)(pairs[0]))
    for name in ("k1", "k2", "k3"):
        close(pi @ bounded[name][0][0], wanted[f"{name}_elbo"])
    close(pi @ whole["k1"][0][0], wanted["exact"])
    for name in ("k2", "k3"):
        close(pi @ whole[name][0][0], wanted[f"{name}_exact"])
        close(pi @ shared[name][0].mean(0), wanted["noisy_shared_K1"][name])
        close(pi @ independent[name][0].mean(0), wanted["noisy_independent_K1"][name])
    for name, kind, found_by, of in (
        ("k2_exact", "k2", whole, gradient),
        ("k3_exact", "k3", whole, gradient),
        ("k1_naive_elbo", "k1", bounded, lower),
        ("k1_score_elbo", "k1_score", bounded, lower),
        ("k2_elbo", "k2", bounded, lower),
        ("k3_elbo", "k3", bounded, lower),
    ):
        own = (pi * found_by[kind][1][0]) @ of
        close(np.linalg.norm(own), wanted["grads"][name]["norm"])
        close(toy.cosine(own, truth), wanted["grads"][name]["cos"])
    assert np.linalg.norm((pi * whole["k1"][1][0]) @ gradient) < 1e-12
    got = np.einsum("vpy,vpyk->yk", crossed, found("fixed")[2][two]) / len(two[0])
    close(got, (bounds[0] - bounds[1]).T * lower, atol=1e-10)


def test_ratios_of_bounds():
    tables = toy.tables()
    views = toy.views_of(alignment.fixed_counts, toy.counted(3))
    new, old = found("fixed")[1], toy.read(tables.reference, views)
    count, wide = np.full(27, 3), alignment.per_token(1e9)
    one = alignment.per_token(1.0)

    def ratio(new, old, count=count):
        with jax.enable_x64(True):
            loss = jax.vmap(
                lambda *pair: alignment.sequence_grpo(*pair, jnp.ones(27), count, one, wide)
            )
            return -np.asarray(jax.jit(loss)(jnp.asarray(new), jnp.asarray(old)))

    for answer, row in (("w", W), ("l", L)):
        wanted = DIGITS["ratio"][answer]
        close(ratio(new, old)[:, row].mean(), wanted["shared_norm"])
        close(ratio(new, old, np.ones(27))[:, row].mean(), wanted["shared"])
        split = ratio(np.repeat(new, 18, 0), np.tile(new, (18, 1)), np.ones(27))
        close(split[:, row].mean(), wanted["same_policy_independent"])
        split = ratio(np.repeat(new, 18, 0), np.tile(old, (18, 1)))
        close(split[:, row].mean(), wanted["independent_norm"])
    np.testing.assert_array_equal(ratio(new, new), 1)
