"""Sweeps: what is planned, skipped, refused and tabulated, with runs that are made up."""

import json
import os
import pathlib
import signal
import sys

import numpy as np
import pytest

from mdm_jax import files
from mdm_jax.launch import command_line, presets, source
from mdm_jax.launch.command_line import CommandLineError
from mdm_jax.launch.modes import sweep
from mdm_jax.launch.workdir import WorkdirError, resolved

MODEL = pathlib.Path(__file__).parents[2] / "data" / "hub" / "a2d_qwen3-1"
OVER = "seed=0,1,2;optimizer.peak=1e-3,3e-3"
SCRIPT = """
import json, os, pathlib, signal, sys, time
workdir = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2])
made = pathlib.Path(sys.argv[1])
with (made / "started").open("a") as file:
    file.write(workdir.name + "\\n")
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "config.json").write_text((made / f"{workdir.name}.json").read_text())
plan = json.loads((made / "plan.json").read_text())[workdir.name]
print("step 3/12 loss 1.5", flush=True)
if plan == "fail":
    sys.exit(f"error: {workdir.name} has no luck")
if plan == "stop":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(20)
(workdir / "evaluation.json").write_text(json.dumps({"bits_per_unit": plan, "levels": {}}))
(workdir / "report.txt").write_text("done")
"""


@pytest.fixture
def made(tmp_path):
    """``run(plans, over) -> exit status`` of a sweep in tmp_path/sweep, and what was started."""
    directory = tmp_path / "made"
    directory.mkdir()
    (directory / "script.py").write_text(SCRIPT)

    def run(plans, over=OVER, steps=None):
        config = presets.quickstart("smoke")
        if steps is not None:
            config.train.steps = steps
        runs = sweep.plan(config, over)
        for each in runs:
            (directory / f"{each.name}.json").write_text(json.dumps(resolved(each.config)))
        (directory / "plan.json").write_text(json.dumps(dict(zip((r.name for r in runs), plans))))
        (directory / "started").write_text("")
        command = [sys.executable, str(directory / "script.py"), str(directory)]
        code = sweep.sweep(runs, files.as_path(tmp_path / "sweep"), command, lambda _: None)
        return code, (directory / "started").read_text().splitlines()

    return run


def test_a_plan_is_every_combination_with_seeds_last():
    config = presets.quickstart("smoke")
    runs = sweep.plan(config, OVER)
    assert [run.name for run in runs][:3] == [
        "seed=0,optimizer.peak=1e-3",
        "seed=0,optimizer.peak=3e-3",
        "seed=1,optimizer.peak=1e-3",
    ]
    assert len(runs) == 6
    assert (runs[1].config.seed, runs[1].config.optimizer.peak) == (0, 3e-3)
    assert {run.group for run in runs} == {"optimizer.peak=1e-3", "optimizer.peak=3e-3"}
    assert config.optimizer.peak == presets.quickstart("smoke").optimizer.peak
    (one, two) = sweep.plan(config, "variance.order=('stratified','mirror'),auto")
    assert one.config.variance.order == ("stratified", "mirror")
    assert two.config.variance.order == ("auto",)
    assert "/" not in one.name and one.name != two.name
    assert sweep.plan(config, "config.optimizer.name=adamw")[0].config.optimizer.name == "adamw"


@pytest.mark.parametrize(
    "over, error, words",
    [
        ("", ValueError, "--over is required"),
        ("seed", ValueError, "not NAME=VALUE"),
        ("seed=1,", ValueError, "not NAME=VALUE"),
        ("seed=1,1", ValueError, "a value twice"),
        ("seed=1;seed=2", ValueError, "named twice"),
        ("sed=1", CommandLineError, "did you mean --config.seed"),
        ("optimizer=1", ValueError, "is a section"),
        ("seed=one", TypeError, "seed=one"),
        ("optimizer.peak=-1", ValueError, "optimizer.peak must be a number"),
    ],
)
def test_what_cannot_be_planned_is_refused(over, error, words):
    with pytest.raises(error, match=words):
        sweep.plan(presets.quickstart("smoke"), over)


