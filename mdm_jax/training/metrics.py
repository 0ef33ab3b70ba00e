"""Metrics of a run: records as JSON lines, shown on boards too.

A record is ``{"step": int, "kind": str, name: number, ...}``. One unit: losses (``loss``,
``cross_entropy``, ``normalised_loss``, ``gain``, ``level_nats_per_token``, ...) and their errors
are nats per token, or per dimension of pictures. The one exception is named: ``bits_per_unit`` and
``bits_per_unit_standard_error`` are bits per unit of the data, a character or a dimension. A list
holds values in equal ranges of the noise level, null where unknown.
"""

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax import files
from mdm_jax.training.boards import Board, TensorBoard

UPLOAD_SECONDS = 60
"""In a bucket the files of metrics are written whole: at checkpoints, and at most this often."""


class MetricWriter:
    """Writes metrics of a run to ``metrics.jsonl`` and ``tensorboard/`` below a directory, and to
    further ``boards``, which it closes.

    On resuming at ``resume_step`` records of later steps, and of this step for kinds in ``again``,
    are dropped: they are computed again, to the same numbers. A new run (0) keeps those of an older
    one as ``metrics.1.jsonl`` etc. ValueError, naming file and line, if a line other than the last
    is not a record. In a bucket, where nothing can be appended, both are collected in a temporary
    directory and written by :meth:`flush`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        resume_step: int = 0,
        again: Collection[str] = (),
        boards: Sequence[Board] = (),
    ):
        root = files.as_path(directory)
        root.mkdir(parents=True, exist_ok=True)
        self.path = root / "metrics.jsonl"
        self.tensorboard_directory = root / "tensorboard"
        resumed = self.path.exists()
        if resumed:
            kept = _kept_lines(self.path, resume_step, again)
            if resume_step == 0 and files.size(self.path) > len(kept):
                self.path.rename(files.beside(self.path))
            files.write(self.path, kept)
        self._local = files.Path(tempfile.mkdtemp()) if files.is_remote(root) else None
        self._uploaded = time.monotonic()
        if self._local and resumed:
            files.write(self._local / self.path.name, kept)
        self._file = ((self._local or root) / self.path.name).open("a", encoding="utf-8")
        self._tensorboard = TensorBoard(
            files.absolute(self._local or root) / "tensorboard",
            purge_step=resume_step + 1 if resumed else None,
        )
        self._boards = (self._tensorboard, *boards)

    def record(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Write one record: ``{"step": step, "kind": kind, **values}``, of numbers and lists."""
        plain = {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **plain}) + "\n")
        self._file.flush()
        self.show(step, kind, values)
        if self._local and time.monotonic() > self._uploaded + UPLOAD_SECONDS:
            self.flush()

    def show(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Show a record on the boards alone; lists are profiles over the noise level."""
        values = {f"{kind}/{name}": np.asarray(value) for name, value in values.items()}
        numbers = {name: float(value) for name, value in values.items() if value.ndim == 0}
        for board in self._boards:
            board.numbers(step, numbers)
            for name in values.keys() - numbers.keys():
                board.profile(step, name, values[name])

    def flush(self) -> None:
        """Write to the bucket what was collected for it; on a disk everything is written."""
        if self._local is None:
            return
        self._tensorboard.flush()
        files.write(self.path, (self._local / self.path.name).read_bytes())
        for source in (self._local / "tensorboard").iterdir():
            files.write(self.tensorboard_directory / source.name, source.read_bytes())
        self._uploaded = time.monotonic()

    def text(self, step: int, name: str, text: str) -> None:
        for board in self._boards:
            board.text(step, name, text)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Show a picture in [0, 1]: [height, width] or [height, width, 3]."""
        for board in self._boards:
            board.image(step, name, image)

    def close(self) -> None:
        self._file.close()
        for board in self._boards:
            board.close()
        if self._local:
            self.flush()
            shutil.rmtree(self._local)


class SilentWriter(MetricWriter):
    """A :class:`MetricWriter` that writes nothing, for all processes but process 0."""

    def __init__(self):
        pass

    def _ignore(self, *_args, **_options) -> None:
        """Nothing."""

    record = show = text = image = flush = close = _ignore


def read_metrics(path: str | os.PathLike, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, of one kind if given; ValueError for a malformed line."""
    records = [_checked(origin, record) for origin, record in files.read_records(path)]
    return [record for record in records if kind in (None, record["kind"])]


def _plain(value: Any) -> float | list[float | None]:
    """As JSON: a number, or a list with None where there is none."""
    value = np.asarray(value, np.float64)
    if value.ndim == 0:
        return float(value)
    return [one if math.isfinite(one) else None for one in value.tolist()]


def _checked(origin: str, record: Any) -> dict[str, Any]:
    types = {name: type(value) for name, value in record.items()} if type(record) is dict else {}
    good = (types.pop("step", None), types.pop("kind", None)) == (int, str)
    lists = [record[name] for name, kind in types.items() if kind is list]
    inner = {type(one) for values in lists for one in values}
    if not good or not {*types.values()} <= {int, float, list} or not inner <= _IN_LISTS:
        shown = json.dumps(record)[:80]
        raise ValueError(f"{origin}: not a record with step, kind and numbers: {shown}")
    return record


_IN_LISTS = {int, float, type(None)}


def _kept_lines(path: files.Path, last_step: int, again: Collection[str]) -> str:
    kept = []
    for origin, record in files.read_records(path, cut_off=True):
        record = _checked(origin, record)
        repeated = record["step"] == last_step and record["kind"] in again
        if record["step"] <= last_step and not repeated:
            kept.append(json.dumps(record) + "\n")
    return "".join(kept)
