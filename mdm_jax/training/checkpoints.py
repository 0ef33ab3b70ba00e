"""Checkpoints that are intact or refused: Orbax arrays under a SHA-256 manifest.

A layer over Orbax's CheckpointManager that falls back past a damaged checkpoint, naming it::

    last/<step>/             the latest full states (TrainState, data position, notes)
    best/<step>/             the averaged parameters with the lowest evaluation loss so far
    manifests/{last,best}/   of each: sizes and SHA-256 of files, shapes of arrays, amended records,
                             and its own SHA-256; a checkpoint without one is unfinished or damaged
    damaged-last-<step>-<n>/ checkpoints that failed their check, set aside, never deleted
    unsaved                  there until the first state is saved: its run may start over

Saving holds the caller up for copies on the host alone. In the background each process writes its
shards and hashes its own files, then process 0 writes the manifest: a kill at any moment leaves the
old or the new state.
"""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from mdm_jax import distributed, files
from mdm_jax.training.store import (
    Background,
    CheckpointError,
    Store,
    named_leaves,
    shapes_of,
)
from mdm_jax.types import PyTree

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

    def _open(
        self,
        directory: str | os.PathLike,
        keep: tuple[int | None, int | None] = (None, None),
        background: Background | None = None,
    ) -> None:
        self.directory = root = files.absolute(directory)
        self._last = Store(root, "last", "state", keep[0], background)
        self._best = Store(root, "best", "ema", keep[1], background)
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
        return distributed.from_first((self.directory / UNSAVED).exists())

    def _lost(self) -> str | None:
        """What shows that states were saved here."""
        if self.unsaved or not self.directory.exists():
            return None
        aside = sorted(
            p.name for p in self.directory.iterdir() if p.name.startswith("damaged-last-")
        )
        return f"{', '.join(aside)} in {self.directory}" if aside else None

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
        wanted, found = shapes_of(named_leaves(tree)), shapes_of(restored.state)
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

    Each process writes and describes its own shards, process 0 the manifests, one checkpoint after
    the other, in the background. The directory is created if missing and unfinished saves are
    removed. ``keep_last`` >= 1 full states are kept. Errors of the background are raised by what is
    called next.

    ``waited``: seconds that callers were held up by saving so far.
    """

    _damaged = "they were set aside beside it as damaged-*"

    def __init__(self, directory: str | os.PathLike, keep_last: int = 2):
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        self.waited, self._background = 0.0, Background()
        self._open(directory, (keep_last, 1), self._background)

    def begin(self) -> None:
        """Note that a run starts here from its first step and has saved nothing yet."""
        if distributed.is_first():
            files.write(self.directory / UNSAVED, "nothing was saved yet\n")

    def save(
        self, step: int, state: PyTree, position: dict[str, Any], notes: dict[str, Any]
    ) -> None:
        """Begin to write a full state unless it exists; CheckpointError if only later steps exist.

        ``state`` may be donated afterwards.
        """
        records = {"position": position, "notes": notes}
        with self._timed():
            begun = self._last.save(step, state, records, then=self._saved)
        if not begun and step not in self.steps():
            raise CheckpointError(
                f"step {step} cannot be saved in {self._last.directory}, which holds the later "
                f"steps {self.steps()}; restore these or move them away first"
            )

    def _saved(self) -> None:
        (self.directory / UNSAVED).unlink(missing_ok=True)

    def amend_notes(self, step: int, notes: dict[str, Any]) -> None:
        """Replace the notes of a full state, once all that was saved before is on the disk."""
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
        with self._timed():
            if not self._best.save(step, ema, {"metrics": kept}, force=True):
                return False
        self._best_metrics = kept
        return True

    def check(self) -> None:
        """Raise the error of a save that failed in the background, if any; does not wait."""
        self._background.wait(unfinished=False)

    def wait(self) -> None:
        """Until all that was saved is on the disk."""
        with self._timed():
            self._background.wait()

    def close(self) -> None:
        """:meth:`wait`, and release the managers' threads."""
        try:
            self._background.close()
        finally:
            super().close()

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.waited += time.monotonic() - started


def abstract(tree: PyTree) -> PyTree:
    """Shapes, dtypes and shardings of a pytree of arrays, to restore into."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )
