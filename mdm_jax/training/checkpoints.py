"""Checkpoints that are intact or refused: Orbax arrays under a SHA-256 manifest.

A layer over Orbax's CheckpointManager that falls back past a damaged checkpoint, naming it::

    last/<step>/             the latest full states (TrainState, data position, notes)
    best/<step>/             the averaged parameters with the lowest evaluation loss so far
    manifests/{last,best}/   of each: sizes and SHA-256 of files, shapes of arrays, amended records,
                             and its own SHA-256; a checkpoint without one is unfinished or damaged
    damaged-last-<step>-<n>/ checkpoints that failed their check, set aside, never deleted
    unsaved                  there until the first state is saved: its run may start over
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from mdm_jax import distributed, files
from mdm_jax.types import PyTree

_RECORDS = 2**20
"""Bytes left for what is not an array: records, indices, manifests, metrics."""


class CheckpointError(RuntimeError):
    """No usable checkpoint, or one that does not fit the configuration."""


class _Damaged(Exception):
    """A checkpoint is not as it was written; the message says in what."""


class _Manager(ocp.CheckpointManager):
    def metrics(self, step: int) -> None:
        """Nothing: read from all checkpoints at opening, one damaged file would end every mode."""


class Store:
    """The checkpoints ``name`` below ``root``, of pytrees saved as ``item``.

    ``keep``, the largest number of checkpoints, is for the one trainer, who writes and sets damaged
    ones aside. Without it nothing is changed, and a trainer may be at work.
    """

    def __init__(self, root: files.Path, name: str, item: str, keep: int | None = None):
        self.directory = root / name
        self._item, self._keep, self._writable = item, keep, keep is not None
        self._manifests = root / "manifests" / name
        if self._writable:
            self._manifests.mkdir(parents=True, exist_ok=True)
        # Saving is synchronous: a kill then leaves the old or the new state, and the manifest
        # describes files that are all there. Orbax's read_only would print a warning each time.
        options = ocp.CheckpointManagerOptions(
            enable_async_checkpointing=False,
            create=self._writable,
            cleanup_tmp_directories=self._writable,
        )
        self._manager = _Manager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def restore(self, abstract_tree: PyTree | None, records: tuple[str, ...]) -> dict | None:
        """Tree and records of the newest intact checkpoint; CheckpointError if it does not fit."""
        tried = set()
        while remaining := [step for step in self.steps() if step not in tried]:
            step = remaining[-1]
            tried.add(step)
            problem, manifest = distributed.from_first(
                self._verify(step) if distributed.is_first() else None
            )
            if problem is None:
                try:
                    items = self._read(step, abstract_tree, records, manifest)
                    problem = self._meanwhile(step)
                    if problem is None:
                        return items
                except CheckpointError:
                    raise
                except Exception as error:
                    problem = self._meanwhile(step)
                    if problem is None:
                        # Every byte is as written, so it is the configuration that differs.
                        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                        raise _misfit(self.directory / str(step), reason) from error
            self._pass_over(step, problem)
        return None

    def read(self, step: int, abstract_tree: PyTree) -> PyTree:
        """The tree of a step, without checking its files."""
        try:
            manifest = self._load_manifest(step)
        except _Damaged:
            manifest = None
        return self._read(step, abstract_tree, (), manifest)[self._item]

    def as_saved(self, leaves: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
        """Abstract leaves to restore: ``fields`` as given, others as in the newest manifest."""
        saved = self._saved_shapes()
        if saved is None:
            return leaves
        sharding = next(iter(leaves.values())).sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        wanted = _shapes(leaves)
        result = {name: leaf for name, leaf in leaves.items() if field_of(name) in fields}
        for name, form in saved.items():
            if field_of(name) in fields:
                continue
            if wanted.get(name) == form:
                result[name] = leaves[name]
            else:
                dtype, bracket, shape = form.partition("[")
                shape = json.loads(bracket + shape)
                result[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return result

    def save(
        self, step: int, tree: PyTree, records: dict[str, dict[str, Any]], force: bool = False
    ) -> bool:
        """Write a checkpoint; False if the step (or, unless ``force``, a later one) exists."""
        steps = self.steps()
        if step in steps or (not force and any(other > step for other in steps)):
            return False
        leaves = named_leaves(tree)
        self._check_space(self.directory / str(step), leaves)
        if distributed.is_first():
            self._manifest(step).unlink(missing_ok=True)
        items = {self._item: ocp.args.StandardSave(leaves)}
        items |= {name: ocp.args.JsonSave(record) for name, record in records.items()}
        # Unforced, Orbax skips steps below its latest one and only returns False.
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._manager.wait_until_finished()
        distributed.barrier(f"saved {self.directory} {step}")
        if distributed.is_first():
            content = {"files": _files(self.directory / str(step)), "arrays": _shapes(leaves)}
            self._write_manifest(step, content)
        # Not before the new one has its manifest, and not by Orbax, which would be too early.
        distributed.barrier(f"described {self.directory} {step}")
        for old in steps[: max(0, len(steps) + 1 - self._keep)]:
            self._manager.delete(old)
        if distributed.is_first():
            kept = {str(s) for s in self.steps()}
            for path in self._manifests.glob("*.json"):
                if path.stem not in kept:
                    path.unlink()
        return True

    def _check_space(self, path: files.Path, leaves: dict[str, Any]) -> None:
        """Raise CheckpointError on a full disk, where Orbax fails late and with many tracebacks."""
        needed, free = _RECORDS + sum(leaf.nbytes for leaf in leaves.values()), math.inf
        with contextlib.suppress(OSError):  # no disk, such as a bucket
            free = shutil.disk_usage(self.directory).free
        if distributed.from_first(free) < needed:
            raise CheckpointError(
                f"{path} cannot be written: it takes {needed / 2**20:,.1f} MiB and the disk has "
                f"{free / 2**20:,.1f} MiB left; free some and run the same command again"
            )

    def amend(self, step: int, records: dict[str, dict[str, Any]]) -> None:
        """Replace records of a checkpoint; only its manifest is written."""
        if distributed.is_first() and self._manifest(step).exists():
            with contextlib.suppress(_Damaged):  # named when it is restored
                self._write_manifest(step, self._load_manifest(step) | {"amended": records})

    def close(self) -> None:
        self._manager.close()

    def _meanwhile(self, step: int) -> str | None:
        """What a trainer removed during the reading."""
        if self._writable:
            return None  # there is no other writer
        problem = None
        if distributed.is_first():
            removed = not (self.directory / str(step)).exists()
            problem = "it was removed" if removed else self._verify(step, digests=False)[0]
        return distributed.from_first(problem)

    def _pass_over(self, step: int, problem: str) -> None:
        source = self.directory / str(step)
        if self._writable:
            number, stem = 0, f"damaged-{self.directory.name}-{step}"
            while (target := self.directory.parent / f"{stem}-{number}").exists():
                number += 1
            distributed.barrier(f"setting aside {source} as {number}")
            if distributed.is_first():
                source.rename(target)
                self._manifest(step).unlink(missing_ok=True)
            distributed.barrier(f"set aside {source} as {number}")
            outcome = f"Moved it to {target}; trying the one before, if any."
        else:
            outcome = "It stays where it is; trying another one, if any."
        self._manager.reload()
        if distributed.is_first() and (self._writable or step in self.steps()):
            logging.warning("checkpoint %s is damaged: %s. %s", source, problem, outcome)

    def _read(
        self, step: int, tree: PyTree | None, records: tuple[str, ...], manifest: dict | None
    ) -> dict[str, Any]:
        if callable(tree):
            tree = tree(self._read(step, None, records, manifest))
        items = {name: ocp.args.JsonRestore() for name in records}
        if tree is not None:
            leaves = named_leaves(tree)
            if manifest is not None:
                self._check_fit(step, leaves, manifest["arrays"])
            items[self._item] = ocp.args.StandardRestore(leaves)
        restored = dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
        if tree is not None:
            values = [restored[self._item][name] for name in leaves]
            restored[self._item] = jax.tree.unflatten(jax.tree.structure(tree), values)
        amended = (manifest or {}).get("amended", {})
        return restored | {name: amended[name] for name in records if name in amended}

    def _check_fit(self, step: int, leaves: dict[str, Any], saved: dict[str, str]) -> None:
        wanted = _shapes(leaves)
        differing = [
            f"{name} is {saved.get(name, 'absent')}, wanted {wanted.get(name, 'absent')}"
            for name in sorted({*saved, *wanted})
            if saved.get(name) != wanted.get(name)
        ]
        if differing:
            more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise _misfit(self.directory / str(step), "; ".join(differing[:3]) + more)

    def _verify(self, step: int, digests: bool = True) -> tuple[str | None, dict[str, Any] | None]:
        """(what is damaged or None, the manifest without its list of files)."""
        try:
            manifest = self._load_manifest(step)
            self._compare(step, manifest.pop("files"), digests)
        except _Damaged as error:
            return str(error), None
        except FileNotFoundError as error:
            return f"file {error.filename} is missing", None
        return None, manifest

    def _compare(self, step: int, expected: dict[str, dict], digests: bool) -> None:
        found = _files(self.directory / str(step), digests)
        for name, entry in expected.items():
            if name not in found:
                raise _Damaged(f"file {name} is missing")
            if (size := found[name]["size"]) != entry["size"]:
                raise _Damaged(f"file {name} has {size} bytes instead of {entry['size']}")
            if digests and found[name]["sha256"] != entry["sha256"]:
                raise _Damaged(f"file {name} has changed since it was written")

    def _saved_shapes(self) -> dict[str, str] | None:
        for step in reversed(self.steps()):
            with contextlib.suppress(_Damaged):
                return self._load_manifest(step)["arrays"]
        return None

    def _manifest(self, step: int) -> files.Path:
        return self._manifests / f"{step}.json"

    def _load_manifest(self, step: int) -> dict[str, Any]:
        path = self._manifest(step)
        try:
            content = files.read_json(path)
        except FileNotFoundError:
            raise _Damaged(f"it has no manifest {path}, so its save was not finished") from None
        except ValueError as error:
            raise _Damaged(f"its manifest {error}") from error
        if not _is_manifest(content) or content.pop("sha256", None) not in (None, _sum(content)):
            raise _Damaged(f"its manifest {path} is damaged: it is not what was written")
        return content

    def _write_manifest(self, step: int, content: dict[str, Any]) -> None:
        content = json.loads(json.dumps(content))  # as it will be read
        files.write_json(self._manifest(step), content | {"sha256": _sum(content)})


def _sum(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest but for this entry, which earlier releases did not write."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_manifest(content: Any) -> bool:
    def maps(value: Any, kind: type) -> bool:
        return isinstance(value, dict) and all(isinstance(v, kind) for v in value.values())

    return (
        maps(content, object)
        and {"files", "arrays"} <= set(content) <= {"files", "arrays", "amended", "sha256"}
        and maps(content["files"], dict)
        and all({"size", "sha256"} <= set(entry) for entry in content["files"].values())
        and maps(content["arrays"], str)
        and maps(content.get("amended", {}), dict)
    )


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, such as "params/kernel", readable without the state's classes."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def field_of(name: str) -> str:
    """The outermost part of a leaf's name."""
    return name.split("/")[0]


