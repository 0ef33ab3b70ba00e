"""The stability study: its plan, its accounting, its statistics, and a suite killed and resumed."""

import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import launching
import numpy as np
import pytest
from variants import slow_except

from experiments.study import plots
from experiments.study import runs as study_runs
from experiments.study import table as study_table
from experiments.study.runs import Run
from experiments.study.suites import METHODS, SUITES, Suite, Task, tuning
from mdm_jax import rng
from mdm_jax.launch import config as launch_config
from mdm_jax.launch.auto.chain import transform
from mdm_jax.launch.workdir import WorkdirError, claim

pytestmark = pytest.mark.first

ROOT = pathlib.Path("study")


# --- plan and accounting


@pytest.mark.parametrize("name", METHODS)
def test_the_views_of_a_method_are_those_of_its_chain(name):
    config = launch_config.get_config()
    config.update_from_flattened_dict(dict(METHODS[name].settings))
    config.variance.order = METHODS[name].order
    assert transform(config, None).views == METHODS[name].views


@pytest.mark.parametrize("name", slow_except({"small"}, sorted(SUITES)))
def test_forward_passes_are_equal_and_the_rest_is_the_method(name):
    suite = SUITES[name]
    assert len(set(study_runs.plan(suite))) == len(study_runs.plan(suite))
    for task in suite.tasks:
        wanted = [Run(task, m, "passes", suite.seeds[0]) for m in suite.methods]
        found = {r: study_runs.planned_as(suite, r) for r in wanted}
        passes = {study_runs.forward_passes(suite, run) for run in found.values()}
        assert len(passes) == 1, task
        if "steps" not in suite.budgets:
            continue
        sizes = set()
        for run in wanted:
            more = study_runs.planned_as(suite, dataclasses.replace(run, budget="steps"))
            config = study_runs.configure(suite, more, ROOT)
            sizes.add((config.train.steps, config.train.batch_size))
            views = suite.methods[run.method].views
            assert study_runs.forward_passes(suite, more) == views * min(passes)
        assert len(sizes) == 1, task


def test_methods_share_seed_network_and_hyper_parameters():
    suite, free = SUITES["small"], {"variance", "corruption", "law", "process", "train"}
    configs = [
        study_runs.configure(suite, Run("text", m, "passes", 3), ROOT) for m in suite.methods
    ]
    for config in configs:
        for section in set(config) - free:
            assert config[section] == configs[0][section], section
        assert config.seed == 3


def test_fine_tuning_starts_from_the_pretraining_of_its_kind():
    suite = SUITES["small"]
    run = Run("sudoku4_noisy", "mirror", "passes", 0)
    source = study_runs.pretraining(suite, run)
    assert source in study_runs.plan(suite) and source.method == suite.pretrained_by
    config = study_runs.configure(suite, run, ROOT)
    assert config.train.init_from == str(study_runs.directory(ROOT, source))
    other = study_runs.pretraining(suite, dataclasses.replace(run, method="autoregressive"))
    assert other in study_runs.plan(suite) and other.method == "autoregressive"
    assert study_runs.pretraining(suite, Run("text", "mirror", "passes", 0)) is None


def test_a_part_of_a_suite_has_runs_of_the_whole():
    whole = SUITES["small"]
    part = study_runs.part(whole, ["sudoku4_noisy"], ["mirror", "standard"])
    runs = study_runs.plan(part)
    assert {(run.task, run.method) for run in runs} == {
        ("sudoku4_pretraining", "fixed_counts"),
        ("sudoku4_noisy", "standard"),
        ("sudoku4_noisy", "mirror"),
    }
    assert set(runs) < set(study_runs.plan(whole))
    for run in runs:
        own, other = (study_runs.configure(suite, run, ROOT) for suite in (part, whole))
        assert own.to_json() == other.to_json()
    assert not study_runs.part(whole, ["text"], []).pretrainings
    assert study_runs.part(whole, [], []) == whole


