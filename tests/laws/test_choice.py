"""The chain that is chosen, on three toys whose variances are enumerated; and the ranking itself.

The toys have four positions, two rows and a gradient that is a sum over masked positions of numbers
that are written down, divided by the share of masked ones as fixed counts do. So each has the
source of noise it was made for, and the exact variance per pass of each chain decides what wins.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import slow_except

from mdm_jax import corruption, meter, objectives, variance
from mdm_jax.meter.efficiency import Efficiency
from mdm_jax.types import Batch

LENGTH, MASK_ID, PASSES = 4, 2, 8
ROWS = Batch(
    tokens=np.array([[0] * 4, [1] * 4], np.int32),
    eligible=np.ones((2, 4), bool),
    documents=np.array([[1] * 4, [2] * 4], np.int32),
    units=np.full(2, 4, np.int32),
)
CHAINS = {
    "independent": (),
    "stratified": ("stratified",),
    "stratified, mirror": ("stratified", "mirror"),
    "stratified_levels": ("stratified_levels",),
}
# [rows, masked positions, positions]: the gradient of each masked position's loss.
SIGNS = np.array([1.0, -1.0, 1.0, -1.0])
LEVELS = np.array([3.0, 1.0, -1.0, -3.0])
TOYS = {
    # Of both signs within a row: which positions are masked matters, and opposite masks cancel.
    "masks": np.broadcast_to(0.2 + SIGNS, (2, 4, 4)),
    # Up and down with the level, and opposite in the two rows: only a row's own levels cancel.
    "rates": np.array([1, -1])[:, None, None] * LEVELS[:, None] * np.ones(4),
    # The same wherever and however much is masked, of the row alone: nothing helps.
    "data": np.array([1.0, -0.5])[:, None, None] * np.ones((4, 4)),
}
WINNERS = {"masks": "stratified, mirror", "rates": "stratified_levels", "data": "stratified"}


def apply_fn(params, inputs, _logsnr, documents):
    """Logits [N, 4, 2]: the loss of the row's token has the gradient of the table at theta = 0."""
    row, masked = documents[:, 0] - 1, jnp.sum(inputs == MASK_ID, -1)
    own = jax.lax.stop_gradient(params["table"])[row, jnp.maximum(masked - 1, 0)]
    # The cross-entropy of two tokens has the slope p - 1 = -1/2 in the logit of the right one.
    return -2 * params["theta"] * own[..., None] * jax.nn.one_hot(row, 2)[:, None]


@functools.cache
def estimator():
    """Compiled once for all toys: their tables are parameters."""
    objective = objectives.masked_nelbo(corruption.fixed_count(MASK_ID))
    return meter.make_estimator(apply_fn, objective)


@functools.cache
def measured(toy):
    """Figures of all chains."""
    params = {"theta": jnp.zeros(()), "table": jnp.asarray(TOYS[toy], jnp.float32)}
    figures = {}
    for name, order in CHAINS.items():
        transform = variance.chain(*(getattr(variance, each)() for each in order))
        spec = estimator().objective.spec(PASSES, LENGTH)
        subject = meter.Subject(estimator(), params, transform, transform.init(spec), spec)
        figures[name] = meter.efficiency_at_equal_passes(
            subject, ROWS, jax.random.key(0), passes=PASSES, groups=8, redraws=16
        )
    return figures


