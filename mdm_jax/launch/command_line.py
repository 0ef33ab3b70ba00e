"""Command lines: configs and their errors, processes of a cluster, the compilation cache."""

import difflib
import importlib.util
import os
import pathlib
import re
from collections.abc import Mapping

import jax
from absl import flags
from ml_collections import ConfigDict

from mdm_jax.launch import presets
from mdm_jax.launch.workdir import read_config, saved_config

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


MODES = ("train", "evaluate", "sample", "variance")
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")
_SAVED = "saved:"


class CommandLineError(ValueError):
    """The command line names something that does not exist."""


def get_config(name: str) -> ConfigDict:
    """A built-in config, or ``saved:WORKDIR``: this module is the config file of both."""
    if name.startswith(_SAVED):
        return saved_config(name.removeprefix(_SAVED))
    return presets.get_config(name)


def with_config(argv: list[str]) -> list[str]:
    """``argv`` as absl and ml_collections read it, config loaded once, its fields checked.

    The mode may come first, without ``--mode=``. ``--config`` may name a built-in config; where an
    existing workdir is evaluated, sampled or measured, it defaults to the config of its run. Raises
    CommandLineError with close matches, and absl's flags.Error.
    """
    if argv[1:] and argv[1] in MODES:
        argv = [argv[0], f"--mode={argv[1]}", *argv[2:]]
    argv = _expand_mesh(argv)
    path = config_path(argv)
    if path is None:
        flags.FLAGS(argv, known_only=True)
        values = flags.FLAGS
        if values.mode != "train" and values.workdir is not None:
            if read_config(pathlib.Path(values.workdir)) is None:
                raise CommandLineError(
                    f"{values.workdir} holds no run (no config.json); train one first"
                )
            path = f"{__file__}:{_SAVED}{values.workdir}"
            argv = [argv[0], f"--config={path}", *argv[1:]]
    elif path.split(":", 1)[0] in presets.PRESETS and not pathlib.Path(path).is_file():
        argv, path = _replace_config(argv, f"{__file__}:{path}"), f"{__file__}:{path}"
    overrides = [m.group(1) for a in argv[1:] if (m := _OVERRIDE.match(a))]
    if path is None:
        if overrides:
            raise CommandLineError(
                f"--config.{overrides[0]} changes a setting of a config; give --config=FILE before "
                "it, as in --config=quickstart"
            )
        return argv
    config = load(path)
    for name in overrides:
        check_field(config, name)
    return argv


def _expand_mesh(argv: list[str]) -> list[str]:
    """``--config.mesh=data=2,fsdp=4`` as one override for each axis."""
    expanded = []
    for argument in argv:
        match = re.fullmatch(r"--?config\.mesh=(.*)", argument)
        if match is None:
            expanded.append(argument)
            continue
        for part in match.group(1).split(","):
            axis = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+)\s*", part)
            if axis is None:
                raise CommandLineError(
                    f"{argument}: a mesh is written as --config.mesh=data=2,fsdp=4,tensor=1, with "
                    "-1 for the axis data to take the devices that are left"
                )
            expanded.append(f"--config.mesh.{axis[1]}={axis[2]}")
    return expanded


def config_path(argv: list[str]) -> str | None:
    for number, argument in enumerate(argv):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
            following = argv[number + 1] if number + 1 < len(argv) else None
            return following if match.group(1) is None else match.group(1)
    return None


def _replace_config(argv: list[str], path: str) -> list[str]:
    replaced, skip = [], False
    for argument in argv:
        if skip:
            skip = False
        elif re.fullmatch(r"--?config(?:=.*)?", argument, re.DOTALL):
            replaced.append(f"--config={path}")
            skip = "=" not in argument
        else:
            replaced.append(argument)
    return replaced


def load(path: str) -> ConfigDict:
    """The config of ``FILE.py`` or ``FILE.py:ARGUMENT``; CommandLineError if missing or refused."""
    file, _, argument = path.partition(":")
    if not pathlib.Path(file).is_file():
        raise CommandLineError(f"--config: {_missing(pathlib.Path(file))}")
    try:
        return flags.FLAGS["config"].parser.parse(path)
    except ValueError as error:
        # ml_collections puts a whole traceback into the message; its last line is the error's own.
        reason = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        shown = argument if file == __file__ else path
        raise CommandLineError(f"--config={shown}: {reason}") from error


def _missing(file: pathlib.Path) -> str:
    if file.suffix != ".py" and len(file.parts) == 1:
        return presets.unknown(str(file))
    near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")])
    hint = f"; did you mean {' or '.join(str(file.with_name(name)) for name in near)}?"
    return f"there is no file {file}{hint if near else ''}"


def check_field(config: ConfigDict, name: str) -> None:
    """Raise CommandLineError unless ``name``, as in "train.steps", is a field of ``config``."""
    node, prefix = config, "config"
    for part in name.split("."):
        if not isinstance(node, ConfigDict):
            raise CommandLineError(f"--config.{name}: {prefix} is a value and has no fields")
        if part not in node:
            near = difflib.get_close_matches(part, node)
            hint = f"did you mean {' or '.join(f'--{prefix}.{n}' for n in near)}? " if near else ""
            raise CommandLineError(
                f"--config.{name}: {prefix} has no field {part!r}; {hint}fields are "
                f"{', '.join(sorted(node))}"
            )
        node, prefix = node[part], f"{prefix}.{part}"
