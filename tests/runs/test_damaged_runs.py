"""Runs whose files are damaged, missing, planted or in a bucket: refused by name, never lost."""

import functools
import importlib.util
import json
import shutil
import sys
import types

import jax.numpy as jnp
import launching
import pytest
import saved_run

from mdm_jax import training
from mdm_jax.launch import presets
from mdm_jax.launch import workdir as launch_workdir
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.modes import train
from mdm_jax.launch.workdir import WorkdirError
from mdm_jax.training.checkpoints import CheckpointError

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def launch(monkeypatch, capsys):
    """Calls the launcher in this process; returns (exit status, stdout, stderr)."""
    return functools.partial(launching.call, monkeypatch, capsys)


@pytest.fixture(scope="module")
def experiment(one_device):
    return make_experiment(presets.quickstart("smoke"))


@pytest.fixture
def run(experiment, tmp_path):
    """The directory of a run of four steps."""
    saved_run.save(experiment, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def start(experiment, monkeypatch):
    """Starts training up to the first step; returns the step that it would begin with."""
    begun = []
    step = types.SimpleNamespace(describe=lambda: "", call=None)
    monkeypatch.setattr(train.training, "compile_step", lambda *_: step)
    monkeypatch.setattr(train.training, "train", lambda _, state, *__, **___: begun.append(state))
    state = types.SimpleNamespace(step=jnp.int32(0))
    monkeypatch.setattr(train, "initial_state", lambda _: state)

    def call(workdir, **options):
        train.train(experiment, workdir, **options)
        return int(begun[-1].step)

    return call


# --- histories ----------------------------------------------------------------------------------


def _grid(folder):
    folder.mkdir(exist_ok=True)
    return folder / "ancestral-4.json"


def _damage(run):
    for path in (run / "checkpoints" / "last").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def _remove(run):
    shutil.rmtree(run / "checkpoints")


def _empty(run):
    shutil.rmtree(run / "checkpoints" / "last" / str(saved_run.STEP))


@pytest.mark.parametrize(
    "lose", [_damage, *(pytest.param(f, marks=pytest.mark.slow) for f in (_remove, _empty))]
)
def test_a_history_without_a_checkpoint_waits_for_restart(run, start, lose):
    metrics = (run / "metrics.jsonl").read_bytes()
    lose(run)
    launch_workdir.write_json(_grid(run / "spacing"), {})
    for _ in range(3):
        with pytest.raises((CheckpointError, WorkdirError), match="--restart"):
            start(run)
        assert (run / "metrics.jsonl").read_bytes() == metrics
    assert start(run, restart=True) == 0
    assert (run / "metrics.1.jsonl").read_bytes() == metrics
    assert (run / "metrics.jsonl").read_bytes() == b""
    assert (run / "checkpoints.1").exists() and (run / "tensorboard.1").exists()
    # A grid that was found for the old parameters is not taken for the new ones.
    assert not (run / "spacing").exists() and _grid(run / "spacing.1").exists()
    (run / "metrics.jsonl").write_bytes(metrics)
    assert start(run) == 0  # killed before its first save: the same line starts over
    assert start(run, restart=True) == 0 and (run / "tokenizer.2.json").exists()


def test_killed_before_the_first_save_the_same_line_starts_over(run, start):
    _remove(run)
    checkpoints = training.Checkpoints(run / "checkpoints")
    checkpoints.begin()
    checkpoints.close()
    metrics = (run / "metrics.jsonl").read_bytes()
    assert start(run) == 0
    assert (run / "metrics.1.jsonl").read_bytes() == metrics  # even so


def test_restart_is_for_training_and_not_for_the_line_that_resumes(launch, run):
    code, _, err = launch(f"--workdir={run}", "--mode=evaluate", "--restart")
    assert code == 2 and "--restart is for --mode=train" in err
    for flag in ("--restart", "-restart=1", "--restart=True"):
        given = ["mdm", "train", flag, f"--workdir={run}"]
        assert launch_workdir.command(given) == f"mdm train --workdir={run}"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("experiments.study.__main__", "python -m experiments.study --suite=small"),
        ("mdm_jax.launch.__main__", "python -m mdm_jax.launch --suite=small"),
        ("experiments.launch", "python -m experiments.launch --suite=small"),
        (None, "python there/program.py --suite=small"),
    ],
)
def test_the_recorded_line_starts_the_program_that_ran(module, line, monkeypatch):
    spec = importlib.util.find_spec(module) if module else None
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert launch_workdir.command(["there/program.py", "--suite=small"]) == line
    assert launch_workdir.command(["/bin/mdm", "train"]) == "mdm train"


# --- damaged files ------------------------------------------------------------------------------


