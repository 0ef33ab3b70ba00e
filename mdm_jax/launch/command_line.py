"""Command lines with a config: names of built-in configs, errors with close matches."""

import difflib
import pathlib
import re

from absl import flags
from ml_collections import ConfigDict

from mdm_jax.launch import presets
from mdm_jax.launch.workdir import read_config, saved_config

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
    """``argv`` as absl and ml_collections read it, config loaded once, ``--config.field``s checked.

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
