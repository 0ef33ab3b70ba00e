"""Whole runs in processes of their own: train, kill, interrupt, resume, evaluate, sample."""

import dataclasses
import errno
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import chex
import jax
import jax.numpy as jnp
import launching
import numpy as np
import pytest
from absl import flags
from event_files import read_values
from launching import DIGITS, QUICKSTART

from mdm_jax import plots, samplers, training
from mdm_jax.launch import __main__ as command
from mdm_jax.launch import main, presets
from mdm_jax.launch.build import load_parameters, make_experiment
from mdm_jax.launch.modes import evaluate, train
from mdm_jax.launch.modes.sample import show_samples
from mdm_jax.launch.workdir import WorkdirError, git_revision, saved_config

pytestmark = pytest.mark.first

STEPS = 30
ARGUMENTS = [
    f"--config={QUICKSTART}",
    f"--config.train.steps={STEPS}",
    "--config.train.log_every=1",
    "--config.train.checkpoint_every=5",
    "--config.train.evaluate_every=10",
    "--config.optimizer.name=adamw",  # compiles in half the time
    "--config.optimizer.peak=0.01",
]
SAVED_OFTEN = [*ARGUMENTS, "--config.train.checkpoint_every=2"]
"""So often that a kill may well come in a save."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(workdir, stdout, stderr) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("launch") / "whole, lr[0.1]"
    return workdir, *launching.finish(*ARGUMENTS, f"--workdir={workdir}")


def _restored(workdir):
    """Everything in the newest checkpoint, without the classes that made it."""
    checkpoints = training.Checkpoints(workdir / "checkpoints")
    step = checkpoints.steps()[-1]
    manifest = json.loads((workdir / f"checkpoints/manifests/last/{step}.json").read_text())
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = {}
    for name, form in manifest["arrays"].items():
        dtype, shape = form.split("[")
        leaves[name] = jax.ShapeDtypeStruct(
            json.loads(f"[{shape}"), jnp.dtype(dtype), sharding=device
        )
    restored = checkpoints.restore_last(leaves)
    best = checkpoints.best_metrics()
    checkpoints.close()
    return restored, best


def _records(workdir):
    records = training.read_metrics(workdir / "metrics.jsonl")
    return [record for record in records if record["kind"] in ("train", "evaluate")]


def _assert_same_run(workdir, whole):
    (found, best), (expected, expected_best) = _restored(workdir), _restored(whole)
    assert int(found.state["step"]) == STEPS
    assert any(name.startswith("params/") for name in found.state)
    chex.assert_trees_all_equal(found.state, expected.state)
    assert found.position == expected.position
    assert found.notes == expected.notes
    assert best == expected_best
    assert _records(workdir) == _records(whole)
    first, second = (json.loads((w / "evaluation.json").read_text()) for w in (workdir, whole))
    assert first == second


def _run_until(workdir, pattern, then, arguments=ARGUMENTS):
    """Starts the run, calls ``then(process)`` when a line of stderr matches; (status, out, err)."""
    process = launching.start(*arguments, f"--workdir={workdir}")
    seen = []
    for line in process.stderr:
        seen.append(line)
        if re.search(pattern, line):
            then(process)
            break
    out, rest = process.communicate(timeout=300)
    return process.returncode, out, "".join(seen) + rest


# --- the whole path -----------------------------------------------------------------------------


def test_a_run_ends_with_a_report(whole):
    workdir, out, err = whole
    assert "starting from step 0" in out and f"step {STEPS}/{STEPS} loss" in err
    numbers = json.loads((workdir / "evaluation.json").read_text())
    for part in (
        f"{numbers['bits_per_unit']:.3f} ± {numbers['standard_error_bits_per_unit']:.3f} bits per",
        f"unigram entropy of the split {numbers['unigram_bits_per_unit']:.3f}",
        "bigram entropy ",  # unknown: too few rows
        f"held-out test split: {numbers['bits_per_unit']:.3f} ±",
        "words occur in the training text",
        "tensorboard --logdir",
        str(workdir / "plots" / "training.png"),
        str(workdir / "checkpoints"),
    ):
        assert part in out
    assert out.count("--- free ---") == 2 and out.count("--- infilled ---") == 1
    given = re.search(r"^\[given\] (.*?)\n\[original\] (.*?)\n(.*?)\n", out, re.S | re.M).groups()
    assert given[0].count("▁") == 8
    assert all(g in ("▁", o) for g, o in zip(given[0], given[1]))
    assert all(g in ("▁", t) for g, t in zip(given[0], given[2])) and "▁" not in given[2]
    assert (
        out.strip() in (workdir / "report.txt").read_text()
        or "held-out" in (workdir / "report.txt").read_text()
    )
    losses = [r["loss"] for r in _records(workdir) if r["kind"] == "train"]
    assert len(losses) == STEPS and np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    for path in ("plots/training.png", "plots/levels.png"):
        assert (workdir / path).read_bytes().startswith(b"\x89PNG")
    assert "evaluating test: 8/8 rows in" in err and "%|" not in err  # lines, not a bar


def test_tensorboard_has_the_rate_the_samples_and_the_scores(whole):
    workdir, _, _ = whole
    found = read_values(workdir / "tensorboard")
    numbers = json.loads((workdir / "evaluation.json").read_text())
    ((step, score),) = found["test/bits_per_unit"]
    assert step == numbers["step"]
    assert score.simple_value == pytest.approx(numbers["bits_per_unit"], rel=1e-6)
    (_, text) = found["samples/text_summary"][-1]
    assert text.tensor.string_val[0].decode().count("--- free ---") == 2
    rates = {step: value.simple_value for step, value in found["monitor/learning_rate"]}
    c = saved_config(workdir).optimizer
    schedule = training.warmup_cosine(0.01, c.warmup_steps, STEPS, c.final_fraction)
    expected = {step: float(schedule(step - 1)) for step in range(1, STEPS + 1)}
    assert rates == pytest.approx(expected, rel=1e-5)
    assert len(found["monitor/level_nats_per_token"][-1][1].histo.bucket) == 30
    assert not [tag for tag in found if re.search(r"_\d\d$", tag)]


def test_the_workdir_says_what_made_it(whole):
    workdir, _, _ = whole
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["steps"] == STEPS and config["model"]["width"] == 16
    assert set(config) >= {"data", "model", "law", "variance", "optimizer", "train", "seed"}
    run = json.loads((workdir / "run.json").read_text())
    assert run["seed"] == 0
    for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        assert run["packages"][name] == importlib.metadata.version(name)
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?|not a git checkout", run["git_revision"])
    assert re.match(r"\d{4}-\d\d-\d\dT", run["started"])
    assert re.fullmatch(r"3\.\d+\.\d+\S*", run["python"])


def test_evaluate_and_sample_need_nothing_but_the_workdir(whole, tmp_path, monkeypatch, capsys):
    """In this process, whose programs may round otherwise than the run's."""
    workdir, _, _ = whole
    launching.on_one_device(monkeypatch)
    before = json.loads((workdir / "evaluation.json").read_text())
    config = (workdir / "config.json").read_text()
    code, out, _ = launching.call(monkeypatch, capsys, f"--workdir={workdir}", "--mode=evaluate")
    assert code == 0
    after = json.loads((workdir / "evaluation.json").read_text())
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before)):
        assert new == (old if isinstance(old, str) else pytest.approx(old, rel=1e-6))
    assert f"test: {before['bits_per_unit']:.4f} ± " in out
    assert "bits of a masked token by masking rate" in out
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The ▁▁▁▁ of", "utf-8")
    samples = sorted((workdir / "samples").iterdir())
    code, out, _ = launching.call(
        *(monkeypatch, capsys, f"--workdir={workdir}", "--mode=sample"),
        f"--config.sample.prompts={prompts}",
    )
    assert code == 0
    found = re.search(r"--- infill ---\nThe ⟦.{4}⟧ of⟦(.*)⟧", out, re.DOTALL)
    assert found and len(found[1]) == 32 - 11
    assert len(list((workdir / "samples").iterdir())) == len(samples) + 2  # never over older ones
    # An approximate cache that is always refreshed changes nothing.
    code, cached, _ = launching.call(
        *(monkeypatch, capsys, f"--workdir={workdir}", "--mode=sample"),
        f"--config.sample.prompts={prompts}",
        "--config.sample.approximate_cache=dual",
        "--config.sample.cache_refresh=1",
    )
    assert code == 0 and found[0] in cached
    assert (workdir / "config.json").read_text() == config


