"""The noise panel: A, B, C measured while training, importance weights, the noise scale."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_decompose import (
    PROBABILITIES,
    apply_fn,
    enumerated_gradients,
    exact_components,
    toy_objective,
    toy_setting,
)

from mdm_jax import meter, training, variance
from mdm_jax.draws import Draw, LossStats
from mdm_jax.launch.reports.panel import critical_batch, shown
from mdm_jax.meter import panel
from mdm_jax.testing import toys
from mdm_jax.types import Batch


@functools.cache
def toy_measurements(group, count=1500, batch_size=8):
    """Records of ``count`` measurements on the toy, each on a batch of its own."""
    setting = toy_setting(variance.stratified(), batch_size)
    settings = panel.PanelSettings(rows=4, levels_per_row=2, masks_per_level=2)
    measure = panel.make_measurement(
        apply_fn, toy_objective(), setting.transform, setting.spec, settings, group=group
    )
    rng = np.random.default_rng(4)
    pick = rng.choice(3, (count, batch_size), p=PROBABILITIES)
    batches = jax.tree.map(lambda field: jnp.asarray(np.asarray(field)[pick]), toys.toy_batch())

    @jax.jit
    def run(batches, keys):
        one = functools.partial(measure, setting.params, setting.state)
        return jax.lax.map(lambda each: one(*each), (batches, keys), batch_size=100)

    sketches, eligible = run(batches, jax.random.split(jax.random.key(6), count))
    return [panel.measured(*each, group) for each in zip(np.asarray(sketches), eligible)]


@pytest.mark.parametrize("group", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_measurements_average_to_the_enumerated_components(group):
    """1500 batches of eight rows of the toy; parts within 4 standard errors, of at most 3%."""
    records, exact = toy_measurements(group), exact_components(enumerated_gradients("identity"))
    for name, value in zip((*panel.PARTS, "total"), (*exact, sum(exact))):
        values = np.array([record[name] for record in records])
        error = values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean() - value) < 4 * error, (name, values.mean(), value, error)
        assert error < 0.03 * sum(exact)
    mean = PROBABILITIES @ enumerated_gradients("identity").mean((1, 2))
    signal = np.array([record["signal"] for record in records])
    assert abs(signal.mean() - mean @ mean) < 4 * signal.std() / len(signal) ** 0.5


def test_shares_and_their_errors_over_measurements():
    records, exact = toy_measurements(1), exact_components(enumerated_gradients("identity"))
    found = panel.shares(records)
    assert list(found) == list(panel.PARTS)
    for share, value in zip(found.values(), np.array(exact) / sum(exact)):
        assert abs(share.value - value) < 4 * share.standard_error < 0.12
    # Honest: the spread of the shares of 20 measurements over 75 such windows.
    windows = [panel.shares(records[i : i + 20]) for i in range(0, 1500, 20)]
    spread = np.std([window["pattern"].value for window in windows])
    error = np.mean([window["pattern"].standard_error for window in windows])
    np.testing.assert_allclose(error, spread, rtol=0.25)  # 3 standard errors
    assert math.isnan(panel.shares(records[:2])["rate"].standard_error)


def test_a_measurement_takes_rows_with_eligible_tokens_and_as_many_passes_as_it_says():
    """Of six rows two have nothing eligible; forward and backward passes are counted by calls."""
    rows, settings = tiny.batch(6, counts=(0, 3, 6, 0, 2, 4)), panel.PanelSettings(rows=5)
    spec, calls = tiny.objective().spec(6, tiny.LENGTH), []

    def counted(params, inputs, logsnr, documents):
        jax.debug.callback(lambda n: calls.append(n), inputs.shape[0])
        return tiny.apply_fn(params, inputs, logsnr, documents)

    chain = variance.mirror()
    measure = panel.make_measurement(counted, tiny.objective(), chain, spec, settings)
    batch = jax.tree.map(jnp.asarray, rows)
    sketches, eligible = tiny.jit(measure)(
        tiny.params(), chain.init(spec), batch, jax.random.key(0)
    )
    jax.effects_barrier()
    assert sketches.shape == (5, 2, 2, 1024) and eligible == 4
    assert sum(calls) == chain.views * settings.passes() == 2 * 20
    record = panel.measured(sketches, eligible)
    assert record == panel.measured(sketches[:4], 4) and record["total"] > 0
    assert panel.measured(sketches, 1) is None
    assert panel.measured(np.full_like(sketches, np.nan), 4) is None


def test_measured_rows_are_of_all_slots_and_those_without_eligible_tokens_last():
    """Slots of a mixture hold the same source in every batch: 2 of 7 rows, 400 times."""
    eligible = jnp.arange(8) != 3
    keys = jax.random.split(jax.random.key(0), 400)
    rows = np.asarray(jax.vmap(lambda key: panel.random_rows(eligible, 8, key))(keys))
    assert np.all(rows[:, 7] == 3) and np.all(np.sort(rows) == np.arange(8))
    counts = np.bincount(rows[:, :2].ravel(), minlength=8)[[0, 1, 2, 4, 5, 6, 7]]
    assert np.all(np.abs(counts - 800 / 7) < 4 * (800 / 7 * 5 / 7) ** 0.5)  # standard errors


@pytest.mark.slow
def test_the_panel_agrees_with_the_variance_mode_on_a_small_model():
    """A transformer of random weights; shares of 60 measurements and of 128 rows, exactly."""
    model = tiny.transformer(depth=2)
    objective, chain = tiny.objective(), variance.chain(variance.stratified())
    params, spec = tiny.parameters(model, tiny.LENGTH), objective.spec(16, tiny.LENGTH)
    rows = tiny.batch(128, counts=(6, 5, 4))
    estimator = meter.make_estimator(model.apply, objective)
    subject = meter.Subject(estimator, params, chain, chain.init(spec), spec)
    exact = meter.decompose_gradients(
        subject, rows, jax.random.key(0), levels_per_row=4, masks_per_level=2
    )
    settings = panel.PanelSettings()
    measure = jax.jit(panel.make_measurement(model.apply, objective, chain, spec, settings))
    rng, records = np.random.default_rng(0), []
    for number in range(60):
        pick = rng.integers(0, 128, 16)
        batch = Batch(*(np.asarray(field)[pick] for field in rows))
        found = measure(params, chain.init(spec), batch, jax.random.key(number))
        records.append(panel.measured(*found))
    for (name, share), of_all in zip(panel.shares(records).items(), exact.shares):
        reference = getattr(exact, name).standard_error / exact.total.value
        assert abs(share.value - of_all) < 4 * math.hypot(share.standard_error, reference), name


# --- weights --------------------------------------------------------------------------------------


def test_effective_sample_size_and_largest_weight_by_hand():
    """Weights 1, 2 and 3 in one step and 1, 1 in the next, forgotten by half; one row is empty."""
    monitor = training.weight_monitor(decay=0.5)
    assert np.isnan(monitor.read(monitor.init(None))["effective_sample_size"])

    def step(weights, eligible, targets):
        log_weight = jnp.log(jnp.asarray(weights, jnp.float32))[None, :, None]
        ones = jnp.ones_like(log_weight)
        counts = jnp.asarray(eligible, jnp.float32)[None, :, None]
        stats = LossStats(ones, ones, counts, jnp.asarray(targets)[None, :, None])
        return Draw(ones / 2, log_weight, ones / 2), stats, None

    state = monitor.update(monitor.init(None), *step([1, 2, 3, 9], [4, 4, 4, 0], [1, 2, 3, 0]))
    read = monitor.read(state)
    np.testing.assert_allclose(read["effective_sample_size"], 36 / (3 * 14), rtol=1e-6)
    np.testing.assert_allclose(
        [read["largest_weight"], read["masked_share"], read["eligible_per_row"]], [3, 0.5, 4]
    )
    read = monitor.read(monitor.update(state, *step([1, 1], [4, 4], [4, 4])))
    np.testing.assert_allclose(
        read["effective_sample_size"], (3 + 2) ** 2 / ((1.5 + 2) * (7 + 2)), rtol=1e-6
    )
    assert read["largest_weight"] == pytest.approx(3) and read["weights_rejected"] == 0


def test_the_band_of_the_normalised_loss_is_honest():
    """Its standard error against the spread over 200 runs of 100 steps on the toy."""
    monitor, objective = training.level_monitor(toy_objective(), bins=4, decay=0.9), toy_objective()
    spec, params, transform = objective.spec(4, 4), toys.toy_params(), variance.identity()
    rows = jax.tree.map(lambda f: jnp.asarray(np.asarray(f)[[0, 1, 2, 0]]), toys.toy_batch())

    def step(state, key):
        draw = variance.draw_batch(key, transform, transform.init(spec), spec)
        stats = objective.loss(lambda *a: apply_fn(params, *a), rows, draw)
        return monitor.update(state, draw, stats, None), None

    @jax.jit
    @jax.vmap
    def run(key):
        return monitor.read(jax.lax.scan(step, monitor.init(params), jax.random.split(key, 100))[0])

    read = run(jax.random.split(jax.random.key(2), 200))
    spread = np.std(read["normalised_loss"])
    error = np.sqrt(np.mean(np.square(read["normalised_loss_standard_error"])))
    np.testing.assert_allclose(error, spread, rtol=0.2)  # 4 standard errors of a spread of 200


# --- the noise scale ------------------------------------------------------------------------------


def test_the_critical_batch_size_of_a_linear_model():
    """Loss (theta - x)^2 / 2 with rows x ~ N(0, I) in 20 dimensions, batches of 8 at theta = 1.

    Of one row the gradient has tr Cov = 20 and mean 1: |E G|^2 = 20, so B_crit = 1 row; at
    theta = 0.2 it is 25. The spread of the estimate follows from the signal's own error.
    """
    monitor = training.gradient_noise_monitor(decay=0.999)

    @jax.jit
    def run(theta, key):
        def step(state, key):
            rows = jax.random.normal(key, (8, 20))
            return monitor.update(state, None, None, {"theta": theta - rows.mean(0)}), None

        keys = jax.random.split(key, 3000)
        return monitor.read(jax.lax.scan(step, monitor.init(None), keys)[0])

    for theta, rows in ((1.0, 1.0), (0.2, 25.0)):
        read = {n: float(v) for n, v in run(jnp.full((20,), theta), jax.random.key(1)).items()}
        figures = critical_batch({**read, "eligible_per_row": 5.0}, [], batch_size=8)
        low, high = figures["critical_batch_rows_low"], figures["critical_batch_rows_high"]
        np.testing.assert_allclose(figures["critical_batch_rows"], rows, rtol=0.1)
        assert low < figures["critical_batch_rows"] < high < 1.4 * low
        np.testing.assert_allclose(
            figures["critical_batch_tokens"], 5 * figures["critical_batch_rows"]
        )


def test_a_signal_that_does_not_stand_out_is_left_to_the_measurements():
    """Three of total 60 and signals 1, 2, 3: mean 2, standard error 1 / sqrt(3); then -1, 0, 1."""
    readings = {"gradient_noise": 6.0, "gradient_signal": 0.1}
    assert critical_batch(readings, [], 4) == {}  # without an error nothing is said
    readings["gradient_signal_standard_error"] = 0.1
    records = [{"total": 60.0, "signal": signal} for signal in (1.0, 2.0, 3.0)]
    assert critical_batch(readings, records[:2], 4) == {}
    figures, error = critical_batch(readings, records, 4), 3**-0.5
    expected = [60 / (2 + 2 * error), 30.0, 60 / (2 - 2 * error)]
    found = [figures[f"critical_batch_rows{end}"] for end in ("_low", "", "_high")]
    np.testing.assert_allclose(found, expected)
    for record in records:
        record["signal"] -= 2
    figures = critical_batch(readings, records, 4)
    assert figures == {"critical_batch_rows_low": pytest.approx(60 / (2 * error))}
    assert shown(figures) == {"critical batch": ">52"}
    figures = {"critical_batch_rows_low": 0.1, "critical_batch_rows": 0.3}
    assert shown(figures) == {"critical batch": "<1"}
    readings["gradient_signal"] = 0.4
    assert critical_batch(readings, records, 4)["critical_batch_rows"] == pytest.approx(60)
