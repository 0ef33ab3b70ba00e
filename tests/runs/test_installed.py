"""The package as users install it: a wheel in a fresh environment, away from the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv

import launching
import pytest
import setuptools


def alone():
    """The environment of a process that does not find the checkout."""
    return {k: v for k, v in launching.environment().items() if k != "PYTHONPATH"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(directory, bin) of an environment with the wheel and this environment's other packages."""
    if tuple(map(int, setuptools.__version__.split(".")[:2])) < (70, 1):
        pytest.importorskip("wheel", reason="setuptools before 70.1 builds no wheels by itself")
    root = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    source = root / "source"  # a copy: what earlier builds left in the checkout is no part of it
    shutil.copytree(launching.ROOT / "mdm_jax", source / "mdm_jax")
    shutil.copytree(launching.ROOT / "experiments", source / "experiments")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(launching.ROOT / name, source)
    build = ["wheel", str(source), "--no-deps", "--no-build-isolation", f"-w{root}"]
    subprocess.run([*pip, *build], check=True, capture_output=True, cwd=root)
    (wheel,) = root.glob("mdm_jax-*.whl")
    venv.create(root / "venv", with_pip=False)
    packages = sysconfig.get_path("purelib", vars={"base": root / "venv"})
    others = sysconfig.get_path("purelib")
    target = [f"--python={root / 'venv/bin/python'}", "install", "--no-deps", str(wheel)]
    subprocess.run([*pip, *target], check=True, capture_output=True, cwd=root, env=alone())
    # By the path alone, so that links to checkouts in the other packages are not followed.
    with open(os.path.join(packages, "parent.pth"), "w", encoding="utf-8") as file:
        file.write(others + "\n")
    return root, root / "venv" / "bin"


def run(installed, *command, code=0):
    root, programs = installed
    done = subprocess.run(
        [programs / command[0], *command[1:]],
        capture_output=True,
        text=True,
        cwd=root,
        env=alone(),
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_configs_are_found_by_name_anywhere_and_experiments_are_not_installed(installed):
    _, err = run(installed, "mdm", "train", "--config=quikstart", "--workdir=run", code=2)
    assert "did you mean quickstart?" in err
    find = (
        "import importlib.util as u, mdm_jax.data.text as t; "
        "print(t.__file__, u.find_spec('experiments'), *sorted(p.name for p in "
        "t.EMBEDDED.parent.iterdir()))"
    )
    out, _ = run(installed, "python", "-c", find)
    file, spec, *embedded = out.split()
    assert file.startswith(str(installed[0])) and spec == "None"
    assert embedded == ["LICENSE.txt", "README.md", "python_reference.txt.xz"]


@pytest.mark.slow
def test_the_console_script_trains_and_evaluates(installed):
    root, _ = installed
    out, _ = run(installed, "mdm", "train", "--config=quickstart:smoke", "--workdir=run")
    assert "bits per character" in out and (root / "run" / "report.txt").exists()
    out, _ = run(installed, "mdm", "evaluate", "--workdir=run")
    assert out.startswith("test: ")
