"""The machine of a benchmark: versions, devices, memory, rate of a large matrix product."""

import importlib.metadata
import os
import pathlib
import platform
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mdm_jax.launch.start.accelerators import multiplies_bfloat16

_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_UNITS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def facts() -> dict[str, Any]:
    """Machine, versions, commit and settings that times depend on; JSON values."""
    processor, flags = _processor()
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "num_devices": jax.device_count(),
        "processor": processor,
        "processor_units": [unit for unit in _UNITS if unit in flags],
        "cores_allowed": len(os.sched_getaffinity(0)),
        "load_average_at_start": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def describe(facts: dict[str, Any]) -> str:
    """One line of :func:`facts`."""
    commit = (facts["commit"] or "no git commit")[:10]
    changed = " with uncommitted changes" if facts["uncommitted_changes"] else ""
    return (
        f"{facts['num_devices']} x {facts['device']} ({facts['processor']}, "
        f"{facts['cores_allowed']} cores allowed, load {facts['load_average_at_start']:.1f}), "
        f"jax {facts['jax']}, {commit}{changed}"
    )


def product_dtype() -> jnp.dtype:
    """bfloat16 where there are units that multiply it, float32 elsewhere."""
    return jnp.dtype(jnp.bfloat16 if multiplies_bfloat16() else jnp.float32)


def product(dtype: jnp.dtype) -> tuple[Callable[[], object], float]:
    """A large square matrix product with float32 results, and its floating-point operations.

    Its rate is the ceiling of a training step. On accelerators products are chained inside one
    call, where the time to start a call would count otherwise.
    """
    on_cpu = jax.default_backend() == "cpu"
    size, repeats = (1536, 1) if on_cpu else (8192, 16)
    left = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    right = (jax.random.normal(jax.random.key(1), (size, size)) / size**0.5).astype(dtype)

    @jax.jit
    def run(a: jax.Array, b: jax.Array) -> jax.Array:
        def multiply(_, x: jax.Array) -> jax.Array:
            return jnp.matmul(x.astype(dtype), b, preferred_element_type=jnp.float32)

        return jax.lax.fori_loop(0, repeats, multiply, a.astype(jnp.float32))

    run(left, right).block_until_ready()
    return lambda: run(left, right).block_until_ready(), 2.0 * size**3 * repeats


def peak_bytes(compiled: jax.stages.Compiled) -> dict[str, int] | None:
    """Memory of a compiled program as the compiler planned it, bytes; None where unknown.

    ``peak`` is arguments, outputs that share no memory with them, and temporaries.
    """
    plan = compiled.memory_analysis()
    if plan is None:
        return None
    fresh = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return {
        "arguments": plan.argument_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
        "peak": plan.argument_size_in_bytes + fresh + plan.temp_size_in_bytes,
    }


def device_peak_bytes() -> int | None:
    """Most bytes that the first device held since the process began; None on CPUs."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _processor() -> tuple[str, set[str]]:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor(), set()
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    units = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name", platform.processor()), set(units.split())


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_REPOSITORY), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