# --- kills and interrupts -----------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_moments_the_run_ends_the_same(whole, tmp_path):
    """SIGKILL twice, at a random step and a random time after it, then to the end."""
    rng = np.random.default_rng(7)
    workdir = tmp_path / "killed"
    for low, high in ((3, 12), (14, 22)):
        step, delay = int(rng.integers(low, high)), float(rng.uniform(0, 0.04))

        def kill(process, delay=delay):
            time.sleep(delay)
            process.kill()

        code, _, err = _run_until(workdir, rf"step {step}/{STEPS} ", kill, SAVED_OFTEN)
        assert code == -signal.SIGKILL, err
        assert not (workdir / "evaluation.json").exists()
    out, _ = launching.finish(*SAVED_OFTEN, f"--workdir={workdir}")
    resumed = int(re.search(r"resuming at step (\d+)", out)[1])
    assert 12 <= resumed < STEPS and resumed % 2 == 0
    _assert_same_run(workdir, whole[0])


def test_interrupted_the_run_saves_and_says_how_to_resume(tmp_path, monkeypatch, capsys):
    """In this process; that a run goes on to the same end: the slow test, and those of the loop."""
    launching.on_one_device(monkeypatch)
    step, workdir = train.Running.step, tmp_path / "interrupted"

    def interrupting(self, state, batch):
        if int(state.step) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, state, batch)

    monkeypatch.setattr(train.Running, "step", interrupting)
    code, out, err = launching.call(monkeypatch, capsys, *ARGUMENTS, f"--workdir={workdir}")
    assert code == 130, err
    assert "the same command line resumes" in out
    assert out.strip().endswith(f"{' '.join(ARGUMENTS)} --workdir={workdir}")
    assert 2 <= int(_restored(workdir)[0].state["step"]) < 5


