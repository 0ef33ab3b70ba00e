"""A run's working directory: its config, provenance, and training lock."""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

import mdm_jax.hub.tokenizer  # noqa: F401  so that runs with such a tokenizer can be read
from mdm_jax import distributed, files
from mdm_jax.data.tokenizers import Tokenizer, load_tokenizer
from mdm_jax.files import write_json
from mdm_jax.launch import config as launch_config
from mdm_jax.launch.start import scaled
from mdm_jax.training.checkpoints import UNSAVED, CheckpointReader

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "mdm_jax")
FREE_SECTIONS = ("evaluate", "measure", "mesh", "panel", "sample", "spacing", "wandb")
"""Sections about evaluation, devices and displays; they may differ between calls."""
FILE = "training.lock"
HISTORY = (
    "metrics.jsonl",
    "checkpoints",
    "tensorboard",
    "wandb.json",
    "clip_search.jsonl",
    "auto.jsonl",
    "answers",
    "answers.jsonl",
    "reference",
    "evaluation.json",
    "report.txt",
    "report.html",
    "tokenizer.json",
    "spacing",
    "quality",
    "source",
    "variance",
)
"""What is set aside when a run starts anew; samples never take the place of older ones."""


class WorkdirError(RuntimeError):
    """The working directory belongs to another run, or cannot be written."""


def resolved(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json())


def open_workdir(workdir: str | os.PathLike) -> CheckpointReader:
    """Checkpoints of a run, for reading; it may be missing, or still training."""
    return CheckpointReader(files.as_path(workdir) / "checkpoints")


def read_config(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """The config of the directory's run, as JSON values, or None; WorkdirError if damaged."""
    path = files.as_path(workdir) / "config.json"
    with _reaching(path.parent):
        if not path.exists():
            return None
    try:
        saved = files.read_json(path)
        _typed(saved)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).removeprefix(f"{path} is damaged: ").splitlines()[0].strip("'\"")
        raise WorkdirError(
            f"{path} is damaged: {reason}. Put back the config that the run was started with (a "
            "copy; or train with the same --config and settings in a new --workdir and take its "
            "config.json)"
        ) from error
    return saved


def saved_config(workdir: str | os.PathLike) -> ConfigDict:
    """Config of the run in ``workdir``; settings newer than the run have their defaults."""
    return _typed(read_config(workdir) or {})


def _typed(saved: dict[str, Any]) -> ConfigDict:
    """The default config with ``saved`` values; an error names a setting of the wrong type."""

    def update(section: ConfigDict, values: Any, prefix: str) -> None:
        if not isinstance(values, dict):
            what = prefix.rstrip(".") or "the whole"
            raise TypeError(f"{what} is {values!r} instead of a group of settings")
        for name, value in values.items():
            if name not in section:
                raise TypeError(launch_config.unknown(prefix + name))
            if isinstance(section[name], ConfigDict):
                update(section[name], value, f"{prefix}{name}.")
            else:
                try:
                    section[name] = tuple(value) if isinstance(value, list) else value
                except (TypeError, ValueError, KeyError, AttributeError) as error:
                    raise TypeError(f"{prefix}{name} is {value!r} ({error})") from error

    config = launch_config.get_config()
    update(config, saved, "")
    return config


RESULTS = ("evaluation.json", "plots", "quality", "report.txt", "samples", "variance")
"""What modes but ``train`` write, of a model that is looked at before it is trained."""


def saved_nothing(workdir: files.Path) -> bool:
    """Whether a run was claimed there and has no state yet: training starts over, by any config."""
    with _reaching(workdir):
        return distributed.from_first((workdir / "checkpoints" / UNSAVED).exists())


def check(workdir: files.Path, config: ConfigDict, allow_change: bool = False) -> None:
    """Raise WorkdirError if another config's run (with a diff), or files but no run, are there.

    ``allow_change``: it was asked for, or that run has saved nothing yet. A larger ``train.steps``
    alone makes no other run.
    """
    with _reaching(workdir):
        there = [*workdir.iterdir()] if workdir.is_dir() else []  # first: a run may begin meanwhile
    if read_config(workdir) is None:
        if workdir.exists() and not workdir.is_dir():
            raise WorkdirError(f"{workdir} is not a directory; name another --workdir")
        if any(path.suffix != ".partial" and path.name not in {FILE, *RESULTS} for path in there):
            raise WorkdirError(
                f"{workdir} is not empty and holds no run (no config.json); name a new directory"
            )
        return
    changed = changes(workdir, config)
    steps = read_config(workdir)["train"]["steps"]
    if [line.split(":")[0] for line in changed] == ["train.steps"] and config.train.steps > steps:
        return
    if changed and not allow_change:
        fewer = f"\nIt was started for {steps} steps; train.steps can be raised, but not lowered."
        raise WorkdirError(
            f"{workdir} holds a run with another config:\n  "
            + "\n  ".join(changed)
            + fewer * (config.train.steps < steps)
            + "\nName another --workdir, restore these settings, or pass "
            "--allow_config_change to go on with the new ones."
        )