def exact(toy):
    """Variance per forward pass of each chain, by enumeration of rows, levels and orders.

    Eight quantiles, one in each cell, meet each of the four levels twice; so given the levels rows
    are independent and the sum over rows of the levels' means is fixed.
    """
    orders = np.array(list(itertools.permutations(range(LENGTH))))
    values = np.zeros((2, 2, LENGTH, len(orders)))  # [views, rows, levels, orders]
    for view, ranks in enumerate((orders, LENGTH - 1 - orders)):
        for k in range(1, LENGTH + 1):
            own = TOYS[toy][:, k - 1]
            values[view, :, k - 1] = LENGTH / k * own @ (ranks < k).T
    one, pair = values[0], values.mean(0)
    mean, within = one.mean(-1), one.var(-1).mean(0)  # [rows, levels], [levels]
    halves = [
        (mean[:, a] + mean[:, b]).var() / 4 + (within[a] + within[b]) / 4
        for a, b in itertools.product((0, 1), (2, 3))
    ]
    return {
        "independent": one.var(),
        "stratified": np.moveaxis(one, 1, 0).reshape(LENGTH, -1).var(1).mean(),
        "stratified, mirror": 2 * np.moveaxis(pair, 1, 0).reshape(LENGTH, -1).var(1).mean(),
        "stratified_levels": 2 * np.mean(halves),
    }


@pytest.mark.parametrize("toy", slow_except({"masks"}, TOYS))
def test_the_chain_chosen_is_the_best_by_enumeration(toy):
    """Winners differ; ratios are within 4 standard errors, and those are below a third."""
    expected = exact(toy)
    best = min(list(CHAINS)[1:], key=lambda name: round(expected[name], 9))
    assert best == WINNERS[toy]
    ranked = meter.rank(measured(toy), "independent")
    assert meter.first_tied(ranked) == best
    for name, each in ranked.items():
        ratio = expected[name] / expected["independent"]
        assert not each.unsettled
        assert abs(each.ratio.value - ratio) <= 4 * each.ratio.standard_error + 1e-9, name
        assert each.ratio.standard_error <= 0.33 * ratio
    tied = [name for name, each in ranked.items() if each.tied]
    assert tied == [best]


def figure(variances, signals=None, unsettled=""):
    variances = np.asarray(variances, float)
    signals = np.ones(len(variances)) if signals is None else np.asarray(signals, float)
    return Efficiency(variances, signals.mean(), 1, 8, 0.05, 3.0, unsettled, signals)


def test_ties_go_to_the_first_and_what_has_not_settled_is_not_taken():
    noise = np.array([1.0, -1.0, 0.5, -0.5])
    figures = {
        "reference": figure(2 + 0 * noise),
        "simple": figure(1 + 0.1 * noise),
        "tied": figure(0.99 - 0.1 * noise),
        "wild": figure(0.01 + 0 * noise, unsettled="a tail"),
    }
    ranked = meter.rank(figures, "reference")
    assert [name for name, each in ranked.items() if each.tied] == ["simple", "tied"]
    assert meter.first_tied(ranked) == "simple"
    assert ranked["simple"].ratio.value == pytest.approx(0.5)
    assert math.isnan(ranked["wild"].ratio.value)
    # Noise that is common to both does not make them tied: differences are paired by group.
    better = meter.rank(figures | {"tied": figure(0.95 + 0.1 * noise)}, "reference")
    assert meter.first_tied(better) == "tied"
    assert meter.first_tied(meter.rank({"reference": figures["reference"]}, "reference")) is None
    with pytest.raises(ValueError, match="the same groups"):
        meter.rank({"one": figure([1, 2, 3]), "other": figure([1, 2])}, "one")


def test_noise_to_signal_is_that_of_another_gradient():
    """Half the variance of a gradient of half the length has twice the noise to signal."""
    noise = 0.01 * np.array([1.0, -1.0, 0.5, -0.5])
    figures = {"reference": figure(1 + noise), "clipped": figure((1 - noise) / 2, [0.25] * 4)}
    assert meter.rank(figures, "reference")["clipped"].ratio.value == pytest.approx(0.5)
    ranked = meter.rank(figures, "reference", by_noise_to_signal=True)
    assert ranked["clipped"].ratio.value == pytest.approx(2.0)
    lost = figures | {"clipped": figure(1 + noise, [0.1, -0.2, 0.1, -0.1])}
    ranked = meter.rank(lost, "reference", by_noise_to_signal=True)
    assert "no signal" in ranked["clipped"].unsettled
