"""Running estimates of a training run: their means, what they refuse, and their place in a step."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_decompose import apply_fn, toy_objective
from test_efficiency import BATCH, PICKED, TOKENS, exact_noise
from toy_oracle import NELBO, PROBABILITIES

from mdm_jax import objectives, training, variance
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.objectives import objective as objectives_objective
from mdm_jax.testing import toys
from mdm_jax.variance.densities import piecewise_density
from mdm_jax.variance.transform import EmptyState
from mdm_jax.variance.warps import importance


def run_monitor(monitor, steps, objective=None, gradients=None, transform=None):
    """The monitor's readings after ``steps`` steps on the toy."""
    objective, transform = objective or toy_objective(), transform or variance.stratified()
    spec, params = objective.spec(4, toys.LENGTH), toys.toy_params()

    @jax.jit
    def step(state, key):
        draw = variance.draw_batch(key, transform, transform.init(spec), spec)
        stats = objective.loss(lambda *a: apply_fn(params, *a), BATCH, draw)
        given = params if gradients is None else gradients(key)
        return monitor.update(state, draw, objectives.stop_gradient_stats(stats), given), None

    state, _ = jax.lax.scan(step, monitor.init(params), jax.random.split(jax.random.key(3), steps))
    return state, jax.tree.map(np.asarray, monitor.read(state))


def test_normalised_loss_is_the_bound_without_its_noise():
    """Near the batch's exact bound per token, with a fraction of the raw loss's spread."""
    exact = np.mean([NELBO[i] for i in PICKED]) / 4
    monitor = training.level_monitor(toy_objective(), bins=8, decay=0.99)
    _, found = run_monitor(monitor, 3000)
    # Memory of 100 visits a bin: spread about 1/sqrt(200 * 8) of a loss with deviation 0.35.
    assert abs(found["normalised_loss"] - exact) < 0.03
    assert found["level_nats_per_token"].shape == (8,)
    # Fixed counts: bins of an eighth hold one count each, (k - 1)/4 <= m < k/4.
    by_count = [3.63693223, 3.82429059, 4.12553032, 4.53615184]
    weight = np.array(PROBABILITIES)
    assert weight.sum() == 1
    spread = np.ptp(found["level_nats_per_token"])
    assert 0.5 * np.ptp(by_count) / 4 < spread < 3 * np.ptp(by_count) / 4
    np.testing.assert_allclose(np.mean(found["level_loss"]), exact, atol=0.05)
    assert found["level_rejected"] == 0


