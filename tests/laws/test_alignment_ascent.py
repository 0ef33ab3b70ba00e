"""Noise-free ascent along the expected direction of each method, values of answers of another
policy, and a longer answer: the rest of the published digits (``alignment_toy``)."""

import functools

import alignment_toy as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import alignment
from mdm_jax.corruption.masked import count_at_rate
from mdm_jax.draws import GRID_BITS, Draw, from_grid
from mdm_jax.types import Batch
from mdm_jax.variance.couplings import _lattice

DIGITS = toy.DIGITS
close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-12)
METHODS = ("exact", "elbo", "coupled", "spg_mix", "onestep", "wd1_onestep", "raft_elbo")
METHODS += ("left_to_right",)


def expected_weights(surrogate, atoms):
    """Weight [8, 3] of log p of each position under each mask, in expectation over the draw."""
    views, weight = toy.views_of(surrogate, atoms), np.zeros((8, 3))
    index = np.sum(views.hidden[:, :, 0] * [1, 2, 4], axis=-1)  # [W, V]
    np.add.at(weight, index, atoms.probability[None, :, None] * views.weight[:, :, 0])
    return weight


def weights():
    one_step = functools.partial(alignment.one_step, hide_prompt=0.0)
    return {
        "elbo": expected_weights(alignment.fixed_counts, toy.counted(3)),
        "coupled": expected_weights(alignment.coupled, toy.rated(0.2, 0.8)),
        "onestep": expected_weights(one_step, toy.counted(1)),
        "orders": np.stack([order_weights(order) for order in toy.ORDERS]),
    }


def order_weights(order):
    made = np.zeros((8, 3))
    for step, position in enumerate(order):
        made[sum(1 << i for i in order[step:]), position] = 1
    return made


def slopes(loss):
    """Direction of the scores [27], in which ``loss`` of them falls."""
    return -jax.grad(lambda s: jnp.sum(loss(s)))(jnp.zeros(27))


def directions(weight, views, scores, gradients):
    """The expected direction [27] of each method, from log p [M, 8, 27, 3] and its gradient."""
    reward, made = jnp.asarray(toy.REWARDS), []
    for method, table, gradient in zip(METHODS, scores, gradients):

        def read(name, table=table):
            return jnp.einsum("...mi,myi->...y", weight[name], table)

        def slope(name, gradient=gradient):
            return jnp.einsum("mi,myik->yk", weight[name], gradient)

        orders = read("orders")
        log_pi = alignment.iw_orders(orders)
        if method == "left_to_right":
            log_pi = orders[0]
        pi = jnp.exp(log_pi)
        advantages = alignment.centred(reward, pi)
        plain = slopes(lambda s: pi * alignment.policy_gradient(s, advantages))  # noqa: B023
        if method == "exact":
            posterior = jax.nn.softmax(orders, axis=0)
            own = jnp.einsum("oy,omi,myik->yk", posterior, weight["orders"], gradient)
            made.append(plain @ own)
        elif method == "left_to_right":
            made.append(plain @ jnp.einsum("mi,myik->yk", weight["orders"][0], gradient))
        elif method == "wd1_onestep":
            loss = lambda s: alignment.weighted_likelihood(s, reward, pi)  # noqa: B023, E731
            made.append(slopes(loss) @ slope("onestep"))
        elif method == "raft_elbo":
            loss = lambda s: pi * alignment.rejection(s, reward == 1)  # noqa: B023, E731
            made.append(slopes(loss) @ slope("elbo"))
        elif method == "spg_mix":
            lower = slopes(lambda s: pi * alignment.spg(s, 0.0, advantages))  # noqa: B023
            upper = slopes(lambda s: pi * alignment.spg(0.0, s, advantages))  # noqa: B023
            index = np.sum(views.hidden * [1, 2, 4], axis=-1)  # [1, 18, 27]
            picked = table[index, np.arange(27)], gradient[index, np.arange(27)]
            each = jax.grad(lambda s: jnp.sum(alignment.eubo(s, views, np.full(27, 3), 1.0)))(
                picked[0]
            )
            own = jnp.einsum("wvyi,wvyik->yk", each, picked[1])
            made.append(lower @ slope("elbo") + upper @ own)
        else:
            made.append(plain @ slope(method))
    return jnp.stack(made)


@pytest.mark.slow
def test_ascent_along_the_expected_direction():
    """Steps of length 0.1: surrogates move the sampler that they describe."""
    weight, views = weights(), toy.views_of(alignment.fixed_counts, toy.counted(3))
    with jax.enable_x64(True):

        def advance(thetas, _):
            tables = jax.vmap(toy.scores_and_gradients(), (0, None))(thetas, False)
            way = directions(weight, views, *tables)
            thetas = thetas + 0.1 * way / jnp.linalg.norm(way, axis=-1, keepdims=True)
            return thetas, thetas

        start = jnp.tile(jnp.asarray(toy.THETA), (len(METHODS), 1))
        _, path = jax.jit(lambda s: jax.lax.scan(advance, s, None, 60))(start)
        path = np.asarray(path)
    for number, method in enumerate(METHODS):
        for wanted in DIGITS["ascent"][method]:
            table = toy.tables_at(path[wanted["step"] - 1, number])[0]
            orders = toy.log_orders(table)
            close(np.exp(orders).mean(0) @ toy.REWARDS, wanted["J"], rtol=1e-5)
            close(np.exp(orders[0]) @ toy.REWARDS, wanted["J_left_to_right"], rtol=1e-5)
            one_step = np.exp(table[7].sum(-1)) @ toy.REWARDS
            close(one_step, wanted["J_one_step"], rtol=1e-5)


