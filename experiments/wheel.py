"""Build the wheel and try it as a user has it: in a fresh environment, away from the checkout.

python -m experiments.wheel --out=dist               # `make wheel`; packages from the index
python -m experiments.wheel --out=dist --no-index    # packages of this environment, by links
"""

import argparse
import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
COMMANDS = (
    ("mdm", "--help"),
    ("mdm", "config", "quickstart", "train"),
    ("mdm", "train", "--config=quickstart:smoke", "--workdir=run"),
    ("mdm", "evaluate", "--workdir=run"),
)
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def build(out: pathlib.Path, isolated: bool = True) -> pathlib.Path:
    """Build the wheel of this checkout into ``out``; its path.

    From a copy, so that leftovers of earlier builds are no part of it. ``isolated``: setuptools
    comes from the index, else from this environment.
    """
    with tempfile.TemporaryDirectory() as directory:
        source, built = pathlib.Path(directory, "source"), pathlib.Path(directory, "built")
        for package in ("mdm_jax", "experiments"):
            shutil.copytree(ROOT / package, source / package)
        for name in SOURCES:
            shutil.copy(ROOT / name, source)
        options = ["--no-deps", f"-w{built}", *["--no-build-isolation"] * (not isolated)]
        _run(*_PIP, "wheel", str(source), *options, directory=directory)
        (wheel,) = built.glob("mdm_jax-*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return pathlib.Path(shutil.copy(wheel, out))


def install(wheel: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    """A new environment in ``directory`` with the wheel and what it requires, from the index."""
    venv.create(directory, with_pip=False)
    _run(*_PIP, f"--python={directory / 'bin/python'}", "install", str(wheel), directory=directory)
    return directory / "bin"


def install_linked(wheel: pathlib.Path, directory: pathlib.Path) -> pathlib.Path:
    """As :func:`install`, without the index: requirements are links to this environment's files.

    The packages that the wheel requires, and theirs, are found, and no others.
    """
    venv.create(directory, with_pip=False)
    python = f"--python={directory / 'bin/python'}"
    _run(*_PIP, python, "install", "--no-deps", str(wheel), directory=directory)
    packages = pathlib.Path(sysconfig.get_path("purelib", vars={"base": directory}))
    (metadata,) = packages.glob("mdm_jax-*.dist-info/METADATA")
    lines = metadata.read_text("utf-8").partition("\n\n")[0].splitlines()
    wanted = [line.split(": ", 1)[1] for line in lines if line.startswith("Requires-Dist: ")]
    for name in required(wanted):
        distribution = importlib.metadata.distribution(name)
        for top in sorted({file.parts[0] for file in distribution.files or ()}):
            source, target = pathlib.Path(distribution.locate_file(top)), packages / top
            if top != ".." and source.exists() and not target.exists():
                target.symlink_to(source)
    return directory / "bin"


def required(requirements: Iterable[str], extras: frozenset[str] = frozenset()) -> set[str]:
    """Names of the installed packages that requirements need, and what those need in turn."""
    from packaging.requirements import Requirement  # of the extra dev, through pytest

    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [(Requirement(line), extras) for line in requirements]
    while waiting:
        requirement, outer = waiting.pop()
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in {"", *outer}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        node = (name, frozenset(requirement.extras))
        if node not in found:
            found.add(node)
            lines = importlib.metadata.requires(name) or ()
            waiting += [(Requirement(line), node[1]) for line in lines]
    return {name for name, _ in found}


def environment() -> dict[str, str]:
    """The environment of a process that does not find the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _run(*command: str | os.PathLike, directory: str | os.PathLike) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=environment())
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "dist", help="of the wheel")
    parser.add_argument("--no-index", action="store_true", help="packages of this environment")
    options = parser.parse_args()
    wheel = build(options.out.resolve(), isolated=not options.no_index)
    print(f"{wheel}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        place = pathlib.Path(directory)
        make = install_linked if options.no_index else install
        programs = make(wheel, place / "environment")
        for name, *arguments in COMMANDS:
            started = time.monotonic()
            out = _run(programs / name, *arguments, directory=place)
            seconds = time.monotonic() - started
            print(f"{' '.join([name, *arguments])}: {len(out.splitlines())} lines, {seconds:.1f} s")


if __name__ == "__main__":
    main()