@pytest.mark.slow
def test_interrupted_the_run_saves_says_how_to_resume_and_ends_the_same(whole, tmp_path):
    workdir = tmp_path / "interrupted"
    code, out, err = _run_until(
        workdir, rf"step 6/{STEPS} ", lambda process: process.send_signal(signal.SIGINT)
    )
    assert code == 130 and "Traceback" not in err
    assert "once more to stop without saving" in err
    command = out.strip().splitlines()[-1].strip()
    assert "the same command line resumes" in out
    assert command == f"python -m experiments.launch {' '.join(ARGUMENTS)} --workdir={workdir}"
    saved = int(_restored(workdir)[0].state["step"])
    assert 6 <= saved < STEPS
    out, _ = launching.finish(*ARGUMENTS, f"--workdir={workdir}")
    assert f"resuming at step {saved}" in out
    _assert_same_run(workdir, whole[0])


# --- changed settings and damage ----------------------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_longer_when_told_to_and_refuses_another_stream(whole, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(whole[0], workdir)
    longer = [a.replace(f"steps={STEPS}", f"steps={STEPS + 4}") for a in ARGUMENTS]
    allowed = [f"--workdir={workdir}", "--allow_config_change"]
    out, err = launching.finish(*ARGUMENTS, *allowed, "--config.train.batch_size=4", code=2)
    assert "error: the checkpoint's data stream cannot be continued" in err
    assert "batch size: saved 8, now 4" in err and "Traceback" not in err
    out, err = launching.finish(*ARGUMENTS, *allowed, "--config.model.width=32", code=2)
    assert (
        "does not fit this configuration" in err
        and "float32[16, 16], wanted float32[32, 32]" in err
    )
    assert "Traceback" not in err and "Event loop" not in err
    # Refused: the directory is still the old config's.
    assert not (workdir / "config.1.json").exists()
    state = next(p for p in (workdir / "checkpoints/last/30").rglob("*") if p.stat().st_size > 9999)
    state.write_bytes(state.read_bytes()[:-7])
    out, err = launching.finish(*longer, *allowed)
    assert state.name in err and "damaged-last-30-0" in err  # named, and the one before is used
    assert "resuming at step 25" in out
    assert int(_restored(workdir)[0].state["step"]) == STEPS + 4
    assert json.loads((workdir / "config.1.json").read_text())["train"]["steps"] == STEPS


