"""Checkpoints that are either whole or refused.

Layout below the directory given::

    last/<step>/            the latest full states (TrainState, data position, notes), for resuming
    best/<step>/            the averaged parameters with the lowest evaluation loss so far
    manifests/last/, best/  for each of them, size and SHA-256 of its files and its arrays' shapes
    damaged-last-<step>-<n>/ what failed its check, set aside, never deleted
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

from mdm_jax import processes
from mdm_jax.typing import PyTree


class CheckpointError(RuntimeError):
    """No usable checkpoint, or one that does not fit the configuration."""


class Restored(NamedTuple):
    """What a checkpoint in ``last/`` holds.

    Attributes:
        state: TrainState, sharded as asked for.
        position: JSON state of the data iterator, right after the last batch trained on.
        notes: JSON notes, such as the data fingerprint and the metric window in progress.
    """

    state: PyTree
    position: dict[str, Any]
    notes: dict[str, Any]


class Checkpoints:
    """Saves, verifies and restores the states of one run.

    With several processes all of them call every method at the same point, on a directory that all
    of them see: each writes and reads the parts of the arrays that it holds, and the first one
    writes and checks the manifests. A checkpoint fits any number of processes and any mesh.

    Args:
        directory: created if missing.
        keep_last: how many full states to keep.

    Raises:
        ValueError: if ``keep_last`` is not positive.
    """

    def __init__(self, directory: str | os.PathLike, keep_last: int = 2):
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        root = pathlib.Path(directory).absolute()
        self._last = _Store(root, "last", "state", keep_last)
        self._best = _Store(root, "best", "ema", 1)
        self._best_metrics: dict[str, float] | None = None

    def steps(self) -> list[int]:
        """Steps of the full states at hand, ascending."""
        return self._last.steps()

    def save(
        self, step: int, state: PyTree, position: dict[str, Any], notes: dict[str, Any]
    ) -> None:
        """Writes a full state; a step that is already there is left as it is."""
        self._last.save(step, state, {"position": position, "notes": notes})

    def save_best(self, step: int, ema: PyTree, metrics: dict[str, float]) -> bool:
        """Keeps ``ema`` if ``metrics["loss"]`` is the lowest so far; returns whether it was.

        A loss that is not finite is never the lowest.
        """
        best = self.best_metrics()
        if not math.isfinite(metrics["loss"]):
            return False
        if best is not None and metrics["loss"] >= best["loss"]:
            return False
        self._best_metrics = {"step": step, **metrics}
        return self._best.save(step, ema, {"metrics": self._best_metrics})

    def best_metrics(self) -> dict[str, float] | None:
        """Metrics of the best parameters, with their step; None if none are kept and whole."""
        if self._best_metrics is None:  # reading verifies every byte: once is enough
            found = self._best.restore(None, ("metrics",))
            self._best_metrics = None if found is None else found["metrics"]
        return self._best_metrics

    def restore_best(self, abstract_ema: PyTree) -> PyTree:
        """The best averaged parameters.

        Raises:
            CheckpointError: if none are kept and whole, or they do not fit ``abstract_ema``.
        """
        found = self._best.restore(abstract_ema, ())
        if found is None:
            raise CheckpointError(f"no whole checkpoint in {self._best.directory}")
        return found["ema"]

    def restore_last(self, abstract_state: PyTree) -> Restored | None:
        """The newest whole state, or None if the run has not saved any.

        A checkpoint whose files are truncated, missing or changed is named, set aside and replaced
        by the one before it.

        Args:
            abstract_state: pytree of jax.ShapeDtypeStruct with shardings.

        Raises:
            CheckpointError: if checkpoints exist but none is whole, or a whole one does not fit.
        """
        steps = self.steps()
        found = self._last.restore(abstract_state, ("position", "notes"))
        if found is not None:
            return Restored(**found)
        if steps:
            raise CheckpointError(
                f"none of the checkpoints at steps {steps} in {self._last.directory} is whole; "
                "they were set aside beside it as damaged-*. Start again with another workdir."
            )
        return None

    def restore_last_fields(self, abstract_state: PyTree, fields: Sequence[str]) -> PyTree | None:
        """The newest whole state, None in all but ``fields``; its optimiser may be another.

        Everything is read. What fits ``abstract_state`` is laid out as it says, what does not is
        whole on every device until this returns.

        Args:
            abstract_state: pytree of jax.ShapeDtypeStruct with shardings.
            fields: of the state, by name.

        Raises:
            CheckpointError: as :meth:`restore_last`, if these fields do not fit.
        """
        leaves = _named_leaves(abstract_state)
        found = self.restore_last(self._last.as_saved(leaves, fields))
        if found is None:
            return None
        kept = (found.state[name] if _field(name) in fields else None for name in leaves)
        return jax.tree.unflatten(jax.tree.structure(abstract_state), kept)

    def restore_step(self, step: int, abstract_state: PyTree) -> PyTree:
        """The full state of one of :meth:`steps`, whose files are not checked again.

        Raises:
            CheckpointError: if there is no such step, or it does not fit ``abstract_state``.
        """
        if step not in self.steps():
            raise CheckpointError(f"no checkpoint of step {step}, there are {self.steps()}")
        return self._last.read(step, abstract_state)

    def close(self) -> None:
        """Releases the managers' threads."""
        self._last.close()
        self._best.close()


