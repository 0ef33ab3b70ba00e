"""Command lines: configs and their errors, processes of a cluster, the compilation cache."""

import contextlib
import difflib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
from absl import flags
from jax._src.distributed import global_state  # its key-value store has no public name
from ml_collections import ConfigDict

from mdm_jax.launch import HELP_FLAG, presets
from mdm_jax.launch.workdir import differences, read_config, saved_config

HEARTBEAT_SECONDS = 60
"""A process that was silent for this long counts as dead, and the others end."""

JOIN_SECONDS = 300
"""How long processes wait for each other when they start."""


def start_processes(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> Callable[[], None]:
    """Join the other processes of the run, if any; to be called at the end: what this returns.

    Unset arguments are those of a :func:`detected` cluster; ``num_processes`` 1: look for none.
    Raises ValueError if an argument is malformed or some are missing and no cluster gives them.
    """
    flags = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in flags.items() if value is None]
    if num_processes == 1 and coordinator_address is None:
        return lambda: None
    if 0 < len(missing) < len(flags):
        raise ValueError(
            f"several processes need {', '.join(flags)} together; {', '.join(missing)} is missing"
        )
    if coordinator_address is not None:
        _check_address(coordinator_address)
    if not missing and not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id must be in [0, {num_processes}) for --num_processes={num_processes},"
            f" got {process_id}"
        )
    cluster = detected(os.environ) if missing else "a run of several processes"
    if cluster is None:
        return lambda: None
    tell = _start_companion(coordinator_address, num_processes, process_id)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"this is a process of {cluster}, but it could not join the others ({error}). Give "
            f"{', '.join(flags)} with a free port, or --num_processes=1 for a run of its own"
        ) from error
    tell(global_state.coordinator_address)
    return lambda: tell("end")


def check_same(settings: dict[str, Any]) -> None:
    """Raise ValueError, in all processes, unless all were started with the same ``settings``.

    Over the coordination service: no devices are needed, whose set-up may hang where they differ.
    """
    client, me, count = global_state.client, global_state.process_id, global_state.num_processes
    client.key_value_set(f"mdm_jax/settings/{me}", json.dumps(settings))
    verdict = "same"
    for other in range(1, count if me == 0 else 1):
        theirs = json.loads(_get(f"mdm_jax/settings/{other}", f"process {other}"))
        if lines := differences(settings, theirs):
            verdict = "\n  ".join([f"process {other} has other settings than process 0:", *lines])
            verdict += "\nStart all processes with the same command line, but for --process_id"
            break
    if me == 0:
        client.key_value_set("mdm_jax/verdict", verdict)
    verdict = _get("mdm_jax/verdict", "process 0 to compare the settings of all")
    if verdict != "same":
        raise ValueError(verdict)


