"""``mdm tune-levels`` end to end, on a tiny network; what is finished is not trained again."""

import json

import launching
import pytest

from mdm_jax.launch.modes import train
from mdm_jax.launch.tune import search

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


def test_digits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(search, "RUNGS", 1)
    workdir = tmp_path / "tuned"
    line = ["tune-levels", "--config=digits_gaussian:smoke", f"--workdir={workdir}", "--steps=2"]
    line += ["--budget=42", "--paired_seeds=2", "--config.train.steps=9"]
    line += ["--config.optimizer.name=adamw", "--config.train.evaluate_every=0"]
    line += ["--config.train.monitors=()", "--config.panel.cost=0"]
    line += ["--config.spacing.budget=0", "--config.spacing.grids=('cosine','edm_rho')"]
    code, out, err = launching.call(monkeypatch, capsys, *line)
    assert code == 0, err
    assert "[1/" in out and "to train the best:\n  mdm train " in out
    runs = {path.name for path in (workdir / "runs").iterdir()}
    record = json.loads((workdir / "tune.json").read_text("utf-8"))
    assert "3-seed0-as_begun" in runs and len(record["tried"]) == 2
    if record["best_run"]:  # else the start was
        assert "--workdir=NEW --config.gaussian.lognormal.mean=" in out
        assert (workdir / record["best_run"] / "spacing" / "dpm_solver_pp_2m-2.json").exists()
    monkeypatch.setattr(train, "train", None)
    code, again, err = launching.call(monkeypatch, capsys, *line)
    assert code == 0, err
    assert "[1/" in again and (workdir / "tune.md").read_text("utf-8").strip() in again
    code, _, err = launching.call(monkeypatch, capsys, *line, "--config.seed=1")
    assert code == 2 and "was begun with another plan" in err
