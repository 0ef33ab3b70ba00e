"""Notebooks run from top to bottom, in a process of their own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
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


def test_the_notebooks_are_found():
    assert "noise_levels.ipynb" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name, tmp_path):
    script = tmp_path / "notebook.py"
    script.write_text(code_of(FOLDER / name), "utf-8")
    environment = {**os.environ, "MPLBACKEND": "Agg", "MDM_JAX_SMOKE": "1"}
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