class _Store:
    """Checkpoints of one kind: a pytree and JSON records each, with a manifest."""

    def __init__(self, root: pathlib.Path, name: str, item: str, keep: int):
        self.directory = root / name
        self._item = item
        self._manifests = root / "manifests" / name
        self._manifests.mkdir(parents=True, exist_ok=True)
        # Saving is synchronous: a kill then finds either the old or the new state, never neither,
        # and the manifest describes files that are all there.
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=False,
                create=True,
                cleanup_tmp_directories=True,
            ),
        )

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, tree: PyTree, records: dict[str, dict[str, Any]]) -> bool:
        """Returns False, having done nothing, if the step is already there."""
        if step in self.steps():
            return False
        if processes.is_first():
            self._manifest(step).unlink(missing_ok=True)
        leaves = _named_leaves(tree)
        items = {self._item: ocp.args.StandardSave(leaves)}
        items |= {name: ocp.args.JsonSave(record) for name, record in records.items()}
        self._manager.save(step, args=ocp.args.Composite(**items))
        self._manager.wait_until_finished()
        processes.barrier(f"saved {self.directory} {step}")
        if processes.is_first():
            self._write_manifest(step, leaves)
            kept = {str(s) for s in self.steps()}
            for path in self._manifests.glob("*.json"):
                if path.stem not in kept:
                    path.unlink()
        return True

    def restore(self, abstract_tree: PyTree | None, records: tuple[str, ...]) -> dict | None:
        """Tree (if asked for) and records of the newest whole checkpoint, by item name."""
        for step in reversed(self.steps()):
            problem = processes.from_first(self._problem(step) if processes.is_first() else None)
            if problem is None:
                try:
                    return self._read(step, abstract_tree, records)
                except CheckpointError:
                    raise
                except Exception as error:
                    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                    if self._manifest(step).exists():
                        # Every byte is as written, so it is the configuration that differs.
                        raise _misfit(self.directory / str(step), reason) from error
                    problem = f"it cannot be read ({reason})"
            self._set_aside(step, problem)
        return None

    def read(self, step: int, abstract_tree: PyTree) -> PyTree:
        return self._read(step, abstract_tree, ())[self._item]

    def as_saved(self, leaves: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
        """Leaves to ask for: of ``fields`` as given, of the others what the newest manifest has."""
        saved = self._saved_shapes()
        if saved is None:
            return leaves
        wanted = _shapes(leaves)
        sharding = next(iter(leaves.values())).sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        asked = {name: leaf for name, leaf in leaves.items() if _field(name) in fields}
        for name, form in saved.items():
            if _field(name) in fields:
                continue
            if wanted.get(name) == form:
                asked[name] = leaves[name]
            else:
                dtype, bracket, shape = form.partition("[")
                shape = json.loads(bracket + shape)
                asked[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        return asked

    def _saved_shapes(self) -> dict[str, str] | None:
        """Of the newest checkpoint whose manifest can be read, None if there is none."""
        for step in reversed(self.steps()):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return dict(json.loads(self._manifest(step).read_text("utf-8"))["arrays"])
        return None

    def close(self) -> None:
        self._manager.close()

    def _read(self, step: int, abstract_tree: PyTree | None, records: tuple[str, ...]) -> dict:
        items = {name: ocp.args.JsonRestore() for name in records}
        if abstract_tree is not None:
            leaves = _named_leaves(abstract_tree)
            self._check_fit(step, leaves)
            items[self._item] = ocp.args.StandardRestore(leaves)
        found = dict(self._manager.restore(step, args=ocp.args.Composite(**items)))
        if abstract_tree is not None:
            found[self._item] = jax.tree.unflatten(
                jax.tree.structure(abstract_tree), [found[self._item][name] for name in leaves]
            )
            missing = not self._manifest(step).exists()  # killed between the save and its manifest
            if missing and processes.is_first():
                self._write_manifest(step, leaves)
        return found

    def _check_fit(self, step: int, leaves: dict[str, Any]) -> None:
        path = self._manifest(step)
        if not path.exists():
            return
        saved, wanted = json.loads(path.read_text("utf-8"))["arrays"], _shapes(leaves)
        differing = [
            f"{name} is {saved.get(name, 'absent')}, wanted {wanted.get(name, 'absent')}"
            for name in sorted({*saved, *wanted})
            if saved.get(name) != wanted.get(name)
        ]
        if differing:
            more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise _misfit(self.directory / str(step), "; ".join(differing[:3]) + more)

    def _problem(self, step: int) -> str | None:
        path = self._manifest(step)
        if not path.exists():
            return None  # killed between the save and its manifest: let reading it decide
        try:
            expected = json.loads(path.read_text("utf-8"))["files"]
        except (ValueError, KeyError, TypeError):
            return f"its manifest {path} is damaged"
        found = _files(self.directory / str(step))
        for name, entry in expected.items():
            if name not in found:
                return f"file {name} is missing"
            if found[name]["size"] != entry["size"]:
                return f"file {name} has {found[name]['size']} bytes instead of {entry['size']}"
            if found[name]["sha256"] != entry["sha256"]:
                return f"file {name} has changed since it was written"
        return None

    def _set_aside(self, step: int, problem: str) -> None:
        source, number = self.directory / str(step), 0
        stem = f"damaged-{self.directory.name}-{step}"
        while (target := self.directory.parent / f"{stem}-{number}").exists():
            number += 1
        processes.barrier(f"setting aside {source} as {number}")
        if processes.is_first():
            source.rename(target)
            self._manifest(step).unlink(missing_ok=True)
        processes.barrier(f"set aside {source} as {number}")
        self._manager.reload()
        if not processes.is_first():
            return
        logging.warning(
            "checkpoint %s is damaged: %s. Moved it to %s; trying the one before, if any.",
            source,
            problem,
            target,
        )

    def _manifest(self, step: int) -> pathlib.Path:
        return self._manifests / f"{step}.json"

    def _write_manifest(self, step: int, leaves: dict[str, Any]) -> None:
        content = {"files": _files(self.directory / str(step)), "arrays": _shapes(leaves)}
        temporary = self._manifest(step).with_suffix(".partial")
        temporary.write_text(json.dumps(content, indent=1), "utf-8")
        temporary.replace(self._manifest(step))


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a pytree of arrays, for restoring into."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    # Names instead of containers: files stay readable without the classes that made them.
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _field(name: str) -> str:
    return name.split("/")[0]


def _shapes(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _misfit(path: pathlib.Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {path} is whole but does not fit this configuration (another model, "
        f"optimizer or variance chain?): {reason}"
    )


def _files(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    manifest = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(directory).as_posix()
        manifest[name] = {"size": path.stat().st_size, "sha256": digest}
    return manifest