def test_level_monitor_keeps_bins_and_rejects_what_is_not_finite():
    objective = toy_objective()
    monitor = training.level_monitor(objective, bins=4, decay=0.5)
    update = tiny.jit(monitor.update)
    monitor = monitor._replace(update=update, read=tiny.jit(monitor.read))
    state = monitor.init(toys.toy_params())
    assert np.isnan(monitor.read(state)["normalised_loss"])
    spec = objective.spec(2, 4)
    draw = variance.draw_batch(jax.random.key(0), variance.identity(), EmptyState(), spec)._replace(
        u=jnp.array([[[0.9], [0.9]]])
    )
    stats = LossStats(
        raw=jnp.array([[[2.0], [jnp.nan]]]),
        weight=jnp.full((1, 2, 1), 4.0),
        eligible=jnp.array([[[4.0], [0.0]]]),  # the second row has nothing to score
        targets=jnp.array([[[1], [0]]]),
    )
    state = monitor.update(state, draw, stats, None)
    read = monitor.read(state)
    np.testing.assert_array_equal(read["level_nats_per_token"], [2, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(read["level_loss"], [2, np.nan, np.nan, np.nan])
    assert read["normalised_loss"] == 2
    bad = stats._replace(raw=jnp.full((1, 2, 1), jnp.inf))
    after = monitor.update(state, draw, bad, None)
    assert after.rejected == 1
    chex.assert_trees_all_equal(after._replace(rejected=state.rejected), state)
    elsewhere = draw._replace(u=jnp.array([[[0.1], [0.1]]]))
    moved = monitor.update(state, elsewhere, stats, None)
    np.testing.assert_array_equal(moved.nats, [2, 0, 0, 2])  # the first bin forgot nothing


def test_gradient_noise_of_known_gaussians():
    """Mean norm 2, 30 coordinates of variance 0.25: noise 7.5 and signal 4, within 5%."""

    def gradients(key):
        mean = jnp.zeros((30,)).at[0].set(2.0)
        return {"params": {"theta": mean + 0.5 * jax.random.normal(key, (30,))}}

    monitor = training.gradient_noise_monitor(decay=0.995)
    monitor = monitor._replace(init=lambda _: init(gradients(jax.random.key(0))))
    init = training.gradient_noise_monitor(0.995).init
    state, found = run_monitor(monitor, 4000, gradients=gradients)
    # Memory of 400 steps: relative error of the noise sqrt(2 / (30 * 400)).
    np.testing.assert_allclose(found["gradient_noise"], 7.5, rtol=0.05)
    np.testing.assert_allclose(found["gradient_signal"], 4.0, rtol=0.15)
    np.testing.assert_allclose(found["gradient_noise_share"], 7.5 / 11.5, rtol=0.06)
    assert state.rejected == 0
    # A product with a mean of past gradients has the variance 30 (1/4)^2 / 19 + 4/4 + 4/4/19, of
    # which the last part, the past mean's, is correlated from step to step and is not counted.
    expected = ((30 / 16 / 19 + 20 / 19) * (1 - 0.995) / (1 + 0.995)) ** 0.5
    np.testing.assert_allclose(found["gradient_signal_standard_error"], expected, rtol=0.2)


def test_gradient_noise_is_unbiased_from_the_second_step_on():
    monitor = training.gradient_noise_monitor(decay=0.7)

    @jax.vmap
    def read(key):
        state = monitor.init(jnp.zeros((2,)))
        for one in jax.random.split(key, 3):
            state = monitor.update(state, None, None, 1.0 + jax.random.normal(one, (2,)))
        return monitor.read(state)

    found = jax.jit(read)(jax.random.split(jax.random.key(0), 20_000))
    for name, expected in (("gradient_noise", 2.0), ("gradient_signal", 2.0)):
        values = np.asarray(found[name], np.float64)
        assert abs(values.mean() - expected) < 5 * values.std() / len(values) ** 0.5
    first = monitor.update(monitor.init(jnp.zeros((2,))), None, None, jnp.ones((2,)))
    assert np.isnan(monitor.read(first)["gradient_noise"])
    # By hand: <(3, 0), (1, 1)> = 3; <(0, 2), 0.9 (1, 1) + (3, 0)> / 1.9 = 1.8 / 1.9.
    second = monitor.update(first, None, None, jnp.array([3.0, 0.0]))
    np.testing.assert_allclose(np.sort(np.abs(second.mean))[-2:], [0.9, 3.9], rtol=1e-6)
    third = monitor.update(second, None, None, jnp.array([0.0, 2.0]))
    product, keep = 1.8 / 1.9, 1 / 4  # of the first of two; not the decay yet
    weight = keep + 1
    expected = [keep * 9 + 4, keep * 3 + product, keep * 9 + product**2, weight, keep**2 + 1]
    np.testing.assert_allclose(third[3:8], expected, rtol=1e-6)
    read = monitor.read(third)
    signal = expected[1] / weight
    np.testing.assert_allclose(read["gradient_noise"], expected[0] / weight - signal, rtol=1e-5)
    assert np.isnan(read["gradient_signal_standard_error"])  # of fewer than two steps' weight
    bad = monitor.update(first, None, None, jnp.array([1.0, jnp.nan]))
    assert bad.rejected == 1
    chex.assert_trees_all_equal(bad._replace(rejected=first.rejected), first)


def test_gradient_noise_sees_what_stratification_does():
    """It measures the batch gradient itself, so coupled rows are not mistaken for noise."""
    objective, params = toy_objective(), toys.toy_params()

    def gradients(transform):
        spec = objective.spec(4, 4)

        def gradient(params, key):
            draw = variance.draw_batch(key, transform, transform.init(spec), spec)
            stats = objective.loss(lambda *a: apply_fn(params, *a), BATCH, draw)
            return objectives.sum_losses(draw, stats).loss / TOKENS

        return lambda key: jax.grad(gradient)(params, key)

    monitor = training.gradient_noise_monitor(decay=0.999)
    made = gradients(variance.stratified())
    _, found = run_monitor(monitor, 4000, gradients=made)
    # Memory of 1960 steps of three coordinates: about 3 to 4%.
    np.testing.assert_allclose(found["gradient_noise"], exact_noise("stratified"), rtol=0.15)


def test_controlled_loss_keeps_the_mean_and_loses_noise():
    """Against the exact bound, under a warp, whose weights differ from level to level."""
    exact = np.mean([NELBO[i] for i in PICKED]) / 4
    monitor = training.baseline_monitor(bins=8, decay=0.99, forget=0.0)
    objective, transform, params = toy_objective(), variance.log_uniform(1e-2), toys.toy_params()
    spec = objective.spec(4, toys.LENGTH)

    @jax.jit
    def run(state, keys):
        def step(state, key):
            draw = variance.draw_batch(key, transform, transform.init(spec), spec)
            stats = objective.loss(lambda *a: apply_fn(params, *a), BATCH, draw)
            state = monitor.update(state, draw, stats, None)
            return state, monitor.read(state)

        return jax.lax.scan(step, state, keys)

    state, read = run(monitor.init(params), jax.random.split(jax.random.key(1), 3000))
    controlled, plain = (
        np.asarray(read[name], np.float64)[500:]
        for name in ("controlled_loss", "uncontrolled_loss")
    )
    for values in (controlled, plain):
        assert abs(values.mean() - exact) < 5 * values.std() / len(values) ** 0.5
    assert controlled.std() < 0.7 * plain.std()
    assert state.rejected == 0


@pytest.mark.parametrize("name", ["clipped", "uncertainty_weighting", "cdcd_warp"])
def test_controlled_loss_refuses_chains_that_do_not_repay_their_density(name):
    """With the true curve as baseline ``w b - mean(b)`` has another mean than zero there."""
    make = {"clipped": lambda: variance.clipped(0.3, 0.8)}.get(name, getattr(variance, name))
    chain = variance.chain(variance.stratified(), make())
    with pytest.raises(ValueError, match=f"{name}.* is {chain.bias}"):
        training.baseline_monitor(chain=chain)
    training.baseline_monitor(chain=variance.chain(variance.stratified(), variance.ppots()))


def test_the_correction_has_no_mean_under_exact_chains_alone():
    """A baseline 1, 3 in two bins, losses of zero, 4096 strata: minus the correction's mean."""
    baseline = objectives_objective.new_baseline(2)._replace(mean=jnp.array([1.0, 3.0]))
    rows = 4096

    @functools.partial(tiny.jit, static_argnums=0)
    def reported(transform):
        u = (jnp.arange(rows, dtype=jnp.float32) + 0.5).reshape(1, rows, 1) / rows
        start = Draw(u, jnp.zeros_like(u), u)
        spec = DrawSpec(rows, 1, (1,))
        draw = transform.draw(jax.random.key(0), transform.init(spec), start, spec)
        nothing = jnp.zeros_like(u)
        stats = LossStats(nothing, nothing + 1, nothing + 1, nothing)
        return objectives_objective.reported_loss(baseline, draw, stats) / rows

    exact = importance(piecewise_density((0, 0.25, 1), (1, 1)))
    np.testing.assert_allclose(reported(exact), 0.0, atol=1e-3)
    # Mean 2 of the baseline, less its integral 0.3 * 1 + 0.2 * 3 over quantiles from 0.2 to 0.7.
    np.testing.assert_allclose(reported(variance.clipped(0.3, 0.8)), 2 - 0.9, atol=2e-3)


# --- in the train step ----------------------------------------------------------------------------


def all_monitors():
    objective = tiny.objective()
    return (
        training.level_monitor(objective, bins=4),
        training.gradient_noise_monitor(),
        training.baseline_monitor(),
    )


@functools.cache
def compiled_step(watched, parts):
    monitors = all_monitors() if watched else ()
    spec, step = tiny.step_fn(16, monitors=monitors, num_microbatches=parts)
    return spec, tiny.jit(step, donate_argnums=0)


def stepped(monitors, batches, parts=1):
    spec, step = compiled_step(bool(monitors), parts)
    state = tiny.new_state(spec, monitors=monitors)
    for batch in batches:
        state, _ = step(state, batch)
    return state


def test_monitors_watch_and_change_nothing():
    batches = [tiny.batch(16, seed=seed) for seed in range(3)]
    plain, watched = stepped((), batches), stepped(all_monitors(), batches)
    assert plain.monitors == {}
    chex.assert_trees_all_equal(watched.replace(monitors={}), plain)
    read = tiny.jit(lambda states: training.read_monitors(all_monitors(), states))(watched.monitors)
    assert read["level_loss"].shape == read["level_nats_per_token"].shape == (4,)
    assert {"normalised_loss", "gradient_noise", "controlled_loss"} <= set(read)
    assert np.isfinite(
        [read["normalised_loss"], read["gradient_noise"], read["controlled_loss"]]
    ).all()
    assert read["gradient_rejected"] == read["level_rejected"] == read["controlled_rejected"] == 0


def test_monitors_see_the_whole_batch_under_microbatches():
    batches = [tiny.batch(16, seed=seed) for seed in range(2)]
    whole = stepped(all_monitors(), batches)
    parts = stepped(all_monitors(), batches, parts=4)
    chex.assert_trees_all_close(whole.monitors, parts.monitors, rtol=2e-4, atol=1e-5)


def test_a_skipped_step_reaches_only_the_counters_of_monitors():
    good = tiny.batch(16)

    def broken(params, *inputs):
        return jnp.nan * tiny.apply_fn(params, *inputs)

    monitors = all_monitors()
    before = stepped(monitors, [good])
    spec, step = tiny.step_fn(16, apply=broken, monitors=monitors)
    after, metrics = tiny.jit(step)(before, good)
    assert metrics.skipped == 1
    for name, old in before.monitors.items():
        new = after.monitors[name]
        assert new.rejected == old.rejected + 1
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old)):
            if not jnp.issubdtype(b.dtype, jnp.integer):
                np.testing.assert_array_equal(a, b)


