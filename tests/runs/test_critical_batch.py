"""Steps to a target by batch: crossings, the law that is fitted, tables."""

import numpy as np
import pytest

from experiments.study import critical_batch


def test_a_crossing_is_linear_in_the_logarithm_of_steps():
    curve = [(10, 4.0), (20, 3.0), (40, 3.2), (80, 2.0)]
    assert critical_batch.crossing(curve, 3.5) == pytest.approx(10 * 2**0.5)
    assert critical_batch.crossing(curve, 3.0) == pytest.approx(20)  # the first time
    assert critical_batch.crossing(curve, 2.6) == pytest.approx(40 * 2**0.5)
    assert critical_batch.crossing(curve, 1.9) is None
    assert critical_batch.crossing(curve, 4.5) is None  # reached before the first evaluation


def test_the_law_of_the_steps_is_found_again():
    steps = {b: 70 * (1 + 90 / b) for b in critical_batch.BATCHES}
    assert critical_batch.fit(steps) == pytest.approx((70, 90, 0), rel=1e-5, abs=1e-6)


def test_the_error_of_a_fit_is_that_of_repeated_noise():
    generator = np.random.default_rng(0)
    batches = np.array(critical_batch.BATCHES)
    fits = []
    for noise in 0.05 * generator.standard_normal((200, len(batches))):
        steps = 70 * (1 + 60 / batches) * np.exp(noise)
        fits.append(critical_batch.fit(dict(zip(batches.tolist(), steps))))
    _, critical, errors = np.array(fits).T
    assert np.log(critical).std() == pytest.approx(np.sqrt(np.mean(errors**2)), rel=0.15)


def _record(method, batch, seed, critical):
    least = 50 * (1 + critical / batch)
    return {"method": method, "batch": batch, "seed": seed, "factor": 1.0} | {
        "curve": [[least * f, bits] for f, bits in ((0.5, 3.8), (0.8, 3.6), (1, 3.35), (2, 3.1))]
    }


def test_the_critical_batch_is_a_mean_over_seeds():
    records = [_record("standard", b, s, 40 + 20 * s) for b in (4, 16, 64) for s in (0, 1)]
    found = critical_batch.summarise(records)
    assert [entry["target"] for entry in found] == [3.5, 3.35, 3.2]
    middle = found[1]
    assert middle["critical_batch"] == pytest.approx((50, 10), rel=1e-4)
    assert middle["least_steps"] == pytest.approx((50, 0), abs=1e-3) and middle["residual"] < 1e-5
    shown = critical_batch.table([middle])
    assert "| standard | 3.35 | 675 | 206 | 89 | 50 ± 0 | 50 ± 10 | 1.00 | 0 % |" in shown
    partly = critical_batch.summarise([_record("standard", b, 0, 40) for b in (4, 16)])
    assert "critical_batch" not in partly[0] and "| - | - | - | - |" in critical_batch.table(partly)


def test_runs_have_equal_passes_and_a_constant_rate():
    for batch in (4, 64):
        steps = critical_batch.evaluation_steps(batch)
        assert steps[0] == 2 * critical_batch.SPAN // batch and np.all(np.diff(steps) > 0)
        assert steps[-1] * batch == pytest.approx(critical_batch.MOST, rel=0.2)
    experiment = critical_batch.configured("recommended", 64, 3, 0.5)
    c = experiment.config
    assert experiment.spec.batch_size == 64 and c.seed == 3 and c.optimizer.peak == 0.02
    assert c.optimizer.final_fraction == 1 and c.optimizer.warmup_steps == 10
    assert c.optimizer.ema_decay == 0.9
