"""Plots of runs and of likelihoods. Each function draws on axes and returns them.

Callers own the figure: ``save`` writes one to a file with a backend that needs no display.
"""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def save(draw: Callable[[Any], Any], path: str | os.PathLike, size: tuple[float, float]) -> None:
    """Draws on new axes and writes a PNG of ``size`` inches; directories are made as needed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    figure.savefig(path, dpi=120)


def training_curve(
    axes: Any,
    records: Sequence[Mapping[str, Any]],
    unit: str,
    references: Mapping[str, float] | None = None,
) -> Any:
    """Training and evaluation loss over steps, bits per ``unit``.

    With the monitor "levels", the training loss without the noise of its levels is drawn too.

    Args:
        axes: matplotlib axes.
        records: the rows of a ``metrics.jsonl`` (``training.read_metrics``).
        unit: what bits are counted per.
        references: horizontal lines to compare with, by name.
    """
    train = [(r["step"], r["bits_per_unit"]) for r in records if r["kind"] == "train"]
    # Nats per token as bits per unit: both are in every training record of the same step.
    units = {
        r["step"]: r["bits_per_unit"] / r["loss"]
        for r in records
        if r["kind"] == "train" and r["loss"]
    }
    steady = [
        (r["step"], r["normalised_loss"] * units[r["step"]])
        for r in records
        if r["kind"] == "monitor" and "normalised_loss" in r and r["step"] in units
    ]
    evaluated = [
        (r["step"], r["bits_per_unit"], r.get("standard_error", 0.0))
        for r in records
        if r["kind"] == "evaluate"
    ]
    if train:
        axes.plot(*zip(*train), color="0.7", linewidth=1, label="training objective")
    if steady:
        axes.plot(*zip(*steady), color="C0", linewidth=1, alpha=0.6, label="normalised by level")
    if evaluated:
        steps, bits, errors = zip(*evaluated)
        axes.errorbar(
            steps, bits, yerr=errors, color="C0", marker="o", markersize=3, label="validation bound"
        )
    for number, (name, value) in enumerate((references or {}).items()):
        axes.axhline(value, color=f"C{number + 1}", linestyle="--", linewidth=1, label=name)
    axes.set(xlabel="step", ylabel=f"bits per {unit}")
    axes.legend()
    return axes


def level_curve(axes: Any, edges: np.ndarray, nats: np.ndarray) -> Any:
    """Mean cross-entropy of a masked token by masking rate (``Likelihood.levels``)."""
    centres = (np.asarray(edges)[1:] + np.asarray(edges)[:-1]) / 2
    axes.plot(centres, np.asarray(nats) / np.log(2), marker="o", markersize=3)
    axes.set(xlabel="masking rate", ylabel="bits per masked token", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    return axes


def schedule_curves(axes: Any, laws: Mapping[str, Any], points: int = 401) -> Any:
    """logSNR over time of schedules, 0 = clean to 1 = noise; a law is its own schedule.

    Args:
        axes: matplotlib axes.
        laws: by name (``schedules.TwoSidedLaw``).
        points: of each curve.
    """
    for name, (time, logsnr) in _curves(laws, points):
        axes.plot(time, logsnr, label=name)
    axes.set(xlabel="time, the quantile of the noise", ylabel="logSNR", xlim=(0, 1))
    axes.legend(fontsize="small")
    return axes


def noise_curves(axes: Any, laws: Mapping[str, Any], points: int = 401) -> Any:
    """The same schedules as noise over signal, ``sigma / alpha = exp(-logSNR / 2)``, over time."""
    for name, (time, logsnr) in _curves(laws, points):
        axes.plot(time, np.exp(-logsnr / 2), label=name)
    axes.set(xlabel="time, the quantile of the noise", ylabel="sigma / alpha", xlim=(0, 1))
    axes.set(yscale="log")
    axes.legend(fontsize="small")
    return axes


def law_densities(axes: Any, laws: Mapping[str, Any], low: float = -15, high: float = 15) -> Any:
    """Densities over the logSNR: what a schedule spends training on."""
    logsnr = np.linspace(low, high, 601)
    for name, law in laws.items():
        axes.plot(logsnr, np.exp(np.asarray(law.log_pdf(logsnr))), label=name)
    axes.set(xlabel="logSNR", ylabel="density", xlim=(low, high))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return axes


def trajectories(axes: Any, levels: np.ndarray, states: np.ndarray, **style: Any) -> Any:
    """Paths of a sampler, one number each, over the logSNR from noise on the left to data.

    Args:
        axes: matplotlib axes.
        levels: [N + 1] logSNR of the grid; a last level of +inf is drawn one step on.
        states: [N + 1, paths] numbers at the levels.
        style: of ``axes.plot``.

    Raises:
        ValueError: if states and levels do not have the same length.
    """
    levels, states = np.array(levels, np.float64), np.asarray(states)
    if len(levels) != len(states):
        raise ValueError(f"{len(levels)} levels need as many states, got {len(states)}")
    if np.isinf(levels[-1]):
        levels[-1] = 2 * levels[-2] - levels[-3]
    axes.plot(levels, states, **({"color": "0.4", "linewidth": 0.7, "alpha": 0.6} | style))
    axes.set(xlabel="logSNR", ylabel="state")
    return axes


def picture_grid(pictures: np.ndarray) -> np.ndarray:
    """Tiles pictures [N, H, W] or [N, H, W, C] in [0, 1] into one, a near-square grid."""
    count, height, width = pictures.shape[:3]
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    shape = (rows * columns, height + 1, width + 1, *pictures.shape[3:])
    tiles = np.full(shape, 0.5, np.float32)
    tiles[:count, :height, :width] = pictures
    tiles = tiles.reshape(rows, columns, *shape[1:]).swapaxes(1, 2)
    return tiles.reshape(rows * shape[1], columns * shape[2], *shape[3:])


def picture(axes: Any, image: np.ndarray) -> Any:
    """Shows one picture in [0, 1] without ticks."""
    axes.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_axis_off()
    return axes


def _curves(laws: Mapping[str, Any], points: int):
    time = (np.arange(points) + 0.5) / points
    for name, law in laws.items():
        yield name, (time, np.asarray(law.icdf(1 - time)))
