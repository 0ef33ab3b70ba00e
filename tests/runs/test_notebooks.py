"""Notebooks run from top to bottom, as Jupyter runs them, and hold small outputs."""

import importlib.util
import json
import re
import sys

import launching
import nbformat
import numpy as np
import pytest
from variants import slow_except

from experiments import notebooks, wheel
from experiments.study import runs, table
from experiments.study.runs import Run
from experiments.study.suites import SUITES

pytestmark = pytest.mark.first

PATHS = re.compile(r"(?<![\w.])/(?:work|home|tmp|root|Users|usr|opt|content|var)/")
"""Of a machine, in outputs."""


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


def run_notebook(name, folder, replaced=None, **variables):
    """What it prints, with tiny settings; ``variables`` may name a study to read."""
    variables = launching.environment() | {"MDM_JAX_SMOKE": "1"} | variables
    return notebooks.text_of(notebooks.execute(name, folder, variables, replaced))


def read(name):
    return nbformat.read(notebooks.FOLDER / f"{name}.ipynb", as_version=4)


def test_the_notebooks_are_found():
    assert notebooks.NAMES == ("finetune", "noise_levels", "quickstart", "stability", "variance")


@pytest.mark.parametrize("name", slow_except((), sorted({*notebooks.NAMES} - {"stability"})))
def test_a_notebook_runs(name, tmp_path):
    assert "mdm_jax 0.1.0 on 1 x cpu\n" in run_notebook(name, tmp_path)


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_stored_outputs_are_of_one_run_and_small(name):
    path, notebook = notebooks.FOLDER / f"{name}.ipynb", read(name)
    nbformat.validate(notebook)
    assert path.stat().st_size < 300_000, "python -m experiments.notebooks stores them smaller"
    assert notebook.metadata == notebooks.METADATA
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(cell.metadata for cell in notebook.cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "stream", "display_data", "execute_result"
    }  # fmt: skip
    assert all(output.name == "stdout" for output in outputs if "name" in output)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = "".join(str(output.get("text", "")) for output in outputs)
    text += "".join(output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "mdm_jax" in text and "\r" not in text
    assert not PATHS.findall(text)


def test_paths_are_recognised():
    assert PATHS.findall("in /work/main/x and '/tmp/a'") == ["/work/", "/tmp/"]
    assert not PATHS.findall("variance / mean², pip install ./home/x, rows/home/")


def first_cell(name):
    return next(cell.source for cell in read(name).cells if cell.cell_type == "code")


def test_the_first_cell_is_the_same_in_all():
    (cell,) = {first_cell(name) for name in notebooks.NAMES}
    assert cell.count('\nMDM_JAX = ""\n') == 1


def installed_by(cell, source=""):
    """What the first cell installs, given ``MDM_JAX``."""
    cell = re.sub(r"%pip install --quiet (.*)", r"installed.append(f'\1')", cell)
    installed = []
    path = sys.path.copy()
    try:
        exec(cell.replace('MDM_JAX = ""', f'MDM_JAX = "{source}"'), {"installed": installed})
    finally:
        sys.path[:] = path
    return installed


def test_what_the_first_cell_installs(monkeypatch, tmp_path, capsys):
    """Never a bare name: an index answers it with the package of a stranger."""
    cell, missing = first_cell("quickstart"), {"mdm_jax", "jax_cuda12_plugin", "libtpu"}
    find = importlib.util.find_spec
    assert installed_by(cell) == []  # mdm_jax is there
    assert re.fullmatch(r"mdm_jax 0\.1\.0 on \d x cpu\n", capsys.readouterr().out)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    monkeypatch.chdir(notebooks.FOLDER)
    assert installed_by(cell) == [f'--editable "{notebooks.ROOT}"']
    monkeypatch.chdir(tmp_path)
    assert installed_by(cell, "a.whl") == [f'"mdm_jax @ {(tmp_path / "a.whl").as_uri()}"']
    assert installed_by(cell, "mdm_jax") == [f'"mdm_jax @ {(tmp_path / "mdm_jax").as_uri()}"']
    assert installed_by(cell, "https://a.b/c.whl") == ['"mdm_jax @ https://a.b/c.whl"']
    (tmp_path / "clone").mkdir()
    assert installed_by(cell, "clone") == [f'--editable "{tmp_path / "clone"}"']
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_cuda12_plugin")
    assert installed_by(cell, "https://a.b/c.whl") == ['"mdm_jax[cuda12] @ https://a.b/c.whl"']
    assert installed_by(cell, "clone") == [f'--editable "{tmp_path / "clone"}[cuda12]"']


@pytest.mark.slow
def test_a_notebook_installs_a_wheel(tmp_path):
    """Into a directory of its own; the packages that it requires are there."""
    built, target = wheel.build(tmp_path / "dist", isolated=False), tmp_path / "installed"
    target.mkdir()
    variables = {"PYTHONPATH": str(target), "PIP_TARGET": str(target), "PIP_NO_DEPS": "1"}
    replaced = {
        'MDM_JAX = ""': f'MDM_JAX = "{built}"',
        "import mdm_jax\n": "import mdm_jax\nprint(mdm_jax.__file__)\n",
    }
    out = run_notebook("quickstart", tmp_path, replaced, **variables)
    assert f"{target}/mdm_jax/__init__.py\n" in out


@pytest.mark.slow
def test_the_notebook_of_the_study_reads_one_that_is_not_finished(tmp_path):
    write_study(tmp_path / "study")
    out = run_notebook("stability", tmp_path, MDM_JAX_STUDY=str(tmp_path / "study"))
    study = json.loads((tmp_path / "study" / "study.json").read_text("utf-8"))
    paired = study["results"]["passes"]["sudoku6"]["recommended"]["against_baseline"]
    line = next(row for row in out.splitlines() if row.startswith("  recommended chain"))
    low, high = paired["bootstrap"]
    assert f"{paired['mean']:+.4f}  bootstrap [{low:+.4f}, {high:+.4f}]" in line
    assert line.endswith("significant") and paired["significant"]
    assert "smoke" not in out


def test_the_notebook_of_the_study_reads_what_comes_with_the_package(tmp_path):
    """The one that the default suite runs: it compiles nothing."""
    assert "257 of 257 runs are finished" in run_notebook("stability", tmp_path)


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