def test_damaged_best_parameters_give_way_to_the_last(whole, tmp_path, caplog):
    workdir = tmp_path / "copy"
    shutil.copytree(whole[0], workdir)
    experiment = make_experiment(saved_config(workdir))
    best_step, best = load_parameters(experiment, workdir)
    (saved,) = (workdir / "checkpoints" / "best").iterdir()
    assert saved.name == str(best_step)
    next(p for p in saved.rglob("*") if p.stat().st_size > 5000).write_bytes(b"")
    step, last = load_parameters(experiment, workdir)
    assert step == STEPS and f"best/{best_step} is damaged" in caplog.text
    shutil.copytree(whole[0], tmp_path / "without", ignore=shutil.ignore_patterns("best*"))
    chex.assert_trees_all_equal(load_parameters(experiment, tmp_path / "without")[1], last)
    assert len(jax.tree.leaves(best)[0].sharding.device_set) == 8  # trained on one


# --- other data ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_on_a_mesh_draw_a_picture(tmp_path):
    """Two devices with a half of the parameters each; evaluated and sampled there as well."""
    workdir = tmp_path / "digits"
    out, _ = launching.finish(
        f"--config={DIGITS}", f"--workdir={workdir}", "--config.mesh.fsdp=2", devices=2
    )
    assert "{'data': 1, 'fsdp': 2, 'tensor': 1}" in out and "bits per dimension" in out
    (picture,) = (workdir / "samples").iterdir()
    assert picture.suffix == ".png" and str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    import matplotlib.image

    image = matplotlib.image.imread(picture)
    assert image.shape[0] > 50 and image[..., :3].std() > 0.01  # not a blank


@pytest.mark.slow
def test_pairs_are_answered(tmp_path):
    """Conditional data: the prompt is shown as given and comes back unchanged."""
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(9) for b in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    workdir = tmp_path / "pairs"
    out, _ = launching.finish(
        f"--config={QUICKSTART}",
        f"--workdir={workdir}",
        "--config.data.source=jsonl",
        f"--config.data.path={path}",
        "--config.data.prompt_length=6",
        "--config.data.answer_length=4",
        "--config.data.length=128",
        "--config.data.train_stride=1",
        "--config.sample.gap=0",
    )
    assert out.count("--- answer ---") == 2
    (samples,) = (workdir / "samples").glob("*.jsonl")
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        prompt = record["given"].split("=")[0] + "="
        assert re.fullmatch(r"\d\+\d=", prompt)
        assert record["text"].startswith(prompt) and "▁" not in record["text"]
        assert record["original"].startswith(prompt)
        assert record["given"] == prompt + "▁" * 4
    assert json.loads((workdir / "evaluation.json").read_text())["split"] == "test"


def test_samples_during_training_share_one_compiled_sampler(monkeypatch, tmp_path):
    made = []

    def generator(*_, **__):
        made.append(1)
        return lambda params, key, canvas, documents, numbers: np.zeros_like(canvas)

    monkeypatch.setattr(samplers, "make_generator", generator)
    writer = training.MetricWriter(tmp_path)
    running = train.Running(make_experiment(presets.quickstart("smoke")))
    stopping = training.EarlyStopping(training.StopSettings())
    hooks = train.make_hooks(running, tmp_path, writer, stopping, {})
    for step in (1, 2):
        hooks.sample(step, {}, lambda: None)
    writer.close()
    assert len(made) == 1
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step-1.jsonl", "step-1.txt", "step-2.jsonl", "step-2.txt"]


