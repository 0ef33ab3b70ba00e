"""Plots of training runs, likelihoods, schedules and samples."""

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def new_figure(size: tuple[float, float]) -> Any:
    """An empty matplotlib figure of ``size`` inches, for files: it needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(draw: Callable[[Any], Any], path: str | os.PathLike, size: tuple[float, float]) -> None:
    """Write ``draw(axes)`` as a PNG of ``size`` inches; directories are made as needed."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure = new_figure(size)
    draw(figure.add_subplot())
    figure.savefig(path, dpi=120)


def training_curve(
    axes: Any,
    records: Sequence[Mapping[str, Any]],
    unit: str,
    references: Mapping[str, float] | None = None,
) -> Any:
    """Training and evaluation loss over steps, bits per ``unit``.

    Args:
        axes: matplotlib axes.
        records: the rows of a ``metrics.jsonl`` (``training.read_metrics``); with the monitor
            "levels" the training loss without the noise of its levels is drawn too.
        unit: what bits are counted per.
        references: horizontal lines to compare with, by name.
    """
    training = [r for r in records if r["kind"] == "train"]
    train = [(r["step"], r["bits_per_unit"]) for r in training]
    # Converts the monitor's nats per token: both units are in the training record of its step.
    units = {r["step"]: r["bits_per_unit"] / r["loss"] for r in training if r["loss"]}
    normalised = [
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
    if normalised:
        style = {"color": "C0", "linewidth": 1, "alpha": 0.6, "label": "normalised by level"}
        axes.plot(*zip(*normalised), **style)
    if evaluated:
        steps, bits, errors = zip(*evaluated)
        style = {"color": "C0", "marker": "o", "markersize": 3, "label": "validation bound"}
        axes.errorbar(steps, bits, yerr=errors, **style)
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
    """logSNR over time, 0 = clean to 1 = noise, of named schedules (``schedules.TwoSidedLaw``)."""
    for name, (time, logsnr) in _curves(laws, points):
        axes.plot(time, logsnr, label=name)
    axes.set(xlabel="time, the quantile of the noise", ylabel="logSNR", xlim=(0, 1))
    axes.legend(fontsize="small")
    return axes


def noise_curves(axes: Any, laws: Mapping[str, Any], points: int = 401) -> Any:
    """Noise over signal, ``sigma / alpha = exp(-logSNR / 2)``, over time of named schedules."""
    for name, (time, logsnr) in _curves(laws, points):
        axes.plot(time, np.exp(-logsnr / 2), label=name)
    axes.set(xlabel="time, the quantile of the noise", ylabel="sigma / alpha", xlim=(0, 1))
    axes.set(yscale="log")
    axes.legend(fontsize="small")
    return axes


def law_densities(axes: Any, laws: Mapping[str, Any], low: float = -15, high: float = 15) -> Any:
    """Densities over the logSNR of named schedules."""
    logsnr = np.linspace(low, high, 601)
    for name, law in laws.items():
        axes.plot(logsnr, np.exp(np.asarray(law.log_pdf(logsnr))), label=name)
    axes.set(xlabel="logSNR", ylabel="density", xlim=(low, high))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return axes


def trajectories(axes: Any, levels: np.ndarray, states: np.ndarray, **style: Any) -> Any:
    """Sampling paths: states [N + 1, paths] over logSNR levels [N + 1]; ``style`` of ``axes.plot``.

    A last level of +inf is drawn one step on. Raises ValueError if the lengths differ.
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
    """Pictures [N, H, W] or [N, H, W, C] in [0, 1] tiled into one near-square picture."""
    count, height, width = pictures.shape[:3]
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    shape = (rows * columns, height + 1, width + 1, *pictures.shape[3:])
    tiles = np.full(shape, 0.5, np.float32)
    tiles[:count, :height, :width] = pictures
    tiles = tiles.reshape(rows, columns, *shape[1:]).swapaxes(1, 2)
    return tiles.reshape(rows * shape[1], columns * shape[2], *shape[3:])


def picture(axes: Any, image: np.ndarray) -> Any:
    """One picture in [0, 1] without ticks."""
    axes.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_axis_off()
    return axes


def _curves(laws: Mapping[str, Any], points: int):
    time = (np.arange(points) + 0.5) / points
    for name, law in laws.items():
        yield name, (time, np.asarray(law.icdf(1 - time)))