def test_two_monitors_of_one_name_are_refused():
    with pytest.raises(ValueError, match="names of their own, got baseline, baseline"):
        tiny.step_fn(16, monitors=(training.baseline_monitor(), training.baseline_monitor(4)))


def test_level_profile_of_exact_truncated_and_biased_warps():
    spec = tiny.objective().spec(16, tiny.LENGTH)

    def read(*members):
        chain = variance.chain(*members)
        found = training.read_level_profile(chain, chain.init(spec), bins=4)
        return [np.asarray(found[name]) for name in NAMES] if found else found

    NAMES = ("level_density", "effective_weight")
    assert read(variance.stratified(), variance.mirror()) == {}
    density = piecewise_density((0.0, 0.5, 1.0), (1.0, 3.0))
    drawn, effective = read(variance.stratified(), importance(density))
    np.testing.assert_allclose(drawn, [0.5, 0.5, 1.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(effective, 1, rtol=1e-6)
    drawn, effective = read(variance.clipped(0.5, 1.0))  # rates, so the lower half of quantiles
    np.testing.assert_allclose(drawn, [2, 2, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(effective, [1, 1, 0, 0], rtol=1e-6)
    drawn, effective = read(variance.uncertainty_weighting())
    np.testing.assert_allclose([drawn, effective], 1)