CONFIGS = {
    "empty": (b"", "not JSON"),
    "cut": (b"{", "not JSON"),
    "bytes": (b'{"seed": 1, "\xff": 2}', "utf-8"),
    "list": (b"[3]", "[3] instead of a group of settings"),
    "section": (b'{"train": 3}', "train is 3 instead of a group of settings"),
    "type": (b'{"train": {"steps": "abc"}}', "train.steps is 'abc'"),
    "seed": (b'{"seed": "abc"}', "seed is 'abc'"),
}


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_damaged_config_is_named(launch, tmp_path, kind, mode):
    content, reason = CONFIGS[kind]
    (tmp_path / "config.json").write_bytes(content)
    config = [f"--config={launching.QUICKSTART}"] if mode == "train" else []
    code, _, err = launch(f"--workdir={tmp_path}", f"--mode={mode}", *config)
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert f"{tmp_path / 'config.json'} is damaged: " in err and reason in err
    assert (tmp_path / "config.json").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


def test_a_config_of_an_earlier_release_lacks_settings(tmp_path):
    config = presets.quickstart("smoke")
    saved = launch_workdir.resolved(config)
    del saved["sample"], saved["train"]["keep_last"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert launch_workdir.saved_config(tmp_path).model == config.model


@pytest.mark.parametrize("cut", [pytest.param(0, marks=pytest.mark.slow), 20, -1])
def test_a_tokenizer_cut_short_is_named_before_training(run, start, monkeypatch, cut):
    monkeypatch.setattr(train, "_continue", lambda restored, *_: (restored.state, {}))
    assert start(run) == saved_run.STEP
    path = run / "tokenizer.json"
    content = path.read_text("utf-8")
    path.write_text(content[:cut] if cut >= 0 else content.replace("e", ""), "utf-8")
    damaged = path.read_bytes()
    with pytest.raises((WorkdirError, ValueError), match=r"run/tokenizer\.json"):
        start(run, restart=False)
    assert path.read_bytes() == damaged


def test_notes_that_are_not_what_was_written_are_refused(run, start):
    """As in manifests of earlier releases, which had no sum of their own."""
    with pytest.raises(CheckpointError, match="notes of the checkpoint of step 4 are not those"):
        start(run)


# --- planted links ------------------------------------------------------------------------------


def test_links_planted_in_a_new_directory_are_not_followed(tmp_path, experiment):
    target, run = tmp_path / "precious", tmp_path / "run"
    target.write_text("precious")
    run.mkdir()
    for name in ("config", "config.json", "run", "tokenizer", "metrics"):
        (run / f"{name}.partial").symlink_to(target)
    launch_workdir.check(run, experiment.config)
    launch_workdir.claim(run, experiment.config)
    experiment.dataset.tokenizer.save(run / "tokenizer.json")
    assert launch_workdir.read_config(run)["seed"] == 0
    (run / launch_workdir.FILE).symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"), launch_workdir.training_lock(run):
        pass
    assert target.read_text() == "precious"
    assert len(list(run.glob("*.partial"))) == 5  # and none of our own is left


# --- buckets and unusual names ------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_in_a_bucket_is_trained_and_evaluated(launch, bucket, caplog):
    workdir = "gs://bucket/runs/lr=0.1"
    arguments = [
        *(f"--config={launching.QUICKSTART}", f"--workdir={workdir}"),
        *("--config.model.width=4", "--config.model.num_heads=1", "--config.optimizer.name=adamw"),
        *("--config.train.log_every=1", "--config.train.checkpoint_every=2"),
        *("--config.train.evaluate_every=4", "--config.train.steps=4"),
    ]
    code, out, err = launch(*arguments)
    assert code == 0, err
    assert "starting from step 0" in out and "buckets have no locks" in caplog.text
    assert f"tensorboard --logdir {workdir}/tensorboard" in out
    code, out, err = launch(f"--workdir={workdir}", "--mode=evaluate")
    assert code == 0 and f"{workdir}/evaluation.json" in out, err
    run = bucket / "runs/lr=0.1"
    records = training.read_metrics(f"{workdir}/metrics.jsonl", "train")
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    made = {path.name for path in run.iterdir()}
    assert made == {
        *("config.json", "run.json", "tokenizer.json"),
        *("metrics.jsonl", "tensorboard", "checkpoints", "samples", "plots"),
        *("evaluation.json", "report.txt"),
    }
    assert (run / "plots/training.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((run / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize(
    "name", ["s3://bucket/run", "hf://x/y", "back\\slash", "gs://b/a#b", "gs://b/lr[0.1]"]
)
def test_a_place_that_cannot_hold_a_run_is_refused_at_once(launch, name):
    before = {path.name for path in launching.ROOT.iterdir()}
    code, _, err = launch(f"--config={launching.QUICKSTART}", f"--workdir={name}")
    assert code == 2 and name in err and len(err.strip().splitlines()) == 1
    assert {path.name for path in launching.ROOT.iterdir()} == before


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_without_its_package_a_bucket_is_refused_before_training(launch):
    code, _, err = launch(f"--config={launching.QUICKSTART}", "--workdir=gs://bucket/run")
    assert code == 2 and "gs://bucket/run cannot be reached" in err and "mdm_jax[bucket]" in err
    assert not (launching.ROOT / "gs:").exists()
