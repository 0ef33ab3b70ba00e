"""Metrics: JSON lines, TensorBoard, and the terminal."""

import json
import os
import pathlib
import sys
from collections.abc import Collection
from typing import Any, TextIO

import numpy as np


class MetricWriter:
    """Writes metrics of a run to ``metrics.jsonl`` and ``tensorboard/`` below a directory.

    On resuming at ``resume_step`` (0 for a new run), records of later steps, and of this step for
    kinds in ``again``, are dropped: they are computed again, to the same numbers. ValueError,
    naming file and line, if a line other than the last is not a record.
    """

    def __init__(
        self, directory: str | os.PathLike, resume_step: int = 0, again: Collection[str] = ()
    ):
        # Here, so that a training step can be imported without packages that only display it.
        import tensorboardX

        root = pathlib.Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        self.path = root / "metrics.jsonl"
        self.tensorboard_directory = root / "tensorboard"
        resumed = self.path.exists()
        if resumed:
            _truncate(self.path, resume_step, again)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(
            str(self.tensorboard_directory), purge_step=resume_step + 1 if resumed else None
        )

    def scalars(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Write one record: ``{"step": step, "kind": kind, **values}``."""
        numbers = {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **numbers}) + "\n")
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._board.add_text(name, text, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a picture for TensorBoard: [height, width] or [height, width, 3], in [0, 1]."""
        self._board.add_image(name, image, step, dataformats="HW" if image.ndim == 2 else "HWC")

    def close(self) -> None:
        self._file.close()
        self._board.close()


class SilentWriter(MetricWriter):
    """A :class:`MetricWriter` that writes nothing, for all processes but process 0."""

    def __init__(self):
        pass

    def _ignore(self, *_args, **_options) -> None:
        """Nothing."""

    scalars = text = image = close = _ignore


def read_metrics(path: str | os.PathLike, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, of one kind if given; ValueError for a malformed line."""
    lines = pathlib.Path(path).read_text("utf-8").splitlines()
    records = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
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


def _parse(line: str, origin: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        record["step"], record["kind"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{origin}: not a record with step and kind: {line[:80]!r}") from error
    return record


def _truncate(path: pathlib.Path, last_step: int, again: Collection[str]) -> None:
    lines = path.read_text("utf-8").splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            record = _parse(line, f"{path}:{number}")
        except ValueError:
            if number == len(lines):
                break  # cut off by a kill
            raise
        repeated = record["step"] == last_step and record["kind"] in again
        if record["step"] <= last_step and not repeated:
            kept.append(line + "\n")
    temporary = path.with_suffix(".partial")
    temporary.write_text("".join(kept), "utf-8")
    temporary.replace(path)
