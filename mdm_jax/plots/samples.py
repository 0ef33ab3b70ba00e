"""Plots of samples: pictures, and the quality of texts by steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax.plots.style import dress, line, new_figure

PANELS = (
    ("generative_perplexity", "generative perplexity"),
    ("token_entropy", "token entropy (nats)"),
)
"""Keys of ``TextQuality.to_dict`` that :func:`quality_by_steps` draws, and their labels."""

_X = {"num_steps": "steps", "forward_passes": "forward passes per text"}


def quality_curve(
    axes: Any,
    records: Sequence[Mapping[str, Any]],
    metric: str,
    label: str | None = None,
    *,
    against: str = "num_steps",
    reference: float | None = None,
    by: str = "sampler",
) -> Any:
    """One metric of each sampler against its number of steps, on a base-2 logarithmic axis.

    ``records`` are ``{"sampler": name, "num_steps": int, "forward_passes": float, "quality":
    dict}``, the dict that of ``TextQuality.to_dict``, with error bars from
    ``<metric>_standard_error``; those without the metric are left out. ``against`` is "num_steps"
    or "forward_passes", positive, else ValueError. ``reference`` is the metric of held-out data.
    ``by``: the key that tells curves apart, in place of "sampler".
    """
    if against not in _X:
        raise ValueError(f"against must be one of {', '.join(_X)}, got {against!r}")
    for number, sampler in enumerate(dict.fromkeys(r[by] for r in records)):
        points = sorted(
            (r[against], r["quality"][metric], r["quality"].get(f"{metric}_standard_error") or 0.0)
            for r in records
            if r[by] == sampler and r["quality"].get(metric) is not None
        )
        if points:
            x, y, error = zip(*points)
            if x[0] <= 0:
                raise ValueError(f"{sampler}: {against} must be positive, got {x[0]}")
            style = line(number) | {"marker": "o", "ms": 3, "capsize": 2}
            axes.errorbar(x, y, yerr=error, label=sampler, **style)
    if reference is not None:
        axes.axhline(reference, color="0.25", linestyle=":", linewidth=1, label="data")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    label = label or metric
    return dress(axes, f"{label} by {by}".capitalize(), _X[against], label)


def quality_by_steps(
    records: Sequence[Mapping[str, Any]],
    *,
    against: str = "num_steps",
    references: Mapping[str, float] | None = None,
    size: tuple[float, float] = (10, 4.6),
) -> Any:
    """Figure of perplexity and entropy by sampler; ``references``: a ``TextQuality.to_dict()``."""
    figure = new_figure(size)
    for axes, (name, label) in zip(figure.subplots(1, len(PANELS)), PANELS):
        reference = (references or {}).get(name)
        quality_curve(axes, records, name, label, against=against, reference=reference)
    return figure


def picture_grid(pictures: np.ndarray) -> np.ndarray:
    """Pictures [N, H, W] or [N, H, W, C] in [0, 1] tiled into one near-square picture."""
    count, height, width = pictures.shape[:3]
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    shape = (rows * columns, height + 1, width + 1, *pictures.shape[3:])
    tiles = np.full(shape, 0.5, np.float32)
    tiles[:count, :height, :width] = pictures
    tiles = tiles.reshape(rows, columns, *shape[1:]).swapaxes(1, 2)
    return tiles.reshape(rows * shape[1], columns * shape[2], *shape[3:])


def picture_paths(rows: Mapping[str, np.ndarray]) -> Any:
    """Figure of one picture after each step, [steps, H, W] or [steps, H, W, C], in named rows."""
    count, height, width = next(iter(rows.values())).shape[:3]
    size = (1.6 + 0.7 * count, 0.75 * len(rows) * height / width)
    figure = new_figure(size)
    for axes, (name, frames) in zip(np.atleast_1d(figure.subplots(len(rows), 1)), rows.items()):
        frames = np.pad(frames, [(0, 0), (0, 1), (0, 1)] + [(0, 0)] * (frames.ndim - 3), "edge")
        frames[:, -1], frames[:, :, -1] = 0.5, 0.5
        picture(axes, np.concatenate(list(frames), axis=1))
        axes.set_title(name, loc="left", fontsize=8, pad=2)
    return figure


def picture(axes: Any, image: np.ndarray) -> Any:
    """One picture in [0, 1] without ticks."""
    axes.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_axis_off()
    return axes