@contextlib.contextmanager
def _reaching(workdir: str | os.PathLike) -> Iterator[None]:
    """Turn errors of a bucket, which have no common class, into a WorkdirError."""
    try:
        yield
    except Exception as error:
        if not files.is_remote(workdir):
            raise
        raise WorkdirError(
            f"{workdir} cannot be reached: {type(error).__name__}: {error} (a bucket needs "
            "pip install 'mdm_jax[bucket]' and application default credentials)"
        ) from error


def check_history(workdir: files.Path, unsaved: bool) -> None:
    """Raise WorkdirError, in all processes, if a run without a checkpoint would start over.

    ``unsaved``: it is known to have saved nothing yet (``Checkpoints.unsaved``).
    """
    path = workdir / "metrics.jsonl"
    if distributed.from_first(not unsaved and path.exists() and files.size(path) > 0):
        raise WorkdirError(
            f"{workdir} has the metrics of a run but no checkpoint to go on from. Put its "
            "checkpoints back, or pass --restart to start anew, which keeps what there is as "
            "metrics.1.jsonl etc."
        )


def set_history_aside(workdir: files.Path) -> None:
    """Rename what a run left behind: ``metrics.jsonl`` to ``metrics.1.jsonl`` etc."""
    if distributed.is_first():
        for path in (workdir / name for name in HISTORY):
            if path.exists():
                path.rename(files.beside(path))
    distributed.barrier("history set aside")


def check_source(directory: files.Path, tokenizer: Tokenizer | None, field: str) -> None:
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


def changes(
    workdir: files.Path, config: ConfigDict, sections: Sequence[str] | None = None
) -> list[str]:
    """``name: old -> new`` for what differs from the directory's config in these sections.

    None: all but :data:`FREE_SECTIONS`. Settings newer than the run had their defaults.
    """
    old, new = read_config(workdir), resolved(config)
    if old is None:
        return []
    known = _filled(old, resolved(launch_config.get_config()))
    new = scaled.same(known, new)
    if sections is None:
        sections = sorted({*known, *new} - {*FREE_SECTIONS})
    chosen = ({name: each[name] for name in sections if name in each} for each in (known, new))
    return differences(*chosen)


def claim(workdir: files.Path, config: ConfigDict, allow_change: bool = False) -> None:
    """Check, then write ``config.json``, ``run.json``; keep others as ``config.1.json`` etc.

    Where another process may do the same, under the training lock.
    """
    check(workdir, config, allow_change)
    new, old = resolved(scaled.filled(config)), read_config(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    changed = changes(workdir, config)
    if changed:
        copy = files.beside(workdir / "config.json")
        # The old config is copied, not moved: a kill must not leave a run without one.
        write_json(copy, old)
        if (workdir / "run.json").exists():
            (workdir / "run.json").rename(workdir / copy.name.replace("config", "run"))
    if changed or old is None:
        write_json(workdir / "config.json", new)
    if not (workdir / "run.json").exists():
        write_json(workdir / "run.json", provenance(config.seed))


def new_files(directory: files.Path, stem: str, *suffixes: str) -> list[files.Path]:
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
                    files.create(paths[0])
                    return paths
            number += 1
            name = f"{stem}-{number}"


@contextlib.contextmanager
def writing(path: files.Path) -> Iterator[None]:
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
    """Seed, package versions, Python, machine, git revision and command line."""
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
        "command": command(sys.argv),
    }


def command(arguments: Sequence[str]) -> str:
    """The line for a shell that starts this program with these arguments, without --restart."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of python -m
    if pathlib.Path(arguments[0]).name == "mdm":
        start = ["mdm"]
    elif module is not None:
        start = ["python", "-m", module.name.removesuffix(".__main__")]
    else:
        start = ["python", arguments[0]]
    again = [each for each in arguments[1:] if not re.fullmatch("--?restart(=.*)?", each)]
    return shlex.join([*start, *again])


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


@contextlib.contextmanager
def training_lock(workdir: files.Path) -> Iterator[None]:
    """Lock out other trainers of ``workdir``, made if missing, until the block ends.

    Process 0 holds a file lock, released however it ends; buckets and file systems without locks
    have none. WorkdirError, in all processes, names the trainer at work.
    """
    if files.is_remote(workdir):
        logging.warning("%s: buckets have no locks; start one trainer at a time", workdir)
        with _reaching(workdir):  # what a bucket refuses is known before training
            probe = workdir / f"{jax.process_index()}.partial"
            files.write(probe, "")
            probe.unlink()
        yield
        return
    with contextlib.ExitStack() as stack:
        other = None
        if distributed.is_first():
            workdir.mkdir(parents=True, exist_ok=True)
            # Not through a link, whose target would be emptied.
            opened = os.open(workdir / FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            file = stack.enter_context(open(opened, "r+", encoding="utf-8"))
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


def _filled(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = dict(settings)
    for name, default in defaults.items():
        if name not in settings:
            filled[name] = default
        elif isinstance(default, dict) and isinstance(settings[name], dict):
            filled[name] = _filled(settings[name], default)
    return filled
