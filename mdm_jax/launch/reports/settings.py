"""The listing of a config's settings that ``mdm config`` prints: value, unit, meaning, range."""

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from mdm_jax.checks import Name
from mdm_jax.launch import presets
from mdm_jax.launch.config import flat_settings
from mdm_jax.launch.names import Setting

_COLUMN = 40
"""Where the meaning begins."""


def listing(config: ConfigDict, name: str, groups: Sequence[str] = ()) -> str:
    """One entry per setting of ``config``, for the terminal; without one, a line each.

    ``groups``: sections or settings to list, as in "train.stop", instead of all. ``name`` is that
    of the config.
    """
    lines = list(entries(config, groups))
    head = [f"{name}: {first}" if (first := _summary(name)) else f"Settings of {name}."]
    head += ["Change one with --config.NAME=VALUE. * differs from the default of a setting.", ""]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if width:
        head = [line for text in head for line in textwrap.wrap(text, width) or [""]]
    texts, section = [], None
    for path, value, text in lines:
        if section not in (None, path.split(".")[0]):
            texts.append("")
        section = path.split(".")[0]
        texts += _entry(f"{path} = {value}", text, width)
    return "\n".join(head + texts)


def entries(config: ConfigDict, groups: Sequence[str] = ()) -> Iterator[tuple[str, str, str]]:
    """(path, value as Python writes it, meaning and range) of each setting; see :func:`listing`."""
    known = flat_settings()
    chosen = [path for path in known if not groups or any(_within(path, g) for g in groups)]
    for path in chosen:
        value: Any = config
        for part in path.split("."):
            value = value[part]
        yield path, repr(value), explained(known[path], value)


def explained(setting: Setting, value: Any) -> str:
    """Unit, meaning, what is allowed, and the default where ``value`` is another."""
    rule = setting.rule
    words = ", ".join(filter(None, (rule.unit, rule.meaning)))
    each = "several of " if isinstance(rule, Name) else "each "
    allowed = f"{each * rule.several}{rule.allowed}"
    text = f"{words}; {allowed}"
    return text if value == setting.default else f"* {text}; default {setting.default!r}"


def _summary(name: str) -> str:
    preset = presets.PRESETS.get(name.partition(":")[0])
    return preset.__doc__.splitlines()[0] if preset else ""


def _within(path: str, group: str) -> bool:
    return f"{path}.".startswith(f"{group}.")


def _entry(left: str, text: str, width: int | None) -> list[str]:
    """``text`` beside ``left``, or below it where that is long, wrapped at ``width`` columns."""
    if width is None:
        return [f"{left:<{_COLUMN}} {text}"]
    wrapped = textwrap.wrap(text, max(width - _COLUMN - 1, 20), break_long_words=False)
    first = [left] if len(left) > _COLUMN else [f"{left:<{_COLUMN}} {wrapped.pop(0)}"]
    return first + [f"{'':<{_COLUMN}} {line}" for line in wrapped]
