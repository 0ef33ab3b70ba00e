"""Checkpoints that are intact or refused: Orbax arrays under a SHA-256 manifest.

A layer over Orbax's CheckpointManager that falls back past a damaged checkpoint, naming it::

    last/<step>/             the latest full states (TrainState, data position, notes)
    best/<step>/             the averaged parameters with the lowest evaluation loss so far
    manifests/{last,best}/   of each: sizes and SHA-256 of files, shapes of arrays, amended records
    damaged-last-<step>-<n>/ checkpoints that failed their check, set aside, never deleted
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from mdm_jax import distributed
from mdm_jax.types import PyTree


class CheckpointError(RuntimeError):
    """No usable checkpoint, or one that does not fit the configuration."""


class Store:
    """The checkpoints ``name`` below ``root``, of pytrees saved as ``item``.

    ``keep``, the largest number of checkpoints, is for the one trainer, who writes and sets damaged
    ones aside. Without it nothing is changed, and a trainer may be at work.
    """

    def __init__(self, root: pathlib.Path, name: str, item: str, keep: int | None = None):
        self.directory = root / name
        self._item, self._writable = item, keep is not None
        self._manifests = root / "manifests" / name
        if self._writable:
            self._manifests.mkdir(parents=True, exist_ok=True)
        # Saving is synchronous: a kill then leaves the old or the new state, and the manifest
        # describes files that are all there. Orbax's read_only would print a warning each time.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            create=self._writable,
            cleanup_tmp_directories=self._writable,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def restore(self, abstract_tree: PyTree | None, records: tuple[str, ...]) -> dict | None:
        """Tree and records of the newest intact checkpoint; CheckpointError if it does not fit."""
        tried = set()
        while remaining := [step for step in self.steps() if step not in tried]:
            step = remaining[-1]
            tried.add(step)
            problem = distributed.from_first(
                self._problem(step) if distributed.is_first() else None
            )
            if problem is None:
                try:
                    items = self._read(step, abstract_tree, records)
                    problem = self._meanwhile(step)
                    if problem is None:
                        return items
                except CheckpointError:
                    raise
                except Exception as error:
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    problem = self._meanwhile(step)
                    if problem is None and self._manifest(step).exists():
                        # Every byte is as written, so it is the configuration that differs.
                        raise _misfit(self.directory / str(step), reason) from error
                    problem = problem or f"it cannot be read ({reason})"
            self._pass_over(step, problem)
        return None

    def read(self, step: int, abstract_tree: PyTree) -> PyTree:
        """The tree of a step, without checking its files."""
        return self._read(step, abstract_tree, ())[self._item]

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
        if distributed.is_first():
            self._manifest(step).unlink(missing_ok=True)
        leaves = named_leaves(tree)
        items = {self._item: ocp.args.StandardSave(leaves)}
        items |= {name: ocp.args.JsonSave(record) for name, record in records.items()}
        # Unforced, Orbax skips steps below its latest one and only returns False.
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._manager.wait_until_finished()
        distributed.barrier(f"saved {self.directory} {step}")
        if distributed.is_first():
            self._write_manifest(step, self._describe(step, leaves))
            kept = {str(s) for s in self.steps()}
            for path in self._manifests.glob("*.json"):
                if path.stem not in kept:
                    path.unlink()
        return True

    def amend(self, step: int, records: dict[str, dict[str, Any]]) -> None:
        """Replace records of a checkpoint; only its manifest is written."""
        if distributed.is_first() and self._manifest(step).exists():
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
            problem = "it was removed" if removed else self._problem(step, digests=False)
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

    def _read(self, step: int, abstract_tree: PyTree | None, records: tuple[str, ...]) -> dict:
        items = {name: ocp.args.JsonRestore() for name in records}
        if abstract_tree is not None:
            leaves = named_leaves(abstract_tree)
            self._check_fit(step, leaves)
            items[self._item] = ocp.args.StandardRestore(leaves)
        restored = dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
        if abstract_tree is not None:
            values = [restored[self._item][name] for name in leaves]
            restored[self._item] = jax.tree.unflatten(jax.tree.structure(abstract_tree), values)
        if self._manifest(step).exists():
            amended = self._load_manifest(step).get("amended", {})
            restored |= {name: amended[name] for name in records if name in amended}
        elif self._writable and abstract_tree is not None and distributed.is_first():
            self._write_manifest(step, self._describe(step, leaves))  # killed before it could be
        return restored

    def _check_fit(self, step: int, leaves: dict[str, Any]) -> None:
        if not self._manifest(step).exists():
            return
        saved, wanted = self._load_manifest(step)["arrays"], _shapes(leaves)
        differing = [
            f"{name} is {saved.get(name, 'absent')}, wanted {wanted.get(name, 'absent')}"
            for name in sorted({*saved, *wanted})
            if saved.get(name) != wanted.get(name)
        ]
        if differing:
            more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise _misfit(self.directory / str(step), "; ".join(differing[:3]) + more)

    def _problem(self, step: int, digests: bool = True) -> str | None:
        path = self._manifest(step)
        if not path.exists():
            return None  # killed between the save and its manifest: let reading it decide
        try:
            expected = self._load_manifest(step)["files"]
            files = _files(self.directory / str(step), digests)
        except FileNotFoundError as error:
            return f"file {error.filename} is missing"
        except (ValueError, KeyError, TypeError):
            return f"its manifest {path} is damaged"
        for name, entry in expected.items():
            if name not in files:
                return f"file {name} is missing"
            if files[name]["size"] != entry["size"]:
                return f"file {name} has {files[name]['size']} bytes instead of {entry['size']}"
            if digests and files[name]["sha256"] != entry["sha256"]:
                return f"file {name} has changed since it was written"
        return None

    def _saved_shapes(self) -> dict[str, str] | None:
        for step in reversed(self.steps()):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return dict(self._load_manifest(step)["arrays"])
        return None

    def _manifest(self, step: int) -> pathlib.Path:
        return self._manifests / f"{step}.json"

    def _load_manifest(self, step: int) -> dict[str, Any]:
        return json.loads(self._manifest(step).read_text("utf-8"))

    def _describe(self, step: int, leaves: dict[str, Any]) -> dict[str, Any]:
        return {"files": _files(self.directory / str(step)), "arrays": _shapes(leaves)}

    def _write_manifest(self, step: int, content: dict[str, Any]) -> None:
        temporary = self._manifest(step).with_suffix(".partial")
        temporary.write_text(json.dumps(content, indent=1), "utf-8")
        temporary.replace(self._manifest(step))


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by path, such as "params/kernel", readable without the state's classes."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def field_of(name: str) -> str:
    """The outermost part of a leaf's name."""
    return name.split("/")[0]