@pytest.mark.parametrize(
    ("tasks", "methods", "message"),
    [
        (["txt"], [], "unknown task of small 'txt'; did you mean 'text'"),
        ([], ["standard", "miror"], "unknown method of small 'miror'; did you mean 'mirror'"),
        ([], ["mirror"], "compared with standard, which must be among them, not only mirror"),
    ],
)
def test_parts_that_a_suite_does_not_have_are_refused(tasks, methods, message):
    with pytest.raises(ValueError, match=message):
        study_runs.part(SUITES["small"], tasks, methods)


def test_views_that_do_not_divide_a_batch_are_refused():
    tasks = {"t": Task("study.sudoku4", settings={"train.batch_size": 6})}
    suite = dataclasses.replace(SUITES["small"], tasks=tasks)
    with pytest.raises(ValueError, match="4 views do not divide the batch of 6"):
        study_runs.configure(suite, Run("t", "fixed_counts_rotated", "passes", 0), ROOT)


def test_tuning_is_of_the_baseline_on_other_seeds():
    suite = tuning(SUITES["small"], (0.01, 0.02), (100,))
    runs = [run for run in study_runs.plan(suite) if run.budget != study_runs.PRETRAINING]
    assert len(runs) == 2 * len(suite.tasks) and not set(suite.seeds) & set(SUITES["small"].seeds)
    peaks = {
        study_runs.configure(suite, run, ROOT).optimizer.peak for run in runs if run.task == "text"
    }
    assert peaks == {0.01, 0.02}


def test_a_traced_seed_gives_the_same_key():
    """So that one compiled step serves all seeds."""
    traced = jax.jit(lambda s: jax.random.key_data(rng.step_key(s, 5)))
    for seed in (0, 7, 2**31, 2**32 - 1):
        expected = jax.random.key_data(rng.step_key(seed, 5))
        assert np.array_equal(traced(np.uint32(seed)), expected)


# --- aggregation


def _record(seed, accuracy, total=(), views=1, failed=""):
    def part(value):
        groups = [value - 1, value + 1]
        return {"group_variances": groups, "unsettled": "", "signal": 2.0, "redraws": 2}

    points = [
        {"step": 10, "total": part(t), "noise": part(t / 2), "reference": part(8.0)} for t in total
    ]
    evaluation = None if failed else {"accuracy": accuracy, "bits_per_unit": 2 * accuracy}
    return {
        "seed": seed,
        "curve": {"forward_passes": [40, 80], "bits_per_unit": [2.0 + seed, 1.0 + seed]},
        "failed": failed,
        "evaluation": evaluation,
        "gradient": points,
        "training_seconds": 10.0 + seed,
        "steps": 20,
        "batch_size": 4,
        "views": views,
        "forward_passes": 80 * views,
    }


def _suite(score="accuracy"):
    methods = {name: METHODS[name] for name in ("standard", "ema", "mirror", "clipped")}
    tasks = {"t": Task("study.sudoku4", score)}
    return Suite(name="made up", tasks=tasks, methods=methods, seeds=(0, 1, 2))


def _found():
    standard = [_record(0, 0.5, [6.0, 4.0]), _record(1, 0.7), _record(2, 0.6)]
    mirror = [_record(0, 0.8, [3.0, 1.0], views=2), _record(1, 0.75), _record(2, 0.0, failed="NaN")]
    return {"standard": standard, "ema": standard, "mirror": mirror, "clipped": []}


