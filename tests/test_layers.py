"""The shape of the package: imports point down, and the README's loop runs."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "mdm_jax"
LAYER = {
    "typing": 0,
    "streams": 0,
    "draws": 0,
    "batches": 0,
    "bias": 0,
    "pytrees": 0,
    "processes": 0,
    "schedules": 1,
    "models": 1,
    "data": 1,
    "corruption": 2,
    "variance": 2,
    "objectives": 3,
    "samplers": 3,
    "training": 4,
    "evaluation": 4,
    "__init__": 5,
}


def imported_parts(path):
    """Top-level parts of mdm_jax that a file imports, and foreign packages."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            (inside.add(parts[1]) if parts[0] == "mdm_jax" else outside.add(parts[0]))
    return inside, outside


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_imports_point_down(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    inside, outside = imported_parts(path)
    for name in inside - {part}:
        limit = 0 if part == "variance" else LAYER[part]
        same_layer = name != part and LAYER[name] == LAYER[part] > 0
        assert LAYER[name] <= limit, f"{path} may not import {name}"
        assert not same_layer, f"{path} may not import its neighbour {name}"
    assert not outside & {"experiments", "ml_collections", "tensorflow", "pickle"}
    if part != "data":
        assert not outside & {"grain", "tensorflow_datasets", "tokenizers"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_files_hold_one_concept(path):
    assert len(path.read_text("utf-8").splitlines()) <= 500
    assert path.name != "utils.py"


def test_config_builder_stays_a_table():
    for path in (ROOT / "mdm_jax/launch").glob("build*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 200


def test_readme_loops_run(tmp_path):
    """The README's examples, as shown, learn: they end well below the uniform entropy."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert len(blocks) == 2 and all(len(block.splitlines()) < 45 for block in blocks)
    scripts = [tmp_path / f"loop{number}.py" for number in range(2)]
    for script, block in zip(scripts, blocks):
        script.write_text(block, "utf-8")
    one_after_the_other = "import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]"
    run = subprocess.run(
        [sys.executable, "-c", one_after_the_other, *scripts],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    losses = [float(loss) for loss in re.findall(r"([\d.]+) nats per token", run.stdout)]
    assert len(losses) == 2 and max(losses) < 0.7