@pytest.mark.parametrize("given", ["seed", "seed=1,1", "optimizer=1", "seed=one"])
def test_errors_name_the_flag_that_settings_were_given_by(given):
    with pytest.raises((ValueError, TypeError), match="^--tune: "):
        sweep.plan(presets.quickstart("smoke"), given, "--tune")


def test_a_failed_run_is_recorded_the_rest_goes_on_and_finished_ones_are_skipped(made, tmp_path):
    scores = [2.0, 1.0, 2.2, 1.1, "fail", 1.2]
    code, started = made(scores)
    assert code == 2 and len(started) == 6
    record = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [run["status"] for run in record["runs"]].count("finished") == 5
    failed = next(run for run in record["runs"] if run["status"] == "failed")
    assert failed["reason"] == f"{failed['name']} has no luck"
    code, started = made([*scores[:4], 2.1, 1.2])
    assert code == 0 and started == [failed["name"]]
    record = json.loads((tmp_path / "sweep/sweep.json").read_text())
    base, other = record["scores"]["bits_per_unit"].values()
    np.testing.assert_allclose(base["mean"], 2.1)
    np.testing.assert_allclose(base["standard_deviation"], 0.1)
    np.testing.assert_allclose(other["against_baseline"]["differences"], [-1, -1.1, -0.9])
    assert other["against_baseline"]["significant"]
    table = (tmp_path / "sweep/sweep.md").read_text()
    assert "| optimizer.peak=1e-3 | 3 | 2.1000 ± 0.1000 | 2.2 |" in table
    assert "| -1.0000 [-1.2484, -0.7516] **" in table  # Student's: 4.303 * 0.1 / sqrt(3)
    assert made([*scores[:4], 2.1, 1.2]) == (0, [])
    with pytest.raises(WorkdirError, match=r"train.steps: 12 -> 9"):
        made(scores, steps=9)
    assert len(made([*scores[:4], 2.1, 1.2], steps=99)[1]) == 6  # raised: all go on


def test_a_run_from_a_model_is_known_by_what_that_fixes(tmp_path):
    config = presets.finetune("smoke")
    config.model.source = str(MODEL)
    (run,) = sweep.plan(config, "seed=7")
    directory = tmp_path / "runs" / run.name
    directory.mkdir(parents=True)
    own = source.filled(run.config, source.read(run.config))
    assert own.model.width != config.model.width
    (directory / "config.json").write_text(json.dumps(resolved(own)))
    (directory / "evaluation.json").write_text('{"bits_per_unit": 1.0}')
    (directory / "report.txt").write_text("done")
    assert sweep.sweep([run], files.as_path(tmp_path), ["false"], lambda _: None) == 0
    run.config.train.batch_size = 99
    with pytest.raises(WorkdirError, match=r"another config:\n  train.batch_size: \d+ -> 99\nName"):
        sweep.sweep([run], files.as_path(tmp_path), ["false"], lambda _: None)


def test_a_stop_request_reaches_the_run_once_and_the_rest_waits(made, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    code, started = made([1.0, "stop", 1.0], over="seed=0,1,2")
    assert code == sweep.STOPPED and started == ["seed=0", "seed=1"]
    assert signal.getsignal(signal.SIGINT) is before and os.getpid()
    record = json.loads((tmp_path / "sweep/sweep.json").read_text())
    assert [run["status"] for run in record["runs"]] == ["finished", "interrupted", "waiting"]
    code, started = made([1.0, 1.0, 1.0], over="seed=0,1,2")
    assert code == 0 and started == ["seed=1", "seed=2"]


def test_a_directory_that_is_no_sweeps_is_refused(made, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/notes.txt").write_text("mine")
    with pytest.raises(WorkdirError, match="holds notes.txt, which no sweep made"):
        made([1.0], over="seed=0")


def test_flags_of_the_sweep_are_not_those_of_its_runs():
    given = ["sweep", "--workdir", "a", "--config=quickstart", "--over=seed=1", "-mode=sweep"]
    given += ["--config.train.steps=3"]
    kept = command_line.without(given, ("mode", "workdir", "over"))
    assert kept == ["sweep", "--config=quickstart", "--config.train.steps=3"]
