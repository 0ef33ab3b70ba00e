"""Checkpoints that are either whole or refused.

Layout below the directory given::

    last/<step>/        the latest full states (TrainState, data position, notes), for resuming
    best/<step>/        the averaged parameters with the lowest evaluation loss so far
    manifests/          size and SHA-256 of every file of each checkpoint in last/
    damaged-<step>-<n>/ checkpoints that failed their check, set aside, never deleted
"""

import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging

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

    Args:
        directory: created if missing.
        keep_last: how many full states to keep.
    """

    def __init__(self, directory: str | os.PathLike, keep_last: int = 2):
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        self._root = pathlib.Path(directory).absolute()
        self._manifests = self._root / "manifests"
        self._manifests.mkdir(parents=True, exist_ok=True)
        # Saving is synchronous: a kill then finds either the old or the new state, never neither,
        # and the manifest describes files that are all there.
        options = {"enable_async_checkpointing": False, "create": True}
        self._last = ocp.CheckpointManager(
            self._root / "last",
            options=ocp.CheckpointManagerOptions(max_to_keep=keep_last, **options),
        )
        self._best = ocp.CheckpointManager(
            self._root / "best", options=ocp.CheckpointManagerOptions(max_to_keep=1, **options)
        )

    def steps(self) -> list[int]:
        """Steps of the full states at hand, ascending."""
        return sorted(self._last.all_steps())

    def save(
        self, step: int, state: PyTree, position: dict[str, Any], notes: dict[str, Any]
    ) -> None:
        """Writes a full state; a step that is already there is left as it is."""
        if step in self._last.all_steps():
            return
        self._last.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_named_leaves(state)),
                position=ocp.args.JsonSave(position),
                notes=ocp.args.JsonSave(notes),
            ),
        )
        self._last.wait_until_finished()
        _write_json(self._manifests / f"{step}.json", _manifest(self._step_directory(step)))
        kept = {str(s) for s in self._last.all_steps()}
        for path in self._manifests.glob("*.json"):
            if path.stem not in kept:
                path.unlink()

    def save_best(self, step: int, ema: PyTree, metrics: dict[str, float]) -> bool:
        """Keeps ``ema`` if ``metrics["loss"]`` is the lowest so far; returns whether it was."""
        best = self.best_metrics()
        if best is not None and not metrics["loss"] < best["loss"]:
            return False
        if step in self._best.all_steps():
            return False
        self._best.save(
            step,
            args=ocp.args.Composite(
                ema=ocp.args.StandardSave(_named_leaves(ema)),
                metrics=ocp.args.JsonSave({"step": step, **metrics}),
            ),
        )
        self._best.wait_until_finished()
        return True

    def best_metrics(self) -> dict[str, float] | None:
        """Metrics of the best parameters, with their step; None if nothing was kept yet."""
        step = self._best.latest_step()
        if step is None:
            return None
        items = ocp.args.Composite(metrics=ocp.args.JsonRestore())
        return self._best.restore(step, args=items)["metrics"]

    def restore_best(self, abstract_ema: PyTree) -> PyTree:
        """The best averaged parameters.

        Raises:
            CheckpointError: if none were kept or they do not fit ``abstract_ema``.
        """
        step = self._best.latest_step()
        if step is None:
            raise CheckpointError(f"no best checkpoint below {self._root}: nothing evaluated yet")
        try:
            items = ocp.args.Composite(ema=ocp.args.StandardRestore(_named_leaves(abstract_ema)))
            leaves = self._best.restore(step, args=items)["ema"]
        except Exception as error:
            raise _misfit(self._root / "best" / str(step), error) from error
        return _fill(abstract_ema, leaves)

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
        for step in reversed(steps):
            problem = self._problem(step)
            if problem is None:
                try:
                    return self._restore(step, abstract_state)
                except Exception as error:
                    if (self._manifests / f"{step}.json").exists():
                        # Every byte is as written, so it is the configuration that differs.
                        raise _misfit(self._step_directory(step), error) from error
                    problem = f"cannot be read ({type(error).__name__})"
            self._set_aside(step, problem)
        if steps:
            raise CheckpointError(
                f"none of the checkpoints at steps {steps} below {self._root} is whole; they were "
                "set aside as damaged-*. Start again with another workdir."
            )
        return None

    def close(self) -> None:
        """Releases the managers' threads."""
        self._last.close()
        self._best.close()

    def _restore(self, step: int, abstract_state: PyTree) -> Restored:
        items = self._last.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_named_leaves(abstract_state)),
                position=ocp.args.JsonRestore(),
                notes=ocp.args.JsonRestore(),
            ),
        )
        return Restored(_fill(abstract_state, items["state"]), items["position"], items["notes"])

    def _problem(self, step: int) -> str | None:
        path = self._manifests / f"{step}.json"
        if not path.exists():
            return None  # killed between the save and its manifest: let reading it decide
        try:
            expected = json.loads(path.read_text("utf-8"))
        except ValueError:
            return f"its manifest {path} is not valid JSON"
        found = _manifest(self._step_directory(step))
        for name, entry in expected.items():
            if name not in found:
                return f"file {name} is missing"
            if found[name]["size"] != entry["size"]:
                return f"file {name} has {found[name]['size']} bytes instead of {entry['size']}"
            if found[name]["sha256"] != entry["sha256"]:
                return f"file {name} has changed since it was written"
        return None

    def _set_aside(self, step: int, problem: str) -> None:
        source, number = self._step_directory(step), 0
        while (target := self._root / f"damaged-{step}-{number}").exists():
            number += 1
        source.rename(target)
        (self._manifests / f"{step}.json").unlink(missing_ok=True)
        self._last.reload()
        logging.warning(
            "checkpoint %s: %s. Moved it to %s; trying the one before.", source, problem, target
        )

    def _step_directory(self, step: int) -> pathlib.Path:
        return self._root / "last" / str(step)


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a pytree of arrays, for restoring into."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    # Names instead of containers: files stay readable without the classes that made them.
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _fill(tree: PyTree, leaves: dict[str, Any]) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[k] for k in _named_leaves(tree)])


def _misfit(path: pathlib.Path, error: Exception) -> CheckpointError:
    reason = str(error).strip().splitlines()
    return CheckpointError(
        f"checkpoint {path} is whole but does not fit this configuration (another model, "
        f"optimizer or variance chain?): {reason[0] if reason else type(error).__name__}"
    )


def _manifest(directory: pathlib.Path) -> dict[str, dict[str, Any]]:
    manifest = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = path.relative_to(directory).as_posix()
        manifest[name] = {"size": path.stat().st_size, "sha256": digest}
    return manifest


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1), "utf-8")
    temporary.replace(path)
