"""The plan of ``mdm tune-levels``, its workdir, and its table; no run is trained."""

import numpy as np
import pytest

from mdm_jax.launch.presets import get_config
from mdm_jax.launch.tune import command, report, search
from mdm_jax.launch.workdir import WorkdirError

pytestmark = pytest.mark.keyless

BOTH = "gaussian.law=lognormal;gaussian.lognormal.mean=-2:0.5"


@pytest.fixture(scope="module")
def config():
    config = get_config("digits_gaussian:smoke")
    config.train.steps = 9
    return config


def test_a_plan_stays_in_its_budget(config):
    made = command.plan(config, BOTH, 90, 2)
    assert made.rungs == (search.Rung(1, 27), search.Rung(3, 9)) and made.seeds == (1, 2)
    assert sum(r.steps * r.runs for r in made.rungs) + 2 * 2 * 9 <= 90
    assert made.settings((0.25,)) == {
        "gaussian.lognormal.mean": "0.25",
        "gaussian.law": "lognormal",
    }
    assert made.settings(()) == {} and made.total == 40


@pytest.mark.parametrize(
    ("text", "budget", "message"),
    [
        ("gaussian.lognormal.mean=0.5", 90, "has no range"),
        ("gaussian.lognormal.mean=1:-1", 90, "empty range"),
        ("gaussian.lognormal.mean", 90, "is no NAME=LOW:HIGH"),
        ("seed=1:2;seed=3", 90, "given twice"),
        ("gaussian.lognormal.maen=-1:1", 90, "did you mean"),
        ("gaussian.lognormal.std=-1:1", 90, "gaussian.lognormal.std"),
        ("gaussian.law=cosine,flow;gaussian.lognormal.mean=-1:1", 90, "give one"),
        (BOTH, 40, "give --budget=48 or more"),
    ],
)
def test_plans_that_are_refused(config, text, budget, message):
    with pytest.raises(ValueError, match=message):
        command.plan(config, text, budget, 2)


def test_shorter_runs_warm_up_less_and_have_no_monitors(config):
    config = config.copy_and_resolve_references()
    config.train.update(steps=300, monitors=("levels",))
    config.optimizer.update(warmup_steps=50, ema_decay=0.99)
    short = command.shortened(config, 20)
    assert short.optimizer.warmup_steps == 2 and short.optimizer.ema_decay < 0.99
    assert (short.train.steps, short.train.monitors, short.panel.cost) == (20, (), 0)
    assert command.shortened(config, 300) == config
    assert config.train.monitors == ("levels",) and config.optimizer.warmup_steps == 50


def test_the_space_of_gaussian_runs_by_default(config):
    made = command.plan(config, command.SPACE, 90, 2)
    assert [r.name for r in made.ranges] == ["gaussian.lognormal.mean", "gaussian.lognormal.std"]


def test_a_workdir_keeps_its_plan(tmp_path):
    known = {"config": {"seed": 0}, "tune": BOTH, "runs": "some"}
    command.claim(tmp_path / "new", known)
    command.claim(tmp_path / "new", known)
    with pytest.raises(WorkdirError, match="seed: 0 -> 1"):
        command.claim(tmp_path / "new", known | {"config": {"seed": 1}})
    (tmp_path / "config.json").write_text('{"seed": 0}')
    with pytest.raises(WorkdirError, match="is a run of its own"):
        command.claim(tmp_path, known)


def test_what_is_written(tmp_path, monkeypatch):
    """Of a search that gained 0.25 at each seed; the figure is built, and not rendered."""
    monkeypatch.setattr(report.plots, "write", lambda figure, path: path.touch())

    def judge(point, steps, seed, last):
        mean = 1.0 + 0.01 * seed - (0.25 if point and point[0] < 0.5 else 0.0)
        return {"distances": {"4": mean + np.array([-0.1, 0.1]), "8": mean + np.array([-0.1, 0.1])}}

    rungs = search.Rung(1, 4), search.Rung(3, 2)
    plan = command.Plan((search.Range("a.b", 0.0, 1.0),), {"c": "x"}, rungs, 9, 0, (1, 2))
    record = command.tune(plan, judge)
    assert record["settings"]["c"] == "x" and float(record["settings"]["a.b"]) < 0.5
    assert record["scores"][report.BEST]["against_baseline"]["mean"] == pytest.approx(-0.25)
    text = report.write(record, ["a.b"], tmp_path)
    assert "| 8 | 1.0150 ± 0.0071 | 0.7650 ± 0.0071 | -0.2500 [" in text
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"tune.json", "tune.md", "tune.png"}