def test_values_of_answers_of_another_policy():
    """E over answers of the reference of ratio x reward: true for log p, not for bounds."""
    tables, wanted = toy.tables(), DIGITS["off_policy_value"]
    new, old = (toy.log_orders(t) for t in (tables.theta, tables.reference))
    log_new, log_old = (np.log(np.exp(each).mean(0)) for each in (new, old))
    value = lambda ratio: np.exp(log_old) @ (ratio * toy.REWARDS)  # noqa: E731
    close(value(np.exp(log_new - log_old)), wanted["exact"])
    close(value(np.ones(27)), wanted["J_ref"])
    views = toy.views_of(alignment.fixed_counts, toy.counted(3))
    noisy = [toy.read(t, views) for t in (tables.theta, tables.reference)]  # [18, 27]
    bounds = [each.mean(0) for each in noisy]
    one, wide = alignment.per_token(1.0), alignment.per_token(1e9)

    def ratio(new, old, count):
        with jax.enable_x64(True):
            loss = jax.vmap(lambda *p: alignment.sequence_grpo(*p, jnp.ones(27), count, one, wide))
            return -np.asarray(jax.jit(loss)(jnp.asarray(new), jnp.asarray(old)))

    ones, sizes = np.ones(27), np.full(27, 3)
    pairs = np.repeat(noisy[0], 18, 0), np.tile(noisy[1], (18, 1))
    close(value(ratio(*(b[None] for b in bounds), ones)[0]), wanted["elbo_ratio"])
    close(value(ratio(*(b[None] for b in bounds), sizes)[0]), wanted["elbo_ratio_norm"])
    close(value(ratio(*noisy, ones).mean(0)), wanted["shared_K1"])
    close(value(ratio(*pairs, ones).mean(0)), wanted["independent_K1"])
    same = np.repeat(noisy[0], 18, 0), np.tile(noisy[0], (18, 1))
    for name, row in (("w", toy.CHOSEN), ("l", toy.REJECTED)):
        digits = DIGITS["ratio"][name]
        close(ratio(*(b[None] for b in bounds), ones)[0, row], digits["exact"])
        close(ratio(*(b[None] for b in bounds), sizes)[0, row], digits["exact_norm"])
        close(ratio(*pairs, ones).mean(0)[row], digits["independent"])
        close(ratio(*same, sizes).mean(0)[row], digits["same_policy_independent_norm"])


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_quadrature_of_six_tokens(nodes):
    """The toy with its positions repeated and the answer (w, l): its bound is a polynomial of
    degree 5 in the rate, which two nodes miss and three do not."""
    length, wanted = 6, DIGITS["gdpo"]["L6"]
    hidden = (np.arange(64)[:, None] >> np.arange(length)) & 1 == 1
    tokens = np.concatenate([toy.ANSWERS[toy.CHOSEN], toy.ANSWERS[toy.REJECTED]])
    rows = Batch(tokens[None], np.ones((1, 6), bool), np.ones((1, 6), np.int32), np.full(1, 6))
    points = (np.polynomial.legendre.leggauss(nodes)[0] + 1) / 2
    # Every mask at every node: masks of different nodes are independent.
    masks = np.broadcast_to(hidden[:, None, None], (64, nodes, 1, length))
    rate = np.broadcast_to(points[None, :, None, None], masks.shape)
    noise = np.where(masks, rate / 2, (1 + rate) / 2).reshape(-1, 1, length)
    with jax.enable_x64(True):
        model_fn = functools.partial(toy.network, jnp.asarray(toy.THETA))
        draw = Draw(jnp.zeros((len(noise), 1, 1)), 0.0, jnp.asarray(noise))
        views = alignment.quadrature(draw, rows, nodes=nodes)  # [nodes, 64, 1, 6]
        scores = jax.jit(lambda v: alignment.token_scores(model_fn, rows, v, toy.MASK))(views)
        each = np.sum(np.asarray(views.weight * scores), axis=-1)[..., 0]  # [nodes, 64]
    count = hidden.sum(1)
    chance = points[:, None] ** count * (1 - points[:, None]) ** (length - count)
    mean = np.sum(chance * each, axis=1)
    close(mean.sum() - wanted["exact"], wanted[f"N{nodes}"]["bias"], rtol=1e-5, atol=1e-11)
    variance = np.sum(chance * each**2, axis=1) - mean**2
    close(variance.sum(), wanted[f"N{nodes}"]["var_K1"])


def test_levels_of_stratified_counts_are_uniform_in_every_row():
    """For lengths up to 40 and batches up to 16 (released code rounds, so that rows miss counts):
    the law of a row's count, exactly on the grid of the quantiles."""
    grid, lengths = 2**GRID_BITS, np.arange(1, 41)[:, None, None]
    k = np.arange(1, 41)[:, None]  # where the count passes from k to k + 1
    near = np.clip(k * grid // lengths + np.arange(-8, 9), 0, grid - 1)  # [40, 40, 17]
    above = np.asarray(count_at_rate(from_grid(near), jnp.asarray(lengths))) > k
    strata = [np.asarray(_lattice(size + 1, size)) for size in range(1, 17)]
    for length in range(1, 41):
        found, places = above[length - 1, : length - 1], near[length - 1, : length - 1]
        assert not found[:, 0].any() and found[:, -1].all()
        first = np.take_along_axis(places, np.argmax(found, axis=1)[:, None], axis=1)[:, 0]
        counts = np.array([0, *first, grid])  # count k + 1 has the quantiles counts[k:k+2]
        for cells in strata:  # a row has one at random
            low = np.maximum(counts[:-1, None], cells[:-1])
            high = np.minimum(counts[1:, None], cells[1:])
            chance = np.mean(np.maximum(high - low, 0) / np.diff(cells), axis=1)
            np.testing.assert_allclose(chance, 1 / length, atol=4 * len(cells) / grid)
