"""A run's working directory: its config, provenance, and training lock."""

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
from mdm_jax.data.tokenizers import Tokenizer, load_tokenizer
from mdm_jax.launch import config as launch_config

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "mdm_jax")
FREE_SECTIONS = ("evaluate", "measure", "mesh", "sample")
"""Sections about evaluation and devices; they may differ between calls."""
FILE = "training.lock"


class WorkdirError(RuntimeError):
    """The working directory belongs to another run, or cannot be written."""


def resolved(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json())


def read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The config that the directory's run was started with, as JSON values, or None."""
    path = workdir / "config.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def saved_config(workdir: str | pathlib.Path) -> ConfigDict:
    """Config of the run in ``workdir``; settings newer than the run have their defaults."""

    def update(section, saved: dict[str, Any]) -> None:
        for name, value in saved.items():
            if isinstance(section.get(name), ConfigDict):
                update(section[name], value)
            else:
                section[name] = tuple(value) if isinstance(value, list) else value

    config = launch_config.get_config()
    update(config, read_config(pathlib.Path(workdir)) or {})
    return config


def check(workdir: pathlib.Path, config: ConfigDict, allow_change: bool = False) -> None:
    """Raise WorkdirError if another config's run (with a diff), or files but no run, are there."""
    there = [*workdir.iterdir()] if workdir.is_dir() else []  # first: a run may begin meanwhile
    old = read_config(workdir)
    if old is None:
        if workdir.exists() and not workdir.is_dir():
            raise WorkdirError(f"{workdir} is not a directory; name another --workdir")
        if any(path.suffix != ".partial" and path.name != FILE for path in there):
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


def check_source(directory: pathlib.Path, tokenizer: Tokenizer | None, field: str) -> None:
    """Raise WorkdirError unless ``directory`` holds a run with the same tokens."""
    if read_config(directory) is None:
        raise WorkdirError(f"{field}: {directory} holds no run (no config.json)")
    saved = directory / "tokenizer.json"
    if tokenizer is None or not saved.exists():
        return
    if load_tokenizer(saved).fingerprint != tokenizer.fingerprint:
        raise WorkdirError(
            f"{field}: the tokenizer of {directory} is another than this run's, so its "
            f"parameters mean other tokens; pass --config.data.tokenizer={saved}"
        )


def changes(workdir: pathlib.Path, config: ConfigDict, sections: Sequence[str]) -> list[str]:
    """``name: old -> new`` for what differs from the directory's config in these sections."""
    old, new = read_config(workdir), resolved(config)
    if old is None:
        return []
    known = _filled(old, resolved(launch_config.get_config()))
    return differences(
        {name: known[name] for name in sections}, {name: new[name] for name in sections}
    )


def claim(workdir: pathlib.Path, config: ConfigDict, allow_change: bool = False) -> None:
    """Check, then write ``config.json``, ``run.json``; keep others as ``config.1.json`` etc.

    Where another process may do the same, under the training lock.
    """
    check(workdir, config, allow_change)
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


def new_files(directory: pathlib.Path, stem: str, *suffixes: str) -> list[pathlib.Path]:
    """New files ``stem`` or ``stem-2`` etc., made here, so that nobody else takes the names.

    To be called when the contents are ready. Raises WorkdirError where nothing can be written.
    """
    number, name = 1, stem
    with writing(directory / f"{stem}{suffixes[0]}"):
        directory.mkdir(parents=True, exist_ok=True)
        while True:
            paths = [directory / f"{name}{suffix}" for suffix in suffixes]
            if not any(path.exists() for path in paths[1:]):
                with contextlib.suppress(FileExistsError):
                    paths[0].open("x").close()
                    return paths
            number += 1
            name = f"{stem}-{number}"


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turn errors of the disk into a WorkdirError that names ``path``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise WorkdirError(f"{path} could not be written: {reason}") from error


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``name: old -> new`` for every setting that differs."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return lines


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
        "git_revision": git_revision(pathlib.Path(__file__).resolve().parent),
    }


def git_revision(root: pathlib.Path) -> str:
    """Commit of the source tree that holds ``root``, with "+changes" where files differ from it.

    A repository that surrounds an installed package, as that of the user, is not the package's.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", ".")
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def write_json(path: pathlib.Path, content: Any) -> None:
    """Write JSON atomically."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    temporary.replace(path)


@contextlib.contextmanager
def training_lock(workdir: pathlib.Path) -> Iterator[None]:
    """Lock out other trainers of ``workdir``, made if missing, until the block ends.

    Process 0 holds a file lock, released however it ends; file systems without locks have none.
    WorkdirError, in all processes, names the trainer at work.
    """
    with contextlib.ExitStack() as stack:
        other = None
        if distributed.is_first():
            workdir.mkdir(parents=True, exist_ok=True)
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


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Differences outside the free sections; settings newer than the run had their defaults."""
    known = _filled(old, resolved(launch_config.get_config()))
    fixed = ({k: v for k, v in each.items() if k not in FREE_SECTIONS} for each in (known, new))
    return differences(*fixed)


def _filled(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = dict(settings)
    for name, default in defaults.items():
        if name not in settings:
            filled[name] = default
        elif isinstance(default, dict) and isinstance(settings[name], dict):
            filled[name] = _filled(settings[name], default)
    return filled
