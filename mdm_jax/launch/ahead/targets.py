"""Chips by name, with their published figures, and devices of machines that are not there."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip, per second and in bytes.

    Attributes:
        flops: dense products in bfloat16.
        memory: its size; ``bandwidth`` its speed.
        links: bytes that leave it for other chips of its pod or host, over all links at once.
        source: where the figures are published.
    """

    platform: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    source: str


_CLOUD = "docs.cloud.google.com/tpu/docs"
_NVIDIA = "NVIDIA's data sheet"
CHIPS = {
    "v4": Chip("tpu", 275e12, 32e9, 1228e9, 300e9, f"{_CLOUD}/v4"),
    "v5e": Chip("tpu", 197e12, 16e9, 819e9, 200e9, f"{_CLOUD}/v5e"),
    "v5p": Chip("tpu", 459e12, 95e9, 2765e9, 600e9, f"{_CLOUD}/v5p"),
    "v6e": Chip("tpu", 918e12, 32e9, 1600e9, 400e9, f"{_CLOUD}/v6e"),
    "a100": Chip("gpu", 312e12, 80e9, 2039e9, 300e9, _NVIDIA),
    "h100": Chip("gpu", 989e12, 80e9, 3350e9, 450e9, _NVIDIA),
    "h200": Chip("gpu", 989e12, 141e9, 4800e9, 450e9, _NVIDIA),
    "cpu": Chip("cpu", math.nan, math.nan, math.nan, math.nan, "not given"),
}
"""By the name before the colon of a topology."""

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {optin}
  cuda_compute_capability {{ major: {major} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{name}"
"""
_HOPPER = {
    "cores": 132, "units": 128, "clock": 1.98, "shared": 233472, "optin": 232448,
    "cache": 52428800, "major": 9,
}  # fmt: skip
_GPUS: dict[str, dict[str, Any]] = {
    "a100": {
        "cores": 108, "units": 64, "clock": 1.41, "shared": 167936, "optin": 166912,
        "cache": 41943040, "major": 8, "bandwidth": 2039000000000, "memory": 84974239744,
        "name": "NVIDIA A100-SXM4-80GB",
    },
    "h100": _HOPPER | {
        "bandwidth": 3352320000000, "memory": 84942979072, "name": "NVIDIA H100 80GB HBM3",
    },
    "h200": _HOPPER | {
        "bandwidth": 4800000000000, "memory": 150754820096, "name": "NVIDIA H200",
    },
}  # fmt: skip
"""What XLA's compiler asks of a GPU, in the fields of its own description of targets."""

EXAMPLES = "v5e:2x4, v5p:4x4x4, h100:8, h200:2x8 (hosts x GPUs) or cpu:8"


def chip_of(topology: str) -> Chip:
    """The chip of ``NAME:SIZES``; ValueError for another form or an unknown name."""
    name = topology.partition(":")[0]
    if not re.fullmatch(r"\w+:\d+(x\d+)*", topology) or name not in CHIPS:
        raise ValueError(
            f"--topology={topology!r}: give a chip and how many there are, such as {EXAMPLES}; "
            f"known chips are {', '.join(CHIPS)}"
        )
    return CHIPS[name]


def devices(topology: str) -> Sequence[jax.Device]:
    """Devices of a topology, which programs can be compiled for and not run on.

    ``cpu:N`` are N devices of this process. ValueError if the compiler of a target is not
    installed, with what to install, or if it refuses the topology.
    """
    chip, (name, _, sizes) = chip_of(topology), topology.partition(":")
    if chip.platform == "cpu":
        return _own(int(sizes))
    _check_installed(chip.platform, topology)
    from jax.experimental import topologies

    try:
        if chip.platform == "tpu":
            # The library locks the TPU that it finds; there is none, and others may compile too.
            variables = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
            with _environment(TPU_WORKER_HOSTNAMES="localhost", **variables):
                return topologies.get_topology_desc(topology, platform="tpu").devices
        counts = [int(size) for size in sizes.split("x")]
        shape = "x".join(map(str, [1] * (3 - len(counts)) + counts))
        description = _GPU.format(**_GPUS[name])
        with _environment(JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1"):  # there is no driver
            return topologies.get_topology_desc(
                "", "cuda", target_config=description, topology=shape
            ).devices
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"--topology={topology}: the compiler refuses it ({str(error).splitlines()[0]}); "
            f"topologies are written like {EXAMPLES}"
            + "; for GPUs start with JAX_PLATFORMS=cpu"
            * (chip.platform == "gpu")
        ) from error


def compiler_options(platform: str) -> dict[str, str | int]:
    """What a compiler needs to be told where the target's devices are not there.

    A GPU's: where its assembler and library of functions lie, if a package has them, and to choose
    kernels without timing them.
    """
    if platform not in ("gpu", "cuda"):
        return {}
    options: dict[str, str | int] = {"xla_gpu_autotune_level": 0}
    with contextlib.suppress(ModuleNotFoundError):
        found = importlib.util.find_spec("nvidia.cuda_nvcc")
        if found and found.submodule_search_locations:
            options["xla_gpu_cuda_data_dir"] = found.submodule_search_locations[0]
    return options


def _own(number: int) -> Sequence[jax.Device]:
    if len(jax.devices("cpu")) < number:
        raise ValueError(
            f"--topology=cpu:{number}: this process has {len(jax.devices('cpu'))} CPU devices; "
            f"start it with XLA_FLAGS=--xla_force_host_platform_device_count={number}"
        )
    return jax.devices("cpu")[:number]


def _check_installed(platform: str, topology: str) -> None:
    needed, extra = {
        "tpu": ("libtpu", "tpu"),
        "gpu": ("jax_cuda12_plugin", "gpu-compile"),
    }[platform]
    if importlib.util.find_spec(needed) is None:
        raise ValueError(
            f"--topology={topology} needs the compiler of that target, which runs without the "
            f"hardware: pip install 'mdm_jax[{extra}]'"
        )


@contextlib.contextmanager
def _environment(**variables: str):
    """Variables that are not set otherwise, for a while."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