def test_aggregation_by_hand():
    found = study_table.summarise(_suite(), "t", _found())
    s, m = found["standard"], found["mirror"]
    assert s["mean"] == pytest.approx(0.6) and s["standard_deviation"] == pytest.approx(0.1)
    assert s["worst"] == 0.5 and s["against_baseline"] is None and s["training_seconds"] == 11
    assert m["failed"] == [2] and m["mean"] == pytest.approx(0.775) and m["worst"] == 0.75
    assert m["worst_beats_best_of_baseline"] is True
    assert m["against_baseline"]["differences"] == pytest.approx([0.3, 0.05])  # by seed
    assert m["bits_per_unit"] == pytest.approx(1.55)
    assert found["ema"]["against_baseline"]["mean"] == 0
    assert found["clipped"] is None
    assert m["curves"]["1"] == {"forward_passes": [40, 80], "bits_per_unit": [3.0, 2.0]}
    last = m["gradient"][-1]
    assert [p["total"]["mean"] for p in m["gradient"]] == [3.0, 1.0]
    assert last["noise"]["mean"] == 0.5  # of a batch with half the rows
    assert last["noise_to_signal"] == 0.5
    assert last["forward_passes"] == 10 * 4 * 2
    # Groups are paired: (0, 2) over (7, 9), and over (3, 5) of the baseline's own.
    assert last["over_reference"]["ratio"] == 1 / 8
    assert m["total_over_baseline"]["ratio"] == m["noise_over_baseline"]["ratio"] == 1 / 4
    errors = np.array([0.0, 2.0]) - np.array([3.0, 5.0]) / 4
    error = np.sqrt(2 * np.sum(errors**2)) / 8
    assert m["total_over_baseline"]["standard_error"] == pytest.approx(error)
    assert (s["total_over_baseline"]["ratio"], s["total_over_baseline"]["standard_error"]) == (1, 0)


def test_a_score_in_bits_is_better_below():
    found = study_table.summarise(_suite("bits_per_unit"), "t", _found())
    assert found["standard"]["worst"] == 1.4 and found["mirror"]["worst"] == 1.6
    assert found["mirror"]["worst_beats_best_of_baseline"] is False


def test_passes_to_the_last_bound_of_the_baseline():
    def curve(*bits):
        return {"forward_passes": [10, 20, 30], "bits_per_unit": bits}

    base = {"0": curve(4.0, 3.0, 2.0), "1": curve(4.0, 3.0, 2.5)}
    own = {"0": curve(3.0, 1.0, 1.5), "1": curve(2.0, 2.0, 2.0), "9": curve(1.0, 1.0, 1.0)}
    found = study_table.share_of_passes(own, base)
    # Half way from 10 to 20, and at the first validation; of 30 passes. Seed 9 has no baseline.
    assert found["by_seed"] == pytest.approx({"0": 1 / 2, "1": 1 / 3})
    assert found["mean"] == pytest.approx(5 / 12)
    assert found["standard_error"] == pytest.approx(1 / 12)
    # Seed 1 may have reached it before.
    assert found["at_most"] and study_table._share(found) == "at most 42% ± 8%"
    once = study_table.share_of_passes({"0": own["0"]}, base)
    assert not once["at_most"] and study_table._share(once) == "50%"
    late = study_table.share_of_passes({"0": curve(4.0, 3.0, 2.1), "1": base["1"]}, base)
    assert late["by_seed"] == {"0": None, "1": 1.0} and late["mean"] is None
    assert study_table._share(late) == "reached by 1 of 2 seeds"
    assert study_table.share_of_passes({"9": own["9"]}, base) is None


@pytest.mark.parametrize("method", ["standard", "mirror"])
def test_runs_that_diverged_before_a_validation_are_in_no_share_of_passes(method):
    found = _found()
    found[method] = [_record(0, 0.5), _record(1, 0.0, failed="NaN")]
    found[method][1]["curve"] = {"forward_passes": [], "bits_per_unit": []}
    share = study_table.summarise(_suite(), "t", found)["mirror"]["share_of_passes"]
    assert share["by_seed"] == {"0": 1.0}
    found[method][1] |= {"failed": "", "evaluation": found[method][0]["evaluation"]}  # no metrics
    assert study_table.summarise(_suite(), "t", found)["mirror"]["share_of_passes"] == share


def test_tables_say_what_was_not_run():
    suite = _suite()
    record = {
        "finished": 6,
        "planned": 12,
        "provenance": {"packages": {"jax": "1"}, "platform": "p"},
        "revisions": {"x" * 40: 6},
        "results": {"passes": {"t": study_table.summarise(suite, "t", _found())}},
    }
    text = study_table.markdown(suite, record)
    assert "| MIRROR | 0.7750 ± 0.0354 |" in text and "MIRROR (1 diverged)" in text
    assert "| +0.1750 [-1.4133, +1.7633] | +1.4 |" in text  # 0.175 by 0.125; two seeds: Student's
    assert "| clipped | not yet run |" in text
    assert "bit for bit" in text  # why EMA was not run


