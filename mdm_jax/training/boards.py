"""Displays of metrics beside ``metrics.jsonl``: TensorBoard, and Weights & Biases on request."""

import html
import importlib
import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mdm_jax import files

BARS = 30
"""Bars of a histogram, as many as TensorBoard draws: their heights are the values."""


class Board(Protocol):
    """Where metrics are shown while a run goes on; names are "kind/name"."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...

    def profile(self, step: int, name: str, values: Sequence[float]) -> None:
        """Values in equal ranges of the noise level, [0, 1], NaN where unknown."""

    def text(self, step: int, name: str, text: str) -> None: ...

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture in [0, 1], [height, width] or [height, width, 3]."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in a local directory; on resuming, steps from ``purge_step`` on are forgotten.

    A profile is a histogram over [0, 1] whose bars have the values as heights.
    """

    def __init__(self, directory: str | os.PathLike, purge_step: int | None = None):
        # Here, so that a training step can be imported without packages that only display it.
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(
            os.fspath(directory),
            purge_step=purge_step,
            filename_suffix=f".{secrets.token_hex(4)}",  # else named by the second
        )

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def profile(self, step: int, name: str, values: Sequence[float]) -> None:
        edges, heights = _histogram(values)
        middle = (edges[1:] + edges[:-1]) / 2
        self._writer.add_histogram_raw(
            name,
            min=0.0,
            max=1.0,
            num=heights.sum(),
            sum=heights @ middle,
            sum_squares=heights @ middle**2,
            bucket_limits=edges[1:].tolist(),
            bucket_counts=heights.tolist(),
            global_step=step,
        )

    def text(self, step: int, name: str, text: str) -> None:
        # TensorBoard reads Markdown: indented, texts are shown as they are.
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.split("\n")), step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._writer.add_image(name, image, step, dataformats="HW" if image.ndim == 2 else "HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; the package ``wandb`` is imported here alone.

    Its id is kept in ``directory/wandb.json``, so that a resumed run goes on with it; steps that
    come again are logged again. What else wandb reads (``WANDB_MODE=offline``, the API key) comes
    from its environment variables. ImportError, with the remedy, without the package.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        project: str,
        entity: str = "",
        config: Mapping[str, Any] | None = None,
    ):
        self._wandb = import_wandb()
        directory = files.as_path(directory)
        record = directory / "wandb.json"
        if not record.exists():
            files.write_json(record, {"id": secrets.token_hex(8), "project": project})
        self._run = self._wandb.init(
            project=project,
            entity=entity or None,
            id=files.read_json(record)["id"],
            resume="allow",
            name=directory.name,
            dir=None if files.is_remote(directory) else os.fspath(directory),
            config=dict(config or {}),
        )
        # Records of one step come at several times, and some late: by a number of their own.
        self._run.define_metric("*", step_metric="step")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def profile(self, step: int, name: str, values: Sequence[float]) -> None:
        edges, heights = _histogram(values)
        shown = self._wandb.Histogram(np_histogram=(heights, edges))
        self._run.log({"step": step, name: shown})

    def text(self, step: int, name: str, text: str) -> None:
        shown = self._wandb.Html(f"<pre>{html.escape(text)}</pre>")
        self._run.log({"step": step, name: shown})

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        shown = self._wandb.Image((np.clip(image, 0, 1) * 255).astype(np.uint8))
        self._run.log({"step": step, name: shown})

    def close(self) -> None:
        self._run.finish()


def import_wandb() -> Any:
    """The package ``wandb``; ImportError says how to get it."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ImportError(
            "wandb.project is set, and the package wandb cannot be imported "
            f"({error}): pip install wandb, or leave wandb.project empty"
        ) from error


def _histogram(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(edges [bars + 1] of [0, 1], heights [bars]); unknown values are bars of height 0."""
    heights = np.nan_to_num(np.asarray(values, np.float64), nan=0.0)
    heights = np.repeat(heights, BARS // len(heights) if BARS % len(heights) == 0 else 1)
    return np.linspace(0, 1, len(heights) + 1), heights