def test_two_samplings_at_once_keep_both(tmp_path):
    """The second one is done while the first still generates."""
    experiment = make_experiment(presets.quickstart("smoke"))

    def draw(generate):
        made = (experiment.dataset, experiment.jobs, generate, tmp_path)
        return show_samples(*made, 3, {}, jax.random.key(0))["files"]

    found = []

    def second(_params, _key, canvas, _documents):
        return np.full_like(canvas, 5)

    def first(_params, _key, canvas, _documents):
        found.append(draw(second))
        return np.full_like(canvas, 6)

    found.append(draw(first))
    names = [[pathlib.Path(path).name for path in paths] for paths in found]
    assert names == [["step-3.jsonl", "step-3.txt"], ["step-3-2.jsonl", "step-3-2.txt"]]
    texts = [json.loads(pathlib.Path(paths[0]).read_text().splitlines()[0]) for paths in found]
    assert texts[0]["text"][0] == experiment.dataset.tokenizer.decode([5])
    assert texts[1]["text"][0] == experiment.dataset.tokenizer.decode([6])


def test_results_that_cannot_be_written_are_printed(tmp_path, monkeypatch, capsys):
    """The numbers first, then what could not be written; samples likewise."""
    experiment = make_experiment(presets.quickstart("smoke"))
    numbers = {"bits_per_unit": 1.25, "standard_error_bits_per_unit": 0.5}
    family = dataclasses.replace(
        experiment.family, record=lambda _: numbers, details=lambda _: ["and more"], estimator=None
    )
    experiment = dataclasses.replace(
        experiment,
        family=family,
        evaluate=lambda *_: None,
        generate=lambda _params, _key, canvas, *_: np.full_like(canvas, 5),
    )
    monkeypatch.setattr(evaluate, "load_parameters", lambda *_: (3, {}))
    monkeypatch.setattr(main.sample_flags, "read", lambda: None)  # no command line
    (tmp_path / "evaluation.json").mkdir()
    with pytest.raises(WorkdirError, match="evaluation.json could not be written"):
        main._evaluate(experiment, tmp_path)
    assert capsys.readouterr().out == "test: 1.2500 ± 0.5000 bits per character\nand more\n"
    (tmp_path / "samples").touch()
    with pytest.raises(WorkdirError, match="samples/step-3.jsonl could not be written"):
        main._sample(experiment, tmp_path)
    assert "--- free ---" in capsys.readouterr().out

    class Full:
        def savefig(self, *_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def add_subplot(self):
            return None

    record = {"unit": "character", "unigram_bits_per_unit": 1.0, "bigram_bits_per_unit": 1.0}
    train = {"step": 1, "kind": "train", "loss": 1.0, "bits_per_unit": 1.0}
    monkeypatch.setattr(plots.style, "new_figure", lambda _: Full())
    monkeypatch.setattr(plots, "training_curve", lambda *_, **__: None)
    monkeypatch.setattr(training, "read_metrics", lambda _: [train])
    with pytest.raises(WorkdirError, match="plots could not be written: No space left"):
        evaluate.write_plots(tmp_path, {"process": "autoregressive"}, record)


HELP = ("the same line resumes", "--config.train.steps=2000", "--workdir:", "--mode:")


def test_help_fits_a_screen(monkeypatch, capsys):
    code, out, _ = launching.call(monkeypatch, capsys, "--help")
    assert code == 0 and [part for part in HELP if part not in out] == []
    assert len(out.splitlines()) <= 40 and max(map(len, out.splitlines())) <= 80
    own = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(main)} - {"config"}
    assert all(f"--{name}" in out for name in own) and all(name in out for name in presets.PRESETS)


