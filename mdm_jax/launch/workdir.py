"""A run's working directory: which config it belongs to, and what made it.

One trainer at a time in a working directory.
"""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from mdm_jax import distributed
from mdm_jax.launch import config as launch_config

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "mdm_jax")

FREE_SECTIONS = ("evaluate", "measure", "mesh", "sample")
"""Sections that say how a model is looked at or where it is trained, not what it is.

They may differ between calls.
"""


class WorkdirError(RuntimeError):
    """The working directory belongs to something else."""


def resolved(config: ConfigDict) -> dict[str, Any]:
    """The config as plain JSON values."""
    return json.loads(config.to_json())


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The config that the directory's run was started with, or None."""
    path = workdir / "config.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def check(workdir: pathlib.Path, config: ConfigDict, allow_change: bool = False) -> None:
    """Refuses a directory that is not this config's; changes nothing.

    Raises:
        WorkdirError: if the directory holds a run with another config, listing what differs, or
            holds files but no run.
    """
    old = read_config(workdir)
    if old is None:
        if workdir.exists() and not workdir.is_dir():
            raise WorkdirError(f"{workdir} is not a directory; name another --workdir")
        if workdir.exists() and any(p.suffix != ".partial" for p in workdir.iterdir()):
            raise WorkdirError(
                f"{workdir} is not empty and holds no run (no config.json); name a new directory"
            )
        return
    changed = _changes(old, resolved(config))
    if changed and not allow_change:
        raise WorkdirError(
            f"{workdir} holds a run with another config:\n  "
            + "\n  ".join(changed)
            + "\nName another --workdir, restore these settings, or pass "
            "--allow_config_change to go on with the new ones."
        )


def changes(workdir: pathlib.Path, config: ConfigDict, sections: Sequence[str]) -> list[str]:
    """``name: old -> new`` for what these sections of the directory's config have otherwise."""
    old, new = read_config(workdir), resolved(config)
    if old is None:
        return []
    known = _filled(old, resolved(launch_config.get_config()))
    return differences(*({name: each[name] for name in sections} for each in (known, new)))


def claim(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Writes ``config.json`` and ``run.json`` (seed, versions, git revision) where they are new.

    Files of another config are kept as ``config.1.json`` and so on.
    """
    new, old = resolved(config), read_config(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    changed = old is not None and _changes(old, new)
    if changed:
        number = 1
        while (workdir / f"config.{number}.json").exists():
            number += 1
        # The old config is copied, not moved: a kill must not leave a run without one.
        write_json(workdir / f"config.{number}.json", old)
        if (workdir / "run.json").exists():
            (workdir / "run.json").rename(workdir / f"run.{number}.json")
    if changed or old is None:
        write_json(workdir / "config.json", new)
    if not (workdir / "run.json").exists():
        write_json(workdir / "run.json", provenance(config.seed))


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``name: old -> new`` for every setting that differs."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return found


def provenance(seed: int) -> dict[str, Any]:
    """Seed, package versions, Python, machine and git revision."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "seed": seed,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "git_revision": git_revision(),
    }


def git_revision() -> str:
    """Commit of the source tree, with "+changes" where files differ from it."""
    root = pathlib.Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes JSON so that a kill leaves the old file or the new one."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between a run's settings and new ones; what it did not know had its default."""
    known = _filled(old, resolved(launch_config.get_config()))
    return differences(_fixed(known), _fixed(new))


def _filled(config: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = dict(config)
    for name, default in defaults.items():
        if name not in config:
            filled[name] = default
        elif isinstance(default, dict) and isinstance(config[name], dict):
            filled[name] = _filled(config[name], default)
    return filled


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in FREE_SECTIONS}


FILE = "training.lock"


@contextlib.contextmanager
def training_lock(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other trainers out of ``workdir``, which exists, until the block ends.

    It is a lock on a file that stays there; the system releases it when the process ends in any
    way. On a file system that has no locks there is none. With several processes the first one
    holds it.

    Raises:
        WorkdirError: in all processes, naming the trainer that is at work there.
    """
    with contextlib.ExitStack() as stack:
        other = None
        if distributed.is_first():
            file = stack.enter_context((workdir / FILE).open("a+", encoding="utf-8"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                other = file.read().strip() or "a process that did not say who it is"
            except OSError:
                pass  # some network file systems
            if other is None:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}\n")
                file.flush()
        other = distributed.from_first(other)
        if other is not None:
            raise WorkdirError(
                f"{workdir} is being trained in already, by {other}; wait for it, stop it, or name "
                "another --workdir"
            )
        yield