@pytest.mark.parametrize("method, part", [("mirror", "total"), ("mirror", "reference")])
def test_a_ratio_has_a_star_where_one_of_its_parts_had_not_settled(method, part):
    found = _found()
    found[method][0]["gradient"][-1][part]["unsettled"] = "groups disagree"
    results = study_table.summarise(_suite(), "t", found)
    r = results["mirror"]
    assert r["total_over_baseline"]["settled"] is (part == "reference")
    assert r["gradient"][-1]["over_reference"]["settled"] is False
    assert r["noise_over_baseline"]["settled"] is True
    row = study_table._details(_suite(), results)
    row = next(line for line in row.splitlines() if line.startswith("| MIRROR"))
    first, same, noise = row.split(" | ")[9:12]
    assert first.endswith("*") is (part == "total") and same.endswith("*")
    assert noise and not noise.endswith("*")


def test_p_values_are_corrected_for_the_comparisons_of_a_table():
    # Student with one degree of freedom is Cauchy: p = 1 - 2 atan(t) / pi, at t = 0.175 / 0.125.
    found = study_table.summarise(_suite(), "t", _found())
    p = 1 - 2 * math.atan(1.4) / math.pi
    assert found["mirror"]["against_baseline"]["student_p"] == pytest.approx(p)
    assert found["mirror"]["against_baseline"]["holm_p"] == pytest.approx(p)  # ema is no other run
    assert found["ema"]["against_baseline"]["holm_p"] is None


def test_results_made_under_other_settings_are_refused(tmp_path):
    suite = SUITES["smoke"]
    run = next(r for r in study_runs.plan(suite) if study_runs.is_measured(suite, r))
    folder = study_runs.directory(tmp_path, run)
    study_runs.check_run(suite, run, tmp_path)  # nothing there yet
    claim(folder, study_runs.configure(suite, run, tmp_path))
    (folder / study_runs.RECORD).write_text(json.dumps(_record(0, 0.5, [4.0])), "utf-8")
    study_runs.check_run(suite, run, tmp_path)
    more = dataclasses.replace(suite, redraws=7)
    with pytest.raises(WorkdirError, match=r"\(2, 2\) -> \(2, 7\)"):
        study_runs.check_run(more, run, tmp_path)
    other = dataclasses.replace(suite, settings={**suite.settings, "sample.num_answers": 99})
    with pytest.raises(WorkdirError, match="sample.num_answers: .* -> 99"):
        study_runs.check_run(other, run, tmp_path)


def test_a_study_may_be_moved(tmp_path):
    suite, run = SUITES["small"], Run("sudoku4_noisy", "standard", "passes", 0)
    claim(
        study_runs.directory(tmp_path / "a", run), study_runs.configure(suite, run, tmp_path / "a")
    )
    (tmp_path / "a").rename(tmp_path / "b")
    study_runs.check_run(suite, run, tmp_path / "b")


def test_bands_reach_from_the_worst_to_the_best_seed():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    passes = np.array([1.0, 2.0])
    seeds = [(passes, np.array([4.0, 2.0])), (passes, np.array([6.0, 3.0]))]
    plots.training_bands(axes, {"a": seeds})
    assert axes.lines[0].get_ydata().tolist() == [5.0, 2.5]
    low, high = axes.collections[0].get_datalim(axes.transData).intervaly
    assert (low, high) == (2.0, 6.0)


# --- the command


def _start(root, *more):
    # As the other tests compile, but on one device, as a study does.
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.study", "--suite=smoke", f"--workdir={root}"]
        + ["--processes=1", *more],
        cwd=launching.ROOT,
        env=launching.environment() | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a signal to the group is what a terminal sends
    )


def _finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out