def leave(code: int) -> NoReturn:
    """Exit at once, without waiting for other processes; closed connections end them.

    Process 0, without whom JAX aborts the others, gives those that fail as it does a second.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if global_state.service is not None:
        time.sleep(1)
    os._exit(code)


def _get(key: str, whom: str) -> str:
    """The value of a key of the coordination service; says every 10 s for ``whom`` it waits."""
    for waited in range(10, JOIN_SECONDS + 10, 10):
        try:
            return global_state.client.blocking_key_value_get(key, 10_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
        me = global_state.process_id
        print(f"process {me} has waited {waited} s for {whom}", file=sys.stderr, flush=True)
    raise ValueError(f"process {me} has waited {waited} s for {whom}; see what that one says")


def _check_address(address: str) -> None:
    match = re.fullmatch(r"([\w.-]+|\[[\da-fA-F:.%\w]+\]):(\d+)", address)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise ValueError(
            f"--coordinator_address={address}: give HOST:PORT of process 0, with a name or number "
            "of its machine and a free port from 1 to 65535, as in --coordinator_address=node1:1234"
        )


def _start_companion(
    address: str | None, num_processes: int | None, process_id: int | None, pause: float = 10
) -> Callable[[str], None]:
    """Start :func:`_companion` in a process of its own; returns a function that writes to it."""
    code = f"{inspect.getsource(_companion)}\nimport sys\n_companion(*sys.argv[1:])"
    count = f"{num_processes} " if num_processes else ""
    arguments = (address or "", count, process_id or 0, pause, JOIN_SECONDS)
    process = subprocess.Popen(
        [sys.executable, "-ISc", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a Ctrl-C is not meant for it
        text=True,
    )

    def tell(line: str) -> None:
        with contextlib.suppress(OSError):  # it has ended
            process.stdin.write(f"{line}\n")
            process.stdin.flush()

    return tell


def _companion(address: str, count: str, me: str, pause: str, patience: str) -> None:
    """Say on standard error what this process cannot: that it waits, that process 0 has ended.

    JAX blocks while processes join, and aborts milliseconds after it loses process 0. Standard
    input gives the address once all have joined, then a last line. Imports no package.
    """
    import os
    import select
    import socket
    import time

    def say(text: str) -> None:
        os.write(2, f"{text}\n".encode())

    def connect() -> socket.socket:
        host, _, port = address.rpartition(":")
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=20)
        if not connection.recv(1000):  # the greeting of a server that is alive
            raise ConnectionResetError
        return connection

    def problem() -> str:
        """Why process 0 cannot be reached, or nothing."""
        try:
            connect().close()
        except OSError as error:
            return error.strerror or str(error) or type(error).__name__
        return ""

    start, wait = time.monotonic(), float(pause)
    while not select.select([0], [], [], wait)[0]:
        whom = f"the others; start all {count}processes, each with a --process_id of its own"
        if me != "0" and address and (why := problem()):
            whom = f"process 0, which does not answer at {address} ({why})"
        waited = time.monotonic() - start
        wait = min(3 * float(pause), float(patience) - 5 - waited)
        if wait < 0:
            return say(f"error: process {me} waited {waited:.0f} s for {whom}")
        say(f"process {me} waits for {whom} ({waited:.0f} of {patience} s)")
    address = os.read(0, 1000).decode().strip()
    if me == "0" or not address or problem():
        return None  # nothing to watch, or a firewall lets only JAX through
    while True:
        try:
            with connect() as connection:  # a new one, and so a greeting, every 20 s
                while ready := select.select([0, connection], [], [], 20)[0]:
                    if 0 in ready and (os.read(0, 1000) or connection not in ready):
                        return None  # the last line, or this process has gone
                    if not connection.recv(1000):
                        raise ConnectionResetError
        except TimeoutError:
            say(f"process 0 has not answered process {me} for 20 s")
        except OSError:
            return say(f"error: process 0 has ended, so process {me} ends; process 0 says why")


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
    What compiles in 0.01 s or more is kept, instead of JAX's 1 s, unless
    ``JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS`` says so.
    """
    limit = "jax_persistent_cache_min_compile_time_secs"
    if limit.upper() not in os.environ:
        jax.config.update(limit, min(getattr(jax.config, limit), 0.01))
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


MODES = (
    *("train", "evaluate", "sample", "spacing", "variance"),
    *("export", "chat", "eval", "report", "sweep", "tune-levels", "config", "compile", "new"),
)
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
    try:
        argv = [argv[0], *flags.FLAGS.read_flags_from_files(argv[1:])]
    except flags.Error as error:
        raise CommandLineError(str(error).removeprefix("ERROR:: ")) from error
    if argv[1:] and argv[1] in MODES:
        named = argv[1] == "config" and argv[2:] and not argv[2].startswith("-")
        rest = [f"--config={argv[2]}", *argv[3:]] if named else argv[2:]
        argv = [argv[0], f"--mode={argv[1]}", *rest]
    path, argv = take_config(_expand(argv))
    if path is None:
        flags.FLAGS(argv, known_only=True)
        values = flags.FLAGS
        if values.mode not in ("train", "sweep", "tune-levels") and values.workdir is not None:
            if read_config(values.workdir) is None:
                raise CommandLineError(
                    f"{values.workdir} holds no run (no config.json); train one first"
                )
            path = f"{__file__}:{_SAVED}{values.workdir}"
    elif path.split(":", 1)[0] in presets.PRESETS and not pathlib.Path(path).is_file():
        path = f"{__file__}:{path}"
    overrides = overridden(argv)
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
    return [argv[0], f"--config={path}", *argv[1:]]


