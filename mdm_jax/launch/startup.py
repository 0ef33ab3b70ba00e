"""Before the first use of JAX: processes of a cluster, and the compilation cache."""

import importlib.util
import os
import pathlib
from collections.abc import Mapping

import jax

HEARTBEAT_SECONDS = 60
"""A process that was silent for this long counts as dead, and the others end."""


def start_processes(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Join the other processes of the run, if any.

    Unset arguments are those of a :func:`detected` cluster; ``num_processes`` 1: look for none.
    Raises ValueError if only some arguments are given and no cluster gives the others.
    """
    flags = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in flags.items() if value is None]
    if num_processes == 1 and coordinator_address is None:
        return
    if 0 < len(missing) < len(flags):
        raise ValueError(
            f"several processes need {', '.join(flags)} together; {', '.join(missing)} is missing"
        )
    if not missing and not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id must be in [0, {num_processes}) for --num_processes={num_processes},"
            f" got {process_id}"
        )
    cluster = detected(os.environ) if missing else "a run of several processes"
    if cluster is None:
        return
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if not missing:
            raise
        raise ValueError(
            f"this looks like a process of {cluster}, but it could not join the others ({error}). "
            f"Give {', '.join(flags)}, or --num_processes=1 for a run of its own"
        ) from error


def detected(environment: Mapping[str, str]) -> str | None:
    """The kind of cluster that started this process as one of several, or None.

    ``jax.distributed.initialize`` fails on a workstation, warns or fails in any Kubernetes pod and
    waits on a lone TPU machine, so it is called only in a scheduler's tasks (a shell inside a Slurm
    allocation, say, is no task of ``srun``).
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm) and _number(environment, "SLURM_NTASKS") > 1:
        return "a Slurm step"
    if _number(environment, "OMPI_COMM_WORLD_SIZE") > 1:
        return "an Open MPI job"
    if "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return "a multislice TPU job"
    if len(environment.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        return "a TPU slice"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "an indexed Kubernetes job"
    devices = any(pathlib.Path(path).exists() for path in ("/dev/accel0", "/dev/vfio/0"))
    if devices and importlib.util.find_spec("libtpu") and "JAX_PLATFORMS" not in environment:
        return "a TPU machine"
    return None


def use_compilation_cache(directory: str | None) -> pathlib.Path | None:
    """Keep compiled programs on disk for the next start; returns where; "" for no cache.

    None: ``JAX_COMPILATION_CACHE_DIR`` if set, else ``mdm_jax`` below the user's cache directory.
    """
    if directory == "":
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    if directory is None:
        if jax.config.jax_compilation_cache_dir:
            return pathlib.Path(jax.config.jax_compilation_cache_dir)
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        directory = str(pathlib.Path(home) / "mdm_jax" / "compiled")
    jax.config.update("jax_compilation_cache_dir", directory)
    return pathlib.Path(directory)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    return int(value) if value.isdigit() else 0
