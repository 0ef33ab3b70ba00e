"""Notebooks run from top to bottom, in a process of their own."""

import json
import subprocess
import sys

import launching
import numpy as np
import pytest
from variants import slow_except

from experiments.study import runs, table
from experiments.study.runs import Run
from experiments.study.suites import SUITES

pytestmark = pytest.mark.first

FOLDER = launching.ROOT / "notebooks"
NOTEBOOKS = ("finetune", "noise_levels", "quickstart", "stability", "variance")
NAMES = sorted(path.name for path in FOLDER.glob("*.ipynb"))


def code_of(path):
    """The code cells as one script, without the lines that install."""
    cells = json.loads(path.read_text("utf-8"))["cells"]
    lines = []
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"cell {number} of {path.name} holds outputs; clear them"
            text = "".join(cell["source"])
            kept = (
                f"{' ' * 4}pass" if line.lstrip().startswith("%pip") else line
                for line in text.splitlines()
            )
            lines += [f"# cell {number}", *kept]
    return "\n".join(lines) + "\n"


def write_study(root):
    """A study of the suite ``small`` that is not finished, with numbers made up."""
    generator, suite = np.random.default_rng(0), SUITES["small"]
    for run in runs.plan(suite):
        if run.method in ("clipped", "autoregressive") or run.task not in suite.tasks:
            continue
        score = 0.5 + 0.05 * run.seed + 0.1 * (run.method == "recommended")
        score += 0.01 * generator.normal()
        _write_run(suite, root, run, score, generator)
    table.write(suite, root)


def _write_run(suite, root, run: Run, score, generator):
    folder, config = runs.directory(root, run), runs.configure(suite, run, root)
    steps, views = config.train.steps, suite.methods[run.method].views

    def part(scale):
        groups = list(scale * generator.uniform(1, 2, suite.groups))
        sizes = {"signal": 1.0, "redraws": suite.redraws}
        return {"group_variances": groups, "unsettled": "", **sizes}

    gradient = [
        {"step": step, "total": part(4 / views), "noise": part(2 / views), "reference": part(4)}
        for step in (steps // 2, steps)
    ]
    record = {
        "seed": run.seed,
        "failed": "",
        "evaluation": {"accuracy": score, "bits_per_unit": 3 - score},
        "gradient": gradient if runs.is_measured(suite, run) else [],
        "training_seconds": 1.0,
        "steps": steps,
        "batch_size": config.train.batch_size,
        "views": views,
        "forward_passes": runs.forward_passes(suite, run),
    }
    folder.mkdir(parents=True)
    (folder / runs.RECORD).write_text(json.dumps(record), "utf-8")
    lines = [
        {"kind": "evaluate", "step": steps * part // 4, "bits_per_unit": 3 - score * part / 4}
        for part in (1, 2, 3, 4)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", "utf-8")


def run_notebook(name, folder, **variables):
    """What it prints, with tiny settings; ``variables`` may name a study to read."""
    script = folder / "notebook.py"
    script.write_text(code_of(FOLDER / name), "utf-8")
    environment = launching.environment() | {"MDM_JAX_SMOKE": "1"} | variables
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_the_notebooks_are_found():
    assert NAMES == [
        "finetune.ipynb",
        "noise_levels.ipynb",
        "quickstart.ipynb",
        "stability.ipynb",
        "variance.ipynb",
    ]


@pytest.mark.parametrize(
    "name",
    slow_except((), sorted({*NAMES} - {"stability.ipynb"})),
)
def test_a_notebook_runs(name, tmp_path):
    run_notebook(name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_installed_is_named_by_the_user(name, monkeypatch):
    """Never a bare name: an index answers it with the package of a stranger."""
    cells = json.loads((FOLDER / name).read_text("utf-8"))["cells"]
    installing = ["".join(cell["source"]) for cell in cells if "%pip" in str(cell["source"])]
    (cell,) = installing
    assert cell.count('SOURCE = ""') == 1 and cell.count("%pip install --quiet {SOURCE}") == 1
    cell = cell.replace("%pip install --quiet {SOURCE}", "installed.append(SOURCE)")
    installed = []
    exec(cell, {"installed": installed})  # mdm_jax is there
    monkeypatch.setitem(sys.modules, "mdm_jax", None)
    for bare in ("", "mdm_jax", "mdm-jax==1.0"):
        with pytest.raises(ValueError, match="set SOURCE above to a path"):
            exec(cell.replace('SOURCE = ""', f'SOURCE = "{bare}"'), {"installed": installed})
    assert not installed
    exec(cell.replace('SOURCE = ""', 'SOURCE = "./mdm_jax"'), {"installed": installed})
    assert installed == ["./mdm_jax"]


@pytest.mark.slow
def test_the_notebook_of_the_study_reads_one_that_is_not_finished(tmp_path):
    write_study(tmp_path / "study")
    out = run_notebook("stability.ipynb", tmp_path, MDM_JAX_STUDY=str(tmp_path / "study"))
    study = json.loads((tmp_path / "study" / "study.json").read_text("utf-8"))
    paired = study["results"]["passes"]["sudoku6"]["recommended"]["against_baseline"]
    line = next(row for row in out.splitlines() if row.startswith("  recommended chain"))
    low, high = paired["bootstrap"]
    assert f"{paired['mean']:+.4f}  bootstrap [{low:+.4f}, {high:+.4f}]" in line
    assert line.endswith("significant") and paired["significant"]
    assert "smoke" not in out


@pytest.mark.slow
def test_the_notebook_of_the_study_reads_what_comes_with_the_package(tmp_path):
    assert "257 of 257 runs are finished" in run_notebook("stability.ipynb", tmp_path)


@pytest.mark.parametrize("name", ["small", "confirmation", "confirmation_rates", "finetune"])
def test_published_results_are_whole_and_of_the_present_suite(name):
    record = table.published(name)
    suite = SUITES[record["suite"]]
    assert record["finished"] == record["planned"] == len(runs.plan(suite))
    assert not any("+changes" in revision for revision in record["revisions"])
    text = table.markdown(suite, record)
    assert "not yet run" not in text and all(m.label in text for m in suite.methods.values())
    with pytest.raises(ValueError, match="only of .*small"):
        table.published("smal")