def listing_instead(argv: list[str]) -> list[str]:
    """``argv`` with a flag ``--help`` as that which lists the settings of its config."""
    rest = [each for each in argv[1:] if not HELP_FLAG.fullmatch(each)]
    rest = rest[1:] if rest[:1] and rest[0] in MODES else without(["", *rest], ("mode",))[1:]
    return [argv[0], "config", *rest]


def config_name(argv: list[str]) -> str:
    """The config of ``argv`` as :func:`with_config` leaves it, in the words of the user."""
    return (take_config(argv)[0] or "").removeprefix(f"{__file__}:")


_READ_BY = {
    "adapter": ("export",),
    "dtype": ("export", "eval"),
    "max_tokens": ("chat", "eval"),
    "over": ("sweep",),
    "parameters": ("export", "chat", "eval"),
}
"""Modes that read a flag of several modes, or of one."""


def unread_flag(modes: Mapping[str, str], mode: str) -> str | None:
    """Why a flag that is given cannot be: other modes alone read it. None if there is none such.

    ``modes``: the mode by the name of the module that defines its flags.
    """
    by_module = flags.FLAGS.flags_by_module_dict()
    for module, own in modes.items():
        for flag in by_module.get(module, ()):
            if flag.present and own != mode:
                return f"--{flag.name} is of mdm {own}; --mode={mode} does not read it"
    for name, own in _READ_BY.items():
        if flags.FLAGS[name].present and mode not in own:
            return f"--{name} is of mdm {', '.join(own)}; --mode={mode} does not read it"
    return None


def overridden(argv: list[str]) -> list[str]:
    """Settings that the command line gives, such as "model.width"."""
    return [m.group(1) for a in argv[1:] if (m := _OVERRIDE.match(a))]


def _expand(argv: list[str]) -> list[str]:
    """``--config.mesh=data=2,fsdp=4`` as one override for each axis; short names of settings."""
    expanded = []
    answering = {"--mode=chat", "--mode=eval"} & {*argv} or any(
        re.match("--?source(=|$)", a) for a in argv
    )
    short = {"steps": "answer_steps" if answering else "config.sample.num_steps"}
    if {"--mode=spacing", "--mode=tune-levels"} & {*argv}:
        short = {}
        steps = re.compile(r"--?steps=\(?([\d, ]+)\)?")
        argv = [steps.sub(r"--config.spacing.steps=(\1,)", argument) for argument in argv]
    if "--mode=sample" in argv and not answering:
        short["temperature"] = "config.sample.temperature"
    for argument in argv:
        for name, setting in short.items():
            argument = re.sub(rf"^--?{name}=", f"--{setting}=", argument)
        argument = re.sub(r"^--?mesh=", "--config.mesh=", argument)
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


def without(argv: list[str], names: tuple[str, ...]) -> list[str]:
    """``argv`` without the flags of these names and their values."""
    rest, arguments = [], iter(argv)
    for argument in arguments:
        match = re.fullmatch(r"--?(\w+)(=.*)?", argument, re.DOTALL)
        if match is None or match[1] not in names:
            rest.append(argument)
        elif match[2] is None:
            next(arguments, None)
    return rest


def take_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of the last ``--config``, or None, and ``argv`` without any of them."""
    path, rest, arguments = None, [], iter(argv)
    for argument in arguments:
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
            path = next(arguments, None) if match.group(1) is None else match.group(1)
        else:
            rest.append(argument)
    return path, rest


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
