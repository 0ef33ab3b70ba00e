"""The config of a run that exists, as a config file: ``experiments/saved_config.py:WORKDIR``.

Command lines with a config: what absl and ml_collections leave unsaid when one is wrong.
"""

import difflib
import pathlib
import re
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from mdm_jax.launch import config as launch_config
from mdm_jax.launch.workdir import read_config


def get_config(workdir: str) -> ConfigDict:
    """Config of the run in ``workdir``; settings it did not know yet have their defaults."""
    config = launch_config.get_config()
    _update(config, read_config(pathlib.Path(workdir)) or {})
    return config


def _update(config: ConfigDict, saved: dict[str, Any]) -> None:
    for name, value in saved.items():
        if isinstance(config.get(name), ConfigDict):
            _update(config[name], value)
        else:
            config[name] = tuple(value) if isinstance(value, list) else value


_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")


class CommandLineError(ValueError):
    """The command line names something that does not exist."""


def with_config(argv: list[str]) -> list[str]:
    """``argv`` with ``--config`` of the workdir's own run where an existing run is asked about.

    Args:
        argv: program name and arguments, for the flags ``config``, ``workdir`` and ``mode``.

    Returns:
        ``argv``, its config file loaded once and every ``--config.field`` known to exist.

    Raises:
        CommandLineError: naming the nearest valid names.
        flags.Error: as absl raises it.
    """
    argv = _expanded(argv)
    path = config_path(argv)
    if path is None and "--help" not in argv:
        flags.FLAGS(argv, known_only=True)
        values = flags.FLAGS
        if values.mode != "train" and values.workdir is not None:
            if read_config(pathlib.Path(values.workdir)) is None:
                raise CommandLineError(
                    f"{values.workdir} holds no run (no config.json); train one first"
                )
            path = f"{__file__}:{values.workdir}"
            argv = [argv[0], f"--config={path}", *argv[1:]]
    overrides = [m.group(1) for a in argv[1:] if (m := _OVERRIDE.match(a))]
    if path is None:
        if overrides:
            raise CommandLineError(
                f"--config.{overrides[0]} changes a setting of a config; give --config=FILE before "
                "it, as in experiments/configs/quickstart.py"
            )
        return argv
    config = load(path)
    for name in overrides:
        check_field(config, name)
    return argv


def _expanded(argv: list[str]) -> list[str]:
    """``--config.mesh=data=2,fsdp=4`` as one override for each axis."""
    found = []
    for argument in argv:
        match = re.fullmatch(r"--?config\.mesh=(.*)", argument)
        if match is None:
            found.append(argument)
            continue
        for part in match.group(1).split(","):
            axis = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+)\s*", part)
            if axis is None:
                raise CommandLineError(
                    f"{argument}: a mesh is written as --config.mesh=data=2,fsdp=4,tensor=1, with "
                    "-1 for the axis data to take the devices that are left"
                )
            found.append(f"--config.mesh.{axis[1]}={axis[2]}")
    return found


def config_path(argv: list[str]) -> str | None:
    """Value of ``--config`` in a command line."""
    for number, argument in enumerate(argv):
        if match := re.fullmatch(r"--?config(?:=(.*))?", argument, re.DOTALL):
            following = argv[number + 1] if number + 1 < len(argv) else None
            return following if match.group(1) is None else match.group(1)
    return None


def load(path: str) -> ConfigDict:
    """The config of ``FILE.py`` or ``FILE.py:ARGUMENT``.

    Raises:
        CommandLineError: if there is no such file, or it refuses its argument.
    """
    file = pathlib.Path(path.split(":", 1)[0])
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")])
        hint = f"; did you mean {' or '.join(str(file.with_name(name)) for name in near)}?"
        raise CommandLineError(f"--config: there is no file {file}{hint if near else ''}")
    try:
        return flags.FLAGS["config"].parser.parse(path)
    except ValueError as error:
        # ml_collections puts a whole traceback into the message; its last line is the error's own.
        reason = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        raise CommandLineError(f"--config={path}: {reason}") from error


def check_field(config: ConfigDict, name: str) -> None:
    """Raises CommandLineError unless ``name``, as in "train.steps", is a field of ``config``."""
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
