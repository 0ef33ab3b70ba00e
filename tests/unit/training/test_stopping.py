"""Early stopping: decisions on synthetic evaluations, and the same decisions after a resume."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mdm_jax import training
from mdm_jax.training import EarlyStopping, StopSettings

SIZES = np.full(200, 10)
NOISE = np.random.default_rng(0).normal(0, 20.0, len(SIZES))
"""Of a row's bound: the same at all evaluations, which share rows and masks."""


def evaluations(means, spread=0.5, seed=1):
    """Bounds of the rows (nats) whose means per token are given; differences spread less."""
    rng = np.random.default_rng(seed)
    return [SIZES * mean + NOISE + rng.normal(0, spread, len(SIZES)) for mean in means]


def stopped_at(means, settings, **options):
    """Number of the evaluation after which training ends, or None."""
    stopping = EarlyStopping(settings)
    for number, nats in enumerate(evaluations(means, **options)):
        stopping.observe(number, nats, SIZES)
        if stopping.stopped:
            return number
    return None


def test_the_gain_is_the_paired_difference_with_its_error_over_rows():
    first, second = evaluations([2.0, 1.9])
    stopping = EarlyStopping(StopSettings(patience=1))
    assert stopping.observe(0, first, SIZES) is None
    gain = stopping.observe(1, second, SIZES)
    per_token = (first - second) / 10
    assert gain.value == pytest.approx(per_token.mean())
    assert gain.standard_error == pytest.approx(per_token.std(ddof=1) / 200**0.5)
    assert abs(gain.value - 0.1) < 4 * gain.standard_error < 0.05  # unpaired: 4 * 0.2
    assert stopping.state["step"] == 1


def test_a_plateau_ends_training_and_a_fall_does_not():
    settings = StopSettings(patience=3, min_gain=0.02)
    assert stopped_at([3.0, 2.5, 2.2, 2.2, 2.2, 2.2, 2.2], settings) == 5
    assert stopped_at([3.0, 2.5, 2.2, 2.3, 2.4, 2.5, 2.6], settings) == 5
    assert stopped_at(np.linspace(3.0, 2.0, 12), settings) is None
    assert stopped_at([2.2] * 12, StopSettings(patience=0, min_gain=0.1)) is None


def test_small_gains_add_up():
    """Each below the limit, three above it: the reference stays until they are."""
    falling = 2.0 - 0.015 * np.arange(12)
    assert stopped_at(falling, StopSettings(patience=3, min_gain=0.02), spread=0.05) is None
    assert stopped_at(falling, StopSettings(patience=3, min_gain=0.1), spread=0.05) == 3


def test_what_the_interval_does_not_rule_out_does_not_count():
    """The same plateau, with so much noise that a gain of 0.02 is possible."""
    settings = StopSettings(patience=2, min_gain=0.02)
    assert stopped_at([2.0] * 6, settings, spread=0.5) == 2
    assert stopped_at([2.0] * 6, settings, spread=20.0) is None
    assert stopped_at([2.0] * 6, StopSettings(2, 0.02, 0.1), spread=1.0, seed=2) is not None


def test_an_evaluation_that_went_better_in_between_starts_the_count_again():
    assert stopped_at([2.0, 2.0, 1.5, 1.5, 1.5], StopSettings(patience=2, min_gain=0.02)) == 4


def test_a_resumed_run_decides_alike_from_json():
    settings = StopSettings(patience=3, min_gain=0.02)
    whole, resumed = EarlyStopping(settings), EarlyStopping(settings)
    for number, nats in enumerate(evaluations([2.5, 2.2, 2.19, 2.21, 2.2])):
        gains = [each.observe(number, nats, SIZES) for each in (whole, resumed)]
        assert gains[0] == gains[1]
        resumed = EarlyStopping(settings, json.loads(json.dumps(resumed.state)))
        assert resumed.state == whole.state
        assert resumed.stopped == whole.stopped == (number >= 4)
    assert (
        "3 evaluations in a row" in EarlyStopping(settings, whole.state | {"counted": 3}).describe()
    )


def test_bounds_that_are_not_finite_are_passed_over_and_other_rows_refused():
    stopping = EarlyStopping(StopSettings(patience=2, min_gain=0.02))
    first, second = evaluations([2.0, 2.0])
    assert stopping.observe(0, first * np.nan, SIZES) is None
    assert stopping.observe(1, first, SIZES) is None
    stopping.observe(2, second, SIZES)
    stopping.observe(3, second * np.inf, SIZES)
    assert stopping.state["counted"] == 0
    with pytest.raises(ValueError, match="other rows than that of step 1"):
        stopping.observe(4, first[:50], SIZES[:50])


class Killed(BaseException):
    """What a SIGKILL is to the loop: nothing that it may catch."""


class Batches:
    """A stream that counts."""

    def __init__(self):
        self.position = {"batch": 0}

    def __next__(self):
        self.position = {"batch": self.position["batch"] + 1}
        return tiny.batch(2)

    def get_state(self):
        return self.position


MEANS = {2: 3.0, 4: 2.5, 6: 2.2}
"""Bound after so many steps; afterwards that of step 6."""


def run(directory, kill_at=None):
    """A run of up to 40 steps that learn nothing; (last step, notes of the last checkpoint)."""
    state = tiny.new_state(tiny.objective().spec(2, tiny.LENGTH))
    checkpoints = training.Checkpoints(directory)
    restored = checkpoints.restore_last(training.abstract(jax.tree.map(jnp.asarray, state)))
    noted, batches = {}, Batches()
    if restored is not None:
        state, noted = restored.state, restored.notes
    stopping = EarlyStopping(StopSettings(patience=2, min_gain=0.02), noted.get("stop"))
    notes = {"stop": stopping.state}

    def step(state, _batch):
        if int(state.step) == kill_at:
            raise Killed
        metrics = training.StepMetrics(*np.zeros(len(training.StepMetrics._fields)))
        return state.replace(step=state.step + 1), metrics

    def evaluate(step, _ema, _check):
        mean = MEANS.get(step, 2.2)
        stopping.observe(step, evaluations([mean], 0.1, seed=step)[0], SIZES)
        notes["stop"] = stopping.state
        return {"loss": mean}

    try:
        training.train(
            step,
            state,
            batches,
            options=training.LoopOptions(40, evaluate_every=2, checkpoint_every=4),
            checkpoints=checkpoints,
            writer=training.SilentWriter(),
            hooks=training.Hooks(evaluate, finished=lambda: stopping.stopped),
            notes=notes,
            progress=noted.get("progress"),
        )
        kept = checkpoints.restore_last(training.abstract(jax.tree.map(jnp.asarray, state)))
        return int(kept.state.step), kept.notes, checkpoints.best_metrics()["step"]
    finally:
        checkpoints.close()


def test_a_run_ends_early_and_at_the_same_step_after_a_kill(tmp_path):
    step, notes, best = run(tmp_path / "whole")
    assert (step, best) == (10, 6)
    assert notes["stop"]["counted"] == 2 and notes["stop"]["step"] == 6
    with pytest.raises(Killed):
        run(tmp_path / "parts", kill_at=9)
    assert run(tmp_path / "parts") == (step, notes, best)
    assert run(tmp_path / "parts", kill_at=step) == (step, notes, best)  # takes no step more