@pytest.mark.slow
def test_help_is_printed():
    for flag in ("--help", "--helpfull"):
        out, err = launching.finish(flag)
        assert [
            part for part in HELP[2:] if part not in out.replace(" ", "") + out
        ] == [] and not err


def test_alone_it_says_what_to_do(capsys):
    code, err = command.answer(["mdm"]), capsys.readouterr().err
    assert code == 2 and "mdm --help" in err and "mdm train    --config=quick" in err


def test_workdir_of_the_repository_is_left_alone():
    """Runs above write where they are told to and nowhere else."""
    assert not (pathlib.Path(launching.ROOT) / "metrics.jsonl").exists()


# --- what the trainer watches and adapts ----------------------------------------------------------


@pytest.mark.slow
def test_clipping_is_searched_at_evaluation_and_survives_an_interrupt(tmp_path):
    """Stopped after the first search and resumed: the same choices, ranges and parameters."""
    arguments = [
        f"--config={QUICKSTART}",
        "--config.train.steps=8",
        "--config.train.log_every=2",
        "--config.train.evaluate_every=4",
        "--config.train.checkpoint_every=4",
        "--config.variance.order=('stratified', 'clipped_adaptive')",
        "--config.clip_search.criterion=relative_variance",
        "--config.clip_search.batches=2",
        "--config.evaluate.batch_size=4",
        "--config.train.monitors=('levels', 'gradient_noise')",
    ]
    out, _ = launching.finish(*arguments, f"--workdir={tmp_path / 'whole'}")
    assert "[truncated]" in out
    lines = [json.loads(x) for x in (tmp_path / "whole/clip_search.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8]
    assert all(len(line["scores"]) == 36 for line in lines)
    state = _restored(tmp_path / "whole")[0].state
    low, high = (float(state[f"variance/clipped_adaptive/{n}"]) for n in ("low", "high"))
    np.testing.assert_allclose([low, high], [lines[-1]["low"], lines[-1]["high"]], rtol=1e-6)

    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    for name in ("checkpoints/last/8", "checkpoints/manifests/last/8.json"):
        path = stopped / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    launching.finish(*arguments, f"--workdir={stopped}")
    assert (stopped / "clip_search.jsonl").read_text() == (
        tmp_path / "whole/clip_search.jsonl"
    ).read_text()
    chex.assert_trees_all_equal(_restored(stopped)[0].state, state)
    for kind in ("monitor", "adapt", "train"):
        first, second = (
            training.read_metrics(w / "metrics.jsonl", kind) for w in (stopped, tmp_path / "whole")
        )
        assert first == second
    record = training.read_metrics(stopped / "metrics.jsonl", "monitor")[-1]
    for name in ("normalised_loss", "gradient_noise"):
        assert np.isfinite(record[name])


def test_too_few_validation_rows_for_a_clip_search_are_refused_early(tmp_path, monkeypatch, capsys):
    code, _, err = launching.call(
        monkeypatch,
        capsys,
        f"--config={QUICKSTART}",
        f"--workdir={tmp_path / 'run'}",
        "--config.variance.order=('clipped_adaptive',)",
        "--config.evaluate.batch_size=100000",
    )
    assert code != 0 and "at least 2 validation batches" in err
    assert not (tmp_path / "run").exists()


def test_the_revision_is_not_that_of_a_repository_around_an_installed_package(tmp_path):
    package = tmp_path / "venv" / "mdm_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")

    def git(*arguments):
        settings = ["-c", "user.name=x", "-c", "user.email=x@y"]
        subprocess.run(
            ["git", *settings, *arguments], cwd=tmp_path, check=True, capture_output=True
        )

    assert git_revision(package) == "not a git checkout"
    git("init")
    git("commit", "--allow-empty", "--message=around")
    assert git_revision(package) == "not a git checkout"
    git("add", ".")
    git("commit", "--message=ours")
    assert re.fullmatch(r"[0-9a-f]{40}", git_revision(package))
    (package / "__init__.py").write_text("changed")
    assert git_revision(package).endswith("+changes")
