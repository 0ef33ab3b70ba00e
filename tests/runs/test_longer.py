"""A finished run whose ``train.steps`` are raised goes on; nothing of it is lost."""

import math

import pytest

from mdm_jax import training
from mdm_jax.launch import presets
from mdm_jax.launch.build import make_experiment, open_workdir
from mdm_jax.launch.modes import train
from mdm_jax.launch.workdir import WorkdirError, check, read_config

pytestmark = pytest.mark.usefixtures("one_device")

STEPS = 10


def _config(steps):
    config = presets.quickstart("smoke")
    config.optimizer.update(name="adamw", warmup_steps=None)  # compiles in half the time
    config.train.update(steps=steps, evaluate_every=5, checkpoint_every=5, log_every=1)
    return config


@pytest.fixture(scope="module")
def finished(one_device, tmp_path_factory):
    """Directory of a run of STEPS steps with its final results."""
    workdir = tmp_path_factory.mktemp("longer") / "run"
    assert train.train(make_experiment(_config(STEPS)), workdir)
    (workdir / "report.txt").write_text("of 10 steps")
    return workdir


def _best(workdir):
    checkpoints = open_workdir(workdir)
    best = checkpoints.best_metrics()
    checkpoints.close()
    return best


def test_fewer_steps_are_refused_with_the_flag_too(finished):
    with pytest.raises(WorkdirError, match="started for 10 steps; train.steps can be raised, but"):
        check(finished, _config(8))
    with pytest.raises(WorkdirError, match="train.steps=8: .* has been trained for 10 steps, and"):
        train.train(make_experiment(_config(8), finished), finished, allow_config_change=True)
    assert read_config(finished)["train"]["steps"] == STEPS


def test_more_steps_together_with_another_change_are_refused(finished):
    config = _config(2 * STEPS)
    config.optimizer.b1 = 0.5
    with pytest.raises(WorkdirError, match="optimizer.b1: 0.9 -> 0.5\n  train.steps: 10 -> 20"):
        check(finished, config)


def test_more_steps_go_on_without_a_flag(finished, capsys):
    before, best = (finished / "metrics.jsonl").read_bytes(), _best(finished)
    assert train.train(make_experiment(_config(2 * STEPS), finished), finished)
    out = capsys.readouterr().out
    # At step 10 of 20 after 2 of warm-up, from a tenth of the peak: the end of 10 steps.
    rate = 2e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * 8 / 18)) / 2)
    assert "train.steps raised from 10 to 20" in out and "resuming at step 10" in out
    assert f"goes from 0.0002 to {rate:.3g} at once, then by a cosine to 0.0002 at step 20" in out
    assert (finished / "metrics.jsonl").read_bytes().startswith(before)
    records = training.read_metrics(finished / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [*range(1, 2 * STEPS + 1)]
    assert [r["step"] for r in records if r["kind"] == "evaluate"] == [5, 10, 15, 20]
    losses = {r["step"]: r["loss"] for r in records if r["kind"] == "evaluate"}
    assert _best(finished)["loss"] == min(losses.values()) <= best["loss"]
    checkpoints = open_workdir(finished)
    assert checkpoints.steps()[-1] == 2 * STEPS
    checkpoints.close()
    assert read_config(finished)["train"]["steps"] == 2 * STEPS
    assert read_config(finished)["optimizer"]["warmup_steps"] == 2
    assert (finished / "config.1.json").exists() and (finished / "run.1.json").exists()
    assert (finished / "report.1.txt").read_text() == "of 10 steps"
    assert not (finished / "report.txt").exists()  # so that a sweep knows that it is not finished
