"""What this machine has that a run may not use: accelerators, and units for bfloat16."""

import glob
import pathlib
import shutil
import subprocess
from collections.abc import Mapping

import jax

from mdm_jax.distributed import compute_capability

_NVIDIA = ("/dev/nvidia[0-9]*",)
_TPU = ("/dev/accel[0-9]*",)
_TPU_VARIABLES = ("TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
_BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16"}
_CPUINFO = pathlib.Path("/proc/cpuinfo")


def unused_accelerator(environment: Mapping[str, str]) -> str | None:
    """A warning that JAX runs on the CPU of a machine with an accelerator, or None.

    None too where ``JAX_PLATFORMS`` asks for the CPU. Starts JAX's devices.
    """
    if jax.default_backend() != "cpu" or _platforms() == "cpu":
        return None
    found = accelerator(environment)
    if found is None:
        return None
    what, extra = found
    return (
        f"this machine has {what}, but JAX runs on the CPU; pip install 'mdm_jax[{extra}]', or see "
        "docs/install.md (older drivers). JAX_PLATFORMS=cpu says that the CPU is meant"
    )


def accelerator(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """What this machine has, and the extra of mdm_jax that brings JAX's plugin for it, or None."""
    if device := _first(_NVIDIA):
        return f"an NVIDIA GPU ({device})", "cuda13"
    if name := _by_nvidia_smi():
        return f"an NVIDIA GPU ({name})", "cuda13"
    variable = next((name for name in _TPU_VARIABLES if environment.get(name)), None)
    if device := _first(_TPU) or variable:
        return f"a TPU ({device})", "tpu"
    return None


def multiplies_bfloat16() -> bool:
    """Whether JAX's devices multiply bfloat16 faster than float32.

    TPUs do; NVIDIA's GPUs from compute capability 8.0 on, and other GPUs; CPUs where Linux lists
    units for it, ``avx512_bf16`` or ``amx_bf16``.
    """
    if jax.default_backend() != "cpu":
        major = compute_capability().partition(".")[0]  # "7" of a V100, "" of a TPU
        return not major.isdigit() or int(major) >= 8
    try:
        lines = _CPUINFO.read_text("utf-8").splitlines()
    except OSError:
        return False
    return any(_BFLOAT16_UNITS & set(line.split()) for line in lines if line.startswith("flags"))


def unused_bfloat16(dtype: str) -> str | None:
    """A hint that this CPU has units for bfloat16, where ``model.dtype`` is float32, or None."""
    if jax.default_backend() != "cpu" or dtype != "float32" or not multiplies_bfloat16():
        return None
    return (
        "this processor has units for bfloat16: a step with --config.model.dtype=bfloat16 is "
        "faster (docs/scaling.md, CPUs); float32 stays the default, for the same numbers everywhere"
    )


def _platforms() -> str | None:
    """What ``JAX_PLATFORMS`` asks for."""
    return jax.config.jax_platforms


def _first(patterns: tuple[str, ...]) -> str | None:
    return next((path for pattern in patterns for path in sorted(glob.glob(pattern))), None)


def _by_nvidia_smi() -> str | None:
    """The first line of ``nvidia-smi -L``, or None; the program may be there without a GPU."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0] if done.returncode == 0 and lines else None
