"""What is said where JAX runs on the CPU of a machine that has an accelerator."""

import subprocess

import jax
import launching
import pytest

from mdm_jax.launch import main
from mdm_jax.launch.start import accelerators

pytestmark = pytest.mark.keyless


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with the given device files and, with ``smi``, a program nvidia-smi."""

    def make(*devices, smi=None, backend="cpu", platforms=None):
        for name in devices:
            (tmp_path / name).touch()
        monkeypatch.setattr(accelerators, "_NVIDIA", (f"{tmp_path}/nvidia[0-9]*",))
        monkeypatch.setattr(accelerators, "_TPU", (f"{tmp_path}/accel[0-9]*",))
        program = None
        if smi is not None:
            program = tmp_path / "nvidia-smi"
            program.write_text(f"#!/bin/sh\n{smi}\n")
            program.chmod(0o755)
        monkeypatch.setattr(accelerators.shutil, "which", lambda _: program and str(program))
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(accelerators, "_platforms", lambda: platforms)

    return make


def test_a_machine_without_accelerators_is_not_warned(machine):
    machine("nvidiactl", smi="echo no devices; exit 6")  # drivers, but no card
    assert accelerators.unused_accelerator({"PATH": "/bin"}) is None


@pytest.mark.parametrize(
    ("devices", "smi", "environment", "expected"),
    [
        (("nvidia1", "nvidia0"), None, {}, ("nvidia0", "mdm_jax[cuda13]")),
        ((), "echo 'GPU 0: NVIDIA H200 (UUID)'", {}, ("GPU 0: NVIDIA H200", "mdm_jax[cuda13]")),
        (("accel0",), None, {}, ("accel0", "mdm_jax[tpu]")),
        ((), None, {"TPU_WORKER_ID": "0"}, ("TPU_WORKER_ID", "mdm_jax[tpu]")),
    ],
)
def test_the_warning_names_device_and_extra(machine, devices, smi, environment, expected):
    machine(*devices, smi=smi)
    text = accelerators.unused_accelerator(environment)
    assert all(part in text for part in (*expected, "JAX runs on the CPU", "docs/install.md"))
    machine(*devices, smi=smi, backend="gpu")
    assert accelerators.unused_accelerator(environment) is None
    machine(*devices, smi=smi, platforms="cpu")  # asked for
    assert accelerators.unused_accelerator(environment) is None


def test_a_program_that_hangs_or_fails_is_no_accelerator(machine, monkeypatch):
    machine(smi="exit 0")
    assert accelerators.accelerator({}) is None

    def hangs(*_, timeout, **__):
        raise subprocess.TimeoutExpired("nvidia-smi", timeout)

    monkeypatch.setattr(accelerators.subprocess, "run", hangs)
    assert accelerators.accelerator({}) is None


def test_training_begins_with_the_warning(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(accelerators, "unused_accelerator", lambda _: "no plugin")
    monkeypatch.setattr(main.train, "train", lambda *_: False)
    run = ("train", f"--config={launching.QUICKSTART}", f"--workdir={tmp_path / 'run'}")
    code, out, err = launching.call(monkeypatch, capsys, *run)
    assert code == 130 and "warning: no plugin\n" in err and "of cpu" in out


@pytest.mark.parametrize(
    ("flags", "backend", "units", "hint"),
    [
        ("fpu avx2 avx512_bf16 sse", "cpu", True, True),
        ("amx_bf16", "cpu", True, True),
        ("fpu avx512f avx512_bf16x", "cpu", False, False),
        (None, "cpu", False, False),  # no such file
        (None, "gpu", True, False),
    ],
)
def test_units_for_bfloat16_are_named_where_float32_does_not_use_them(
    machine, monkeypatch, tmp_path, flags, backend, units, hint
):
    machine(backend=backend)
    monkeypatch.setattr(accelerators, "_CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
    assert accelerators.multiplies_bfloat16() is units
    text = accelerators.unused_bfloat16("float32")
    assert ("model.dtype=bfloat16" in text) if hint else text is None
    assert accelerators.unused_bfloat16("bfloat16") is None


@pytest.mark.parametrize("capability, units", [("7.5", False), ("8.0", True), ("gfx90a", True)])
def test_old_gpus_have_no_units_for_bfloat16(machine, monkeypatch, capability, units):
    machine(backend="gpu")
    monkeypatch.setattr(accelerators, "compute_capability", lambda: capability)
    assert accelerators.multiplies_bfloat16() is units
