"""The launcher for tests: in a process of its own, or inside this one for what fails early."""

import contextlib
import itertools
import os
import pathlib
import socket
import subprocess
import sys

import compilation
from absl import flags
from absl.testing import flagsaver

from mdm_jax import sharding
from mdm_jax.launch import main
from mdm_jax.launch.__main__ import answer

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICKSTART = "experiments/configs/quickstart.py:smoke"
DIGITS = "experiments/configs/digits_masked.py:smoke"
CACHE = "MDM_JAX_TESTS_CACHE"
"""Environment variable with the directory of the session's compilation cache."""


def environment(devices: int = 1) -> dict[str, str]:
    """Compiles quickly, and a program only once for all processes of the session."""
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(
            (f"--xla_force_host_platform_device_count={devices}", *compilation.FLAGS)
        ),
        "JAX_COMPILATION_CACHE_DIR": os.environ[CACHE],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS": "0",
        "MPLBACKEND": "Agg",
    }


def start(*arguments: str, devices: int = 1) -> subprocess.Popen:
    """The launcher in a process of its own, from the repository's root."""
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.launch", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(devices),
    )


def finish(*arguments: str, code: int = 0, devices: int = 1) -> tuple[str, str]:
    """(stdout, stderr) of a run that ends by itself with ``code``."""
    process = start(*arguments, devices=devices)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out, err


def start_several(count: int, *arguments: str, devices: int = 1) -> list[subprocess.Popen]:
    """The launcher in ``count`` processes of one run."""
    together = [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={count}"]
    return [
        start(*arguments, *together, f"--process_id={number}", devices=devices)
        for number in range(count)
    ]


def finish_several(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(status, stdout, stderr) of each process; none is left behind."""
    try:
        found = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, found)]


def free_port() -> int:
    """A port that nobody listened to a moment ago."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def on_one_device(monkeypatch) -> None:
    """Experiments are made for the first of this process's devices: they compile faster so."""
    import jax
    import numpy as np

    def make_mesh(**_):
        return jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), sharding.AXES)

    monkeypatch.setattr(sharding, "make_mesh", make_mesh)


def call(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the launcher inside this process."""
    import grain  # noqa: F401  (defines flags when imported, which the flag saver would remove)

    monkeypatch.chdir(ROOT)
    # The session's cache: one in the user's home would stay on for the tests that follow.
    words = list(itertools.takewhile(lambda each: not str(each).startswith("-"), arguments))
    cache = f"--compilation_cache_dir={os.environ[CACHE]}"
    given = ["launch", *words, cache, *map(str, arguments[len(words) :])]
    monkeypatch.setattr(sys, "argv", given)
    capsys.readouterr()
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        try:
            code = answer(sys.argv)
            code = main.main(main._parse(sys.argv)) if code is None else code
        except SystemExit as stop:
            code = stop.code
        finally:
            flags.FLAGS.mark_as_parsed()
    out, err = capsys.readouterr()
    return code, out, err