def _shapes(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _misfit(path: files.Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} is whole but does not fit this configuration (another model, "
        f"optimizer or variance chain?): {reason}"
    )


def _files(directory: files.Path, digests: bool = True) -> dict[str, dict[str, Any]]:
    manifest = {}
    for path in files.below(directory):
        entry = manifest[path.relative_to(directory).as_posix()] = {"size": files.size(path)}
        if digests:
            with path.open("rb") as file:
                entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return manifest


UNSAVED = "unsaved"
_ANEW = "Start anew with another directory, or here with --restart, which keeps what there is"


class Restored(NamedTuple):
    """Contents of a checkpoint in ``last/``; the data position and notes are JSON."""

    state: PyTree
    position: dict[str, Any]
    notes: dict[str, Any]


class CheckpointReader:
    """Read-only access to the verified states of one run, which may still be training.

    All processes call every method at the same point, on a shared directory, which may be missing.
    A checkpoint fits any number of processes and any mesh.
    """

    _damaged = "the warnings above say what is wrong with them"

    def __init__(self, directory: str | os.PathLike):
        self._open(directory)

    def _open(self, directory: str | os.PathLike, keep: tuple[int, int] | None = None) -> None:
        self._root = root = files.absolute(directory)
        keep_last, keep_best = keep or (None, None)
        self._last = Store(root, "last", "state", keep_last)
        self._best = Store(root, "best", "ema", keep_best)
        self._best_metrics: dict[str, float] | None = None

    def steps(self) -> list[int]:
        """Steps of the full states, ascending."""
        return self._last.steps()

    def best_metrics(self) -> dict[str, float] | None:
        """Metrics of the best parameters, with their step; None without an intact checkpoint."""
        if self._best_metrics is None:  # reading verifies every byte: once is enough
            self._best_metrics = (self._best.restore(None, ("metrics",)) or {}).get("metrics")
        return self._best_metrics

    def restore_best(self, abstract_ema: PyTree) -> PyTree:
        """The best averaged parameters; CheckpointError if none is intact or they do not fit."""
        restored = self._best.restore(abstract_ema, ("metrics",))
        if restored is None:
            raise CheckpointError(f"no whole checkpoint in {self._best.directory}")
        self._best_metrics = restored["metrics"]
        return restored["ema"]

    def restore_last(self, abstract_state: PyTree) -> Restored | None:
        """The newest intact state, or None; ``abstract_state`` may be a function of its records.

        CheckpointError if none of the checkpoints is intact, also when all were set aside before,
        or if the newest intact one does not fit.
        """
        steps = self.steps()
        restored = self._last.restore(abstract_state, ("position", "notes"))
        if restored is None and steps and not self.unsaved:
            raise CheckpointError(
                f"none of the checkpoints at steps {steps} in {self._last.directory} is whole; "
                f"{self._damaged}. {_ANEW}"
            )
        lost = None if restored else distributed.from_first(self._lost())
        if lost:
            raise CheckpointError(f"no checkpoint is left of a run that saved {lost}. {_ANEW}")
        return None if restored is None else Restored(**restored)

    @property
    def unsaved(self) -> bool:
        """Whether the run is known to have saved nothing yet, so that it may start over."""
        return distributed.from_first((self._root / UNSAVED).exists())

    def _lost(self) -> str | None:
        """What shows that states were saved here."""
        if self.unsaved or not self._root.exists():
            return None
        aside = sorted(p.name for p in self._root.iterdir() if p.name.startswith("damaged-last-"))
        return f"{', '.join(aside)} in {self._root}" if aside else None

    def restore_last_fields(self, abstract_state: PyTree, fields: Sequence[str]) -> Restored | None:
        """As :meth:`restore_last`, with None for leaves outside ``fields`` that do not fit.

        Everything is read; leaves that do not fit are on every device until this returns.
        """
        tree = abstract_state

        def as_saved(records: dict[str, Any]) -> dict[str, Any]:
            nonlocal tree
            tree = abstract_state(records) if callable(abstract_state) else abstract_state
            return self._last.as_saved(named_leaves(tree), fields)

        restored = self.restore_last(as_saved)
        if restored is None:
            return None
        wanted, found = _shapes(named_leaves(tree)), _shapes(restored.state)
        kept = (restored.state[n] if found.get(n) == form else None for n, form in wanted.items())
        return restored._replace(state=jax.tree.unflatten(jax.tree.structure(tree), kept))

    def restore_step(self, step: int, abstract_state: PyTree) -> PyTree:
        """The full state of a step, unverified; CheckpointError if missing or of another shape."""
        if step not in self.steps():
            raise CheckpointError(f"no checkpoint of step {step}, there are {self.steps()}")
        return self._last.read(step, abstract_state)

    def close(self) -> None:
        """Release the managers' threads."""
        self._last.close()
        self._best.close()


class Checkpoints(CheckpointReader):
    """Saves states too, and sets damaged ones aside; for the one trainer of a directory.

    Each process writes its own shards, process 0 the manifests. The directory is created if missing
    and unfinished saves are removed. ``keep_last`` >= 1 full states are kept.
    """

    _damaged = "they were set aside beside it as damaged-*"

    def __init__(self, directory: str | os.PathLike, keep_last: int = 2):
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        self._open(directory, keep=(keep_last, 1))

    def begin(self) -> None:
        """Note that a run starts here from its first step and has saved nothing yet."""
        if distributed.is_first():
            files.write(self._root / UNSAVED, "nothing was saved yet\n")

    def save(
        self, step: int, state: PyTree, position: dict[str, Any], notes: dict[str, Any]
    ) -> None:
        """Write a full state unless it exists; CheckpointError if only later steps exist."""
        records = {"position": position, "notes": notes}
        if not self._last.save(step, state, records) and step not in self.steps():
            raise CheckpointError(
                f"step {step} cannot be saved in {self._last.directory}, which holds the later "
                f"steps {self.steps()}; restore these or move them away first"
            )
        if distributed.is_first():
            (self._root / UNSAVED).unlink(missing_ok=True)

    def amend_notes(self, step: int, notes: dict[str, Any]) -> None:
        """Replace the notes of a full state, at the cost of a small file."""
        self._last.amend(step, {"notes": notes})

    def save_best(self, step: int, ema: PyTree, metrics: dict[str, float]) -> bool:
        """Keep ``ema`` if ``metrics["loss"]`` is finite and the lowest; returns whether it was."""
        best = self.best_metrics()
        if not math.isfinite(metrics["loss"]):
            return False
        if best is not None and metrics["loss"] >= best["loss"]:
            return False
        kept = {"step": step, **metrics}
        # A resumed run may improve at an earlier step than the best so far.
        if not self._best.save(step, ema, {"metrics": kept}, force=True):
            return False
        self._best_metrics = kept
        return True


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a pytree of arrays, to restore into."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