def _shapes(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _misfit(path: pathlib.Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} is whole but does not fit this configuration (another model, "
        f"optimizer or variance chain?): {reason}"
    )


def _files(directory: pathlib.Path, digests: bool = True) -> dict[str, dict[str, Any]]:
    manifest = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        manifest[name] = {"size": path.stat().st_size}
        if digests:
            with path.open("rb") as file:
                manifest[name]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return manifest


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
        root = pathlib.Path(directory).absolute()
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
        """The newest intact state, or None if none was saved.

        CheckpointError if none of the checkpoints is intact, or the newest intact one does not fit.
        """
        steps = self.steps()
        restored = self._last.restore(abstract_state, ("position", "notes"))
        if restored is None and steps:
            raise CheckpointError(
                f"none of the checkpoints at steps {steps} in {self._last.directory} is whole; "
                f"{self._damaged}. Start again with another workdir."
            )
        return None if restored is None else Restored(**restored)

    def restore_last_fields(self, abstract_state: PyTree, fields: Sequence[str]) -> PyTree | None:
        """As :meth:`restore_last`, with None in all but ``fields``; the optimiser may differ.

        Everything is read; leaves that do not fit are on every device until this returns.
        """
        leaves = named_leaves(abstract_state)
        restored = self.restore_last(self._last.as_saved(leaves, fields))
        if restored is None:
            return None
        kept = (restored.state[name] if field_of(name) in fields else None for name in leaves)
        return jax.tree.unflatten(jax.tree.structure(abstract_state), kept)

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
