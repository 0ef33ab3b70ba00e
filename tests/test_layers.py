"""The shape of the package: the core imports no wing, no circles, and what an import loads."""

import ast
import collections
import importlib.util
import pathlib
import pkgutil
import re
import subprocess
import sys
import types

import pytest

import mdm_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "mdm_jax"
WINGS = {
    "gaussian": set(),
    "hub": set(),
    "meter": set(),
    "evaluation": {"hub"},
    "tasks": {"evaluation"},
    "alignment": set(),
    "testing": set(),
    "plots": {"evaluation", "gaussian", "meter"},
}
"""Wings, and the wings that each may import."""
LAUNCHER = "launch"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}


def imports(path):
    """Full names of the modules that a file imports, in functions too but not for types alone."""
    tree = ast.parse(path.read_text("utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in found}
    return names


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def part(module):
    """The top-level part of the package that a module belongs to."""
    return [*module.split("."), "__init__"][1]


def test_the_core_imports_no_wing_and_wings_only_what_is_drawn():
    wrong = []
    for module, names in IMPORTS.items():
        here = part(module)
        allowed = {here, *WINGS.get(here, ())}
        for name in names:
            there = part(name) if name.startswith("mdm_jax.") else None
            if here == LAUNCHER or there is None:
                continue
            if there == LAUNCHER or (there in WINGS and there not in allowed):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_variance_rests_on_root_files_and_objectives_do_not_know_it():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for module, names in IMPORTS.items():
        inside = {part(name) for name in names if name.startswith("mdm_jax.")} & folders
        if part(module) == "variance":
            assert inside <= {"variance"}, module
        if part(module) == "objectives":
            assert "variance" not in inside, module


def test_foreign_packages_stay_where_they_belong():
    for module, names in IMPORTS.items():
        outside = {name.split(".")[0] for name in names}
        assert not outside & {"experiments", "tensorflow", "pickle", "chex"}, module
        if part(module) != LAUNCHER:
            assert "ml_collections" not in outside, module
        if part(module) != "data":
            assert not outside & {"grain", "tensorflow_datasets", "tokenizers"}, module


def test_no_circles_between_files():
    """Packages that a file imports by a name of theirs count as their ``__init__`` does."""
    state = {}

    def visit(module, path):
        if state.get(module) == "done":
            return
        assert state.get(module) != "open", " -> ".join([*path[path.index(module) :], module])
        state[module] = "open"
        for name in sorted(IMPORTS[module] & set(MODULES)):
            # `from mdm_jax import x` reaches x, not the package's own list of names.
            if name != "mdm_jax":
                visit(name, [*path, module])
        state[module] = "done"

    for module in MODULES:
        visit(module, [])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short(path):
    assert len(path.read_text("utf-8").splitlines()) <= 500
    assert path.name != "utils.py"


def test_folders_hold_at_most_a_dozen_files():
    counts = collections.Counter(path.parent for path in FILES if path.name != "__init__.py")
    assert {str(folder): n for folder, n in counts.items() if n > 12} == {}


def test_no_function_hides_a_module_of_its_package():
    """Unless the package gives it out by that name on purpose, as optax does."""
    for package in [
        MODULES[name].parent for name in MODULES if MODULES[name].name == "__init__.py"
    ]:
        name = ".".join(package.relative_to(ROOT).parts)
        tree = ast.parse((package / "__init__.py").read_text("utf-8"))
        given = {a.asname or a.name: n.module for n in ast.walk(tree)
                 if isinstance(n, ast.ImportFrom) for a in n.names}  # fmt: skip
        for submodule in {found.name for found in pkgutil.iter_modules([str(package)])} & set(
            given
        ):
            importlib.import_module(f"{name}.{submodule}")
            value = getattr(importlib.import_module(name), submodule)
            assert isinstance(value, types.ModuleType) == (given[submodule] == name), (
                name,
                submodule,
            )


def test_imports_load_jax_alone():
    """``import mdm_jax`` and the packages of an own training loop, in a process of their own."""
    script = """
import sys
import mdm_jax
heavy = ("flax", "orbax", "grain", "tensorflow_datasets", "tensorflow", "scipy", "matplotlib",
         "chex", "ml_collections", "tokenizers")
def check(name):
    found = [h for h in heavy if h in sys.modules]
    assert not found, f"{name} loads {', '.join(found)}"
check("mdm_jax")
for part in "variance corruption objectives samplers schedules likelihood meter".split():
    __import__(f"mdm_jax.{part}")
    check(f"mdm_jax.{part}")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert mdm_jax.__version__


def test_help_loads_no_package():
    """The time of ``mdm --help`` is that of Python's start: it loads none but standard modules."""
    script = """
import sys
before = set(sys.modules)
sys.argv = ["mdm", "--help"]
from mdm_jax.launch.__main__ import run
try:
    run()
finally:
    packages = {name.split(".")[0] for name in set(sys.modules) - before}
    print("|", *sorted(packages - sys.stdlib_module_names))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0 and run.stdout.startswith("Train,"), run.stderr
    assert run.stdout.rpartition("|")[2].split() == ["mdm_jax"]


def test_own_loops_run(tmp_path):
    """The examples of docs/own_loop.md learn: they end well below the uniform entropy."""
    page = (ROOT / "docs/own_loop.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
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