def _wait_for(pattern, root, process):
    while not any(root.glob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def _without_times(root):
    """The tables, written again, without the last column, the seconds."""
    study_table.write(SUITES["smoke"], root)
    lines = (root / "study.md").read_text().splitlines()
    return [line.rpartition(" | ")[0] if line.startswith("|") else line for line in lines]


def _pretend_finished(root):
    """Records of all runs of the suite but one, so that this one alone is left to do."""
    suite = SUITES["smoke"]
    for run in study_runs.plan(suite):
        if (run.method, run.seed) != ("recommended", 0):
            folder, config = study_runs.directory(root, run), study_runs.configure(suite, run, root)
            claim(folder, config)
            record = _record(run.seed, 0.5 + run.seed, [6.0, 4.0] if run.seed == 0 else [])
            record |= {"forward_passes": study_runs.forward_passes(suite, run)}
            record |= {"steps": config.train.steps, "batch_size": config.train.batch_size}
            (folder / study_runs.RECORD).write_text(json.dumps(record), "utf-8")
            (folder / "metrics.jsonl").write_text("", "utf-8")


RECOMMENDED = "runs/sudoku4/recommended/passes-0"


def _assert_complete(out, root, pending):
    """What the smoke suite's tables, plots and output say once ``pending`` runs were finished."""
    assert "4 of 4 runs are finished" in out and "standard/passes-0:" not in out  # was skipped
    assert f"/{pending}] sudoku4/recommended/passes-0" in out
    record = json.loads((root / "study.json").read_text())
    found = record["results"]["passes"]["sudoku4"]
    assert found["ema"]["scores"] == found["standard"]["scores"]
    assert len(set(found["recommended"]["scores"].values())) == 2
    assert [p["step"] for p in found["recommended"]["gradient"]] == [2, 4]
    assert found["recommended"]["gradient"][-1]["over_reference"]["ratio"] > 0
    assert found["standard"]["forward_passes"] == found["recommended"]["forward_passes"] == 32
    assert not any(root.glob("runs/*/*/*/checkpoints"))
    assert len(list((root / "plots").glob("*.png"))) == 2
    command = json.loads((root / RECOMMENDED / "run.json").read_text())["command"]
    assert command.startswith("python -m experiments.study ") and "--worker" not in command


def _as_if_killed_at_step_2(run):
    """Takes away what a finished run of four steps wrote after its second."""
    for name in ("last/4", "manifests/last/4.json", "best", "manifests/best"):
        path = run / "checkpoints" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in (study_runs.RECORD, "evaluation.json"):
        (run / name).unlink()


@pytest.mark.slow  # resuming itself is tested by default in test_launch.py
def test_a_run_of_a_study_cut_off_and_resumed_ends_as_one_that_was_not(tmp_path):
    """One run of four; the others are said to be finished."""
    _pretend_finished(tmp_path)
    out = _finish(_start(tmp_path, "--worker=0", "--keep_checkpoints"))  # without a stop
    assert out.count("===") == 1 and "=== sudoku4/recommended/passes-0" in out
    table = _without_times(tmp_path)
    _as_if_killed_at_step_2(tmp_path / RECOMMENDED)
    out = _finish(_start(tmp_path))
    assert "resuming at step 2" in (tmp_path / "logs/worker-0.log").read_text()
    _assert_complete(out, tmp_path, pending=1)
    assert _without_times(tmp_path) == table


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_study_stopped_and_resumed_ends_as_one_that_was_not(stop, tmp_path):
    process = _start(tmp_path)
    _wait_for(f"{RECOMMENDED}/checkpoints/last/2", tmp_path, process)
    os.killpg(process.pid, stop)
    if stop == signal.SIGINT:
        assert "the same command line resumes" in _finish(process, 130)
        assert "| standard | not yet run" not in (tmp_path / "study.md").read_text()
    process.communicate()

    out = _finish(_start(tmp_path))
    _assert_complete(out, tmp_path, pending=3)
    table = _without_times(tmp_path)
    shutil.rmtree(tmp_path / RECOMMENDED)
    out = _finish(_start(tmp_path, "--worker=0"))  # without a stop
    assert out.count("===") == 1 and "=== sudoku4/recommended/passes-0" in out
    assert _without_times(tmp_path) == table
