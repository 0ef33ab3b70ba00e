"""Checkpoints of a run, either intact or refused.

Layout below the directory::

    last/<step>/             the latest full states (TrainState, data position, notes)
    best/<step>/             the averaged parameters with the lowest evaluation loss so far
    manifests/{last,best}/   of each: sizes and SHA-256 of files, shapes of arrays, amended records
    damaged-last-<step>-<n>/ checkpoints that failed their check, set aside, never deleted
"""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from mdm_jax.training.checkpoint_store import CheckpointError, Store, field_of, named_leaves
from mdm_jax.types import PyTree


class Restored(NamedTuple):
    """Contents of a checkpoint in ``last/``.

    Attributes:
        state: TrainState.
        position: JSON state of the data iterator, right after the last batch trained on.
        notes: JSON notes, such as the data fingerprint and the metric window in progress.
    """

    state: PyTree
    position: dict[str, Any]
    notes: dict[str, Any]


class CheckpointReader:
    """Verifies and restores the states of one run, which may still be training; changes nothing.

    With several processes all of them call every method at the same point, on a directory that all
    share. A checkpoint fits any number of processes and any mesh. The directory may be missing.
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
        """Steps of the full states at hand, ascending."""
        return self._last.steps()

    def best_metrics(self) -> dict[str, float] | None:
        """Metrics of the best parameters, with their step; None if none are kept and intact."""
        if self._best_metrics is None:  # reading verifies every byte: once is enough
            self._best_metrics = (self._best.restore(None, ("metrics",)) or {}).get("metrics")
        return self._best_metrics

    def restore_best(self, abstract_ema: PyTree) -> PyTree:
        """The best averaged parameters.

        Raises:
            CheckpointError: if none are kept and intact, or they do not fit ``abstract_ema``.
        """
        restored = self._best.restore(abstract_ema, ("metrics",))
        if restored is None:
            raise CheckpointError(f"no whole checkpoint in {self._best.directory}")
        self._best_metrics = restored["metrics"]
        return restored["ema"]

    def restore_last(self, abstract_state: PyTree) -> Restored | None:
        """The newest intact state, or None if the run has not saved any.

        Args:
            abstract_state: pytree of jax.ShapeDtypeStruct with shardings.

        Raises:
            CheckpointError: if checkpoints exist but none is intact, or an intact one does not fit.
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
        """As :meth:`restore_last`, with None in all but ``fields``; its optimiser may be another.

        Everything is read; leaves that do not fit are on every device until this returns.
        """
        leaves = named_leaves(abstract_state)
        restored = self.restore_last(self._last.as_saved(leaves, fields))
        if restored is None:
            return None
        kept = (restored.state[name] if field_of(name) in fields else None for name in leaves)
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


class Checkpoints(CheckpointReader):
    """Saves states too, and sets damaged ones aside; for the one trainer of a directory.

    Each process writes the shards that it holds, process 0 the manifests.

    Args:
        directory: created if missing; what a save left unfinished is removed.
        keep_last: how many full states to keep, at least 1.
    """

    _damaged = "they were set aside beside it as damaged-*"

    def __init__(self, directory: str | os.PathLike, keep_last: int = 2):
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        self._open(directory, keep=(keep_last, 1))

    def save(
        self, step: int, state: PyTree, position: dict[str, Any], notes: dict[str, Any]
    ) -> None:
        """Writes a full state; a step that is already there is left as it is.

        Raises:
            CheckpointError: if only later steps are there, which a restore would prefer.
        """
        records = {"position": position, "notes": notes}
        if not self._last.save(step, state, records) and step not in self.steps():
            raise CheckpointError(
                f"step {step} cannot be saved in {self._last.directory}, which holds the later "
                f"steps {self.steps()}; restore these or move them away first"
            )

    def amend_notes(self, step: int, notes: dict[str, Any]) -> None:
        """Replaces the notes of a full state, at the cost of a small file."""
        self._last.amend(step, {"notes": notes})

    def save_best(self, step: int, ema: PyTree, metrics: dict[str, float]) -> bool:
        """Keeps ``ema`` if ``metrics["loss"]`` is finite and the lowest; returns whether it was."""
        best = self.best_metrics()
        if not math.isfinite(metrics["loss"]):
            return False
        if best is not None and metrics["loss"] >= best["loss"]:
            return False
        kept = {"step": step, **metrics}
        # A resumed run may be better at a step before the one that was best until now.
        if not self._best.save(step, ema, {"metrics": kept}, force=True):
            return False
        self._best_metrics = kept
        return True


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a pytree of arrays, for restoring into."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
