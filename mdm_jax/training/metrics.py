"""Metrics: JSON lines, TensorBoard, and the terminal."""

import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Collection
from typing import Any, TextIO

import numpy as np

from mdm_jax import files

UPLOAD_SECONDS = 60
"""In a bucket the files of metrics are written whole: at checkpoints, and at most this often."""


class MetricWriter:
    """Writes metrics of a run to ``metrics.jsonl`` and ``tensorboard/`` below a directory.

    On resuming at ``resume_step`` records of later steps, and of this step for kinds in ``again``,
    are dropped: they are computed again, to the same numbers. A new run (0) keeps those of an older
    one as ``metrics.1.jsonl`` etc. ValueError, naming file and line, if a line other than the last
    is not a record. In a bucket, where nothing can be appended, both are collected in a temporary
    directory and written by :meth:`flush`.
    """

    def __init__(
        self, directory: str | os.PathLike, resume_step: int = 0, again: Collection[str] = ()
    ):
        # Here, so that a training step can be imported without packages that only display it.
        import tensorboardX

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
        self._board = tensorboardX.SummaryWriter(
            str(files.absolute(self._local or root) / "tensorboard"),
            purge_step=resume_step + 1 if resumed else None,
            filename_suffix=f".{secrets.token_hex(4)}",  # else named by the second
        )

    def scalars(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Write one record: ``{"step": step, "kind": kind, **values}``."""
        numbers = {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **numbers}) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        if self._local and time.monotonic() > self._uploaded + UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write to the bucket what was collected for it; on a disk everything is written."""
        if self._local is None:
            return
        self._board.flush()
        files.write(self.path, (self._local / self.path.name).read_bytes())
        for source in (self._local / "tensorboard").iterdir():
            files.write(self.tensorboard_directory / source.name, source.read_bytes())
        self._uploaded = time.monotonic()

    def text(self, step: int, name: str, text: str) -> None:
        self._board.add_text(name, text, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a picture for TensorBoard: [height, width] or [height, width, 3], in [0, 1]."""
        self._board.add_image(name, image, step, dataformats="HW" if image.ndim == 2 else "HWC")

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self._local:
            self.flush()
            shutil.rmtree(self._local)


class SilentWriter(MetricWriter):
    """A :class:`MetricWriter` that writes nothing, for all processes but process 0."""

    def __init__(self):
        pass

    def _ignore(self, *_args, **_options) -> None:
        """Nothing."""

    scalars = text = image = flush = close = _ignore


def read_metrics(path: str | os.PathLike, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, of one kind if given; ValueError for a malformed line."""
    records = [_checked(origin, record) for origin, record in files.read_records(path)]
    return [record for record in records if kind in (None, record["kind"])]


class Progress:
    """A progress bar on a terminal (standard error by default), plain lines elsewhere."""

    def __init__(
        self, total: int, start: int = 0, stream: TextIO | None = None, silent: bool = False
    ):
        import tqdm  # as in MetricWriter

        self._stream = stream or sys.stderr
        self._total = total
        self._interval = tqdm.tqdm.format_interval
        self._silent = silent
        self._bar = (
            tqdm.tqdm(
                total=total,
                initial=start,
                file=self._stream,
                unit="step",
                dynamic_ncols=True,
                smoothing=0.1,
            )
            if self._stream.isatty() and not silent
            else None
        )

    def advance(self, step: int, values: dict[str, str], seconds_per_step: float) -> None:
        """Show that ``step`` steps are done."""
        if self._silent:
            return
        text = " ".join(f"{name} {value}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        left = self._interval((self._total - step) * seconds_per_step)
        print(f"step {step}/{self._total} {text} left {left}", file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif not self._silent:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _checked(origin: str, record: Any) -> dict[str, Any]:
    types = {name: type(value) for name, value in record.items()} if type(record) is dict else {}
    good = (types.pop("step", None), types.pop("kind", None)) == (int, str)
    if not good or not {*types.values()} <= {int, float}:
        shown = json.dumps(record)[:80]
        raise ValueError(f"{origin}: not a record with step, kind and numbers: {shown}")
    return record


def _kept_lines(path: files.Path, last_step: int, again: Collection[str]) -> str:
    kept = []
    for origin, record in files.read_records(path, cut_off=True):
        record = _checked(origin, record)
        repeated = record["step"] == last_step and record["kind"] in again
        if record["step"] <= last_step and not repeated:
            kept.append(json.dumps(record) + "\n")
    return "".join(kept)
