"""The package as users install it: a wheel in a fresh environment, away from the checkout."""

import email
import importlib.util
import pathlib
import subprocess
import zipfile

import launching
import pytest
import setuptools

import mdm_jax
from experiments import wheel

if tuple(map(int, setuptools.__version__.split(".")[:2])) < (70, 1):
    pytest.importorskip("wheel", reason="setuptools before 70.1 builds no wheels by itself")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return wheel.build(tmp_path_factory.mktemp("wheel"), isolated=False)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """(directory, bin) of an environment with the wheel and what it requires, nothing else."""
    root = tmp_path_factory.mktemp("installed")
    return root, wheel.install_linked(built, root / "environment")


def run(installed, *command, code=0):
    root, programs = installed
    environment = {k: v for k, v in launching.environment().items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [programs / command[0], *command[1:]],
        capture_output=True,
        text=True,
        cwd=root,
        env=environment,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_the_wheel_holds_licence_version_and_extras(built):
    with zipfile.ZipFile(built) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
        (licence,) = (name for name in archive.namelist() if name.endswith("/LICENSE"))
        assert archive.read(licence) == (launching.ROOT / "LICENSE").read_bytes()
        assert not [name for name in archive.namelist() if not name.startswith("mdm_jax")]
    assert metadata["Version"] == mdm_jax.__version__
    named = {
        *["cuda12", "cuda13", "tpu", "train", "data", "hub", "eval", "notebooks", "dev", "docs"]
    }
    assert named <= {*metadata.get_all("Provides-Extra")}
    always = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert not [line for line in always if line.startswith(("tensorflow", "pyarrow", "jax["))]


def test_errors_name_extras_that_there_are(built):
    """``missing_package`` and other texts with ``mdm_jax[...]``, in package and docs."""
    with zipfile.ZipFile(built) as archive:
        (path,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        extras = {*email.message_from_bytes(archive.read(path)).get_all("Provides-Extra")}
    found = {}
    for file in (launching.ROOT / "mdm_jax").rglob("*.py"):
        text = file.read_text("utf-8")
        for part in text.split("missing_package(")[1:]:
            name = part.split('", error)')[0].rpartition('"')[2]
            if not part.startswith("what"):
                found[name] = file
    assert found and {*found} <= extras, found


def test_configs_are_found_by_name_anywhere_and_experiments_are_not_installed(installed):
    _, err = run(installed, "mdm", "train", "--config=quikstart", "--workdir=run", code=2)
    assert "did you mean quickstart?" in err
    find = (
        "import importlib.util as u, mdm_jax; print(mdm_jax.__file__, u.find_spec('experiments'), "
        "u.find_spec('tensorflow_datasets'))"
    )
    out, _ = run(installed, "python", "-c", find)
    file, spec, optional = out.split()
    assert file.startswith(str(installed[0])) and (spec, optional) == ("None", "None")
    assert importlib.util.find_spec("tensorflow_datasets")  # here, but not required by the wheel


def test_a_source_of_an_extra_says_which_one(installed):
    tfds = ("--config.data.source=tfds", "--config.data.name=mnist", "--config.data.train_stride=1")
    command = ("mdm", "train", "--config=quickstart:smoke", "--workdir=other", *tfds)
    _, err = run(installed, *command, code=2)
    assert "the tfds source needs" in err and "pip install 'mdm_jax[data]'" in err


@pytest.mark.slow
def test_the_commands_of_make_wheel_run_with_nothing_but_what_is_required(installed):
    root, _ = installed
    outputs = [run(installed, *command)[0] for command in wheel.COMMANDS]
    assert outputs[0].startswith("Train,") and "train.steps = 1000" in outputs[1]
    assert "bits per character" in outputs[2] and (root / "run" / "report.txt").exists()
    assert outputs[3].startswith("test: ")


def test_make_wheel_runs_what_is_tested_here():
    text = (pathlib.Path(launching.ROOT) / "Makefile").read_text("utf-8")
    assert "$(RUN) -m experiments.wheel --out=dist" in text
