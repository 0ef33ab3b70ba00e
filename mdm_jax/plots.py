"""Plots: functions that take axes draw on them and return them; the others return a new figure."""

import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax import files
from mdm_jax.gaussian.recipes import Recipe, summarise
from mdm_jax.meter.decompose import Decomposition
from mdm_jax.meter.efficiency import Efficiency
from mdm_jax.meter.levels import LevelTable, Moments, optimal_density


def new_figure(size: tuple[float, float]) -> Any:
    """An empty matplotlib figure of ``size`` inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(draw: Callable[[Any], Any], path: str | os.PathLike, size: tuple[float, float]) -> None:
    """Write ``draw(axes)`` as a PNG of ``size`` inches, making directories."""
    figure = new_figure(size)
    draw(figure.add_subplot())
    write(figure, path)


def write(figure: Any, path: str | os.PathLike) -> None:
    """Write a figure as a PNG, making directories."""
    path, png = files.Path(path), io.BytesIO()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120, format="png")
    files.write(path, png.getvalue())


def svg(draw: Callable[[Any], Any], size: tuple[float, float]) -> str:
    """``draw(axes)`` as an SVG element for a page of HTML, of ``size`` inches.

    It refers to nothing outside, its texts are text in the page's font, its ground is transparent.
    """
    import matplotlib

    image = io.StringIO()
    options = {"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}
    options |= {"svg.hashsalt": draw.__qualname__, "font.family": "sans-serif", "font.size": 9}
    options |= {"axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False}
    with matplotlib.rc_context(options):
        figure = new_figure(size)
        draw(figure.add_subplot())
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    text = image.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    return re.sub(r'(width|height)="[\d.]+pt" ', "", text, count=2)


def training_curve(
    axes: Any,
    records: Sequence[Mapping[str, Any]],
    unit: str,
    references: Mapping[str, float] | None = None,
) -> Any:
    """Training and evaluation loss, bits per ``unit``, from ``training.read_metrics`` records.

    With the monitor "levels" the training loss without level noise is drawn too, with a band of two
    standard errors.
    """
    training = [r for r in records if r["kind"] == "train"]
    train = [(r["step"], r["bits_per_unit"]) for r in training]
    # Converts the monitor's nats per token: both units are in the training record of its step.
    units = {r["step"]: r["bits_per_unit"] / r["loss"] for r in training if r["loss"]}
    normalised = [
        (
            r["step"],
            r["normalised_loss"] * units[r["step"]],
            2 * r.get("normalised_loss_standard_error", 0.0) * units[r["step"]],
        )
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
        steps, bits, band = (np.array(column) for column in zip(*normalised))
        style = {"color": "C0", "linewidth": 1, "alpha": 0.6, "label": "normalised by level"}
        axes.plot(steps, bits, **style)
        axes.fill_between(steps, bits - band, bits + band, color="C0", alpha=0.2, linewidth=0)
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


def noise_shares(axes: Any, records: Sequence[Mapping[str, Any]]) -> Any:
    """A, B, C as shares of the gradient's variance, with standard errors, from records "panel"."""
    for number, (part, label) in enumerate(_PARTS):
        points = [
            (r["step"], r[f"share_{part}"], r.get(f"share_{part}_standard_error", math.nan))
            for r in records
            if f"share_{part}" in r
        ]
        steps, share, error = (100 * np.array(column) for column in zip(*points))
        steps, color = steps / 100, f"C{number}"
        axes.plot(steps, share, color=color, label=label)
        axes.fill_between(steps, share - error, share + error, color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="step", ylabel="share of the gradient's variance, %")
    axes.legend(loc="upper right", ncols=3, fontsize="small")
    return axes


def critical_batch(axes: Any, records: Sequence[Mapping[str, Any]], batch_size: int) -> Any:
    """The critical batch size and the run's own, rows, from records "panel".

    Bars reach over two standard errors, and without end where there is no upper one.
    """
    known = [r for r in records if "critical_batch_rows_low" in r]
    steps, low = (np.array([r[n] for r in known]) for n in ("step", "critical_batch_rows_low"))
    value, high = (
        np.array([r.get(f"critical_batch_rows{end}", math.nan) for r in known])
        for end in ("", "_high")
    )
    top = 3 * np.nanmax(np.concatenate([low, high, [batch_size]]))
    axes.vlines(steps, low, np.where(np.isfinite(high), high, top), color="C0", alpha=0.25)
    axes.plot(steps, value, "o", ms=3, color="C0", label="noise scale, ± 2 standard errors")
    style = {"color": "C1", "linestyle": "--", "linewidth": 1}
    axes.axhline(batch_size, label="batch size of this run", **style)
    axes.set(xlabel="step", ylabel="rows", yscale="log", ylim=(None, top))
    axes.legend(fontsize="small")
    return axes


def weights(axes: Any, records: Sequence[Mapping[str, Any]]) -> Any:
    """Effective sample size of the importance weights, share of the draws, from "panel"."""
    known = [r for r in records if "effective_sample_size" in r]
    size = [100 * r["effective_sample_size"] for r in known]
    axes.plot([r["step"] for r in known], size)
    axes.set(xlabel="step", ylabel="effective sample size, %", ylim=(0, 105))
    return axes


def speed(axes: Any, records: Sequence[Mapping[str, Any]]) -> Any:
    """Tokens per second, from records "speed"."""
    axes.plot([r["step"] for r in records], [r["tokens_per_second"] for r in records], lw=1)
    axes.set(xlabel="step", ylabel="tokens per second")
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

    A last level of +inf is drawn one step on. ValueError if the lengths differ.
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
) -> Any:
    """One metric of each sampler against its number of steps, on a base-2 logarithmic axis.

    ``records`` are ``{"sampler": name, "num_steps": int, "forward_passes": float, "quality":
    dict}``, the dict that of ``TextQuality.to_dict``, with error bars from
    ``<metric>_standard_error``; those without the metric are left out. ``against`` is "num_steps"
    or "forward_passes", positive, else ValueError. ``reference`` is the metric of held-out text.
    """
    if against not in _X:
        raise ValueError(f"against must be one of {', '.join(_X)}, got {against!r}")
    for number, sampler in enumerate(dict.fromkeys(r["sampler"] for r in records)):
        points = sorted(
            (r[against], r["quality"][metric], r["quality"].get(f"{metric}_standard_error") or 0.0)
            for r in records
            if r["sampler"] == sampler and r["quality"].get(metric) is not None
        )
        if points:
            x, y, error = zip(*points)
            if x[0] <= 0:
                raise ValueError(f"{sampler}: {against} must be positive, got {x[0]}")
            style = {"color": f"C{number % 10}", "marker": "o", "ms": 3, "capsize": 2}
            axes.errorbar(x, y, yerr=error, label=sampler, **style)
    if reference is not None:
        axes.axhline(reference, color="0.4", linestyle="--", linewidth=1, label="held-out text")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel=_X[against], ylabel=label or metric)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
    return axes


def quality_by_steps(
    records: Sequence[Mapping[str, Any]],
    *,
    against: str = "num_steps",
    references: Mapping[str, float] | None = None,
    size: tuple[float, float] = (10, 4),
) -> Any:
    """Figure of perplexity and entropy by sampler; ``references``: a ``TextQuality.to_dict()``."""
    figure = new_figure(size)
    for axes, (name, label) in zip(figure.subplots(1, len(PANELS)), PANELS):
        reference = (references or {}).get(name)
        quality_curve(axes, records, name, label, against=against, reference=reference)
    return figure


_PARTS = (("pattern", "A: pattern"), ("rate", "B: rate"), ("data", "C: data"))
RATE = "masking rate"
"""Label of the noise axis; ``sigmoid(-logSNR)`` is its name in general."""


def component_bars(axes: Any, results: Mapping[str, Decomposition], what: str) -> Any:
    """Stacked bars of A, B, C by method, with the total's standard error; negative ones as zero."""
    rows = np.arange(len(results))
    left = np.zeros(len(results))
    for number, (name, label) in enumerate(_PARTS):
        width = np.array([max(getattr(r, name).value, 0.0) for r in results.values()])
        axes.barh(rows, width, left=left, color=f"C{number}", label=label)
        left = left + width
    total = [r.total for r in results.values()]
    axes.errorbar(
        [t.value for t in total],
        rows,
        xerr=[t.standard_error for t in total],
        fmt="none",
        ecolor="black",
        capsize=2,
    )
    _name_rows(axes, results)
    axes.set(xlabel=f"variance of the {what} of one row, all its views")
    axes.legend()
    return axes


def efficiency_bars(axes: Any, results: Mapping[str, Efficiency]) -> Any:
    """Variance of the batch gradient times forward passes; no bar for unsettled estimates."""
    for row, result in enumerate(results.values()):
        if result.settled:
            value, error = result.variance_times_passes
            axes.barh(row, value, xerr=error, color=f"C{min(result.passes, 5) - 1}", capsize=2)
        else:
            axes.text(0.0, row, " not settled", va="center", color="0.4")
    _name_rows(axes, results)
    axes.set(xlabel="variance of the batch gradient × forward passes per row")
    axes.set_xlim(left=0)
    return axes


def level_moments(
    axes: Any, table: LevelTable, moments: Moments, what: str, level: str = RATE
) -> Any:
    """g, root of v and root of c by noise level, for ``table.loss`` or ``table.gradient``."""
    curves = (("mean_square", "g (mean)"), ("pattern", "√v (pattern)"), ("data", "√c (rows)"))
    for number, (name, label) in enumerate(curves):
        square = np.asarray(getattr(moments.value, name))
        error = np.asarray(getattr(moments.standard_error, name))
        low, middle, high = (np.sqrt(np.maximum(square + s * error, 0.0)) for s in (-1, 0, 1))
        axes.plot(table.masking_rates, middle, color=f"C{number}", marker="o", ms=3, label=label)
        axes.fill_between(table.masking_rates, low, high, color=f"C{number}", alpha=0.2)
    axes.set(xlabel=level, ylabel=f"{what} of one row", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend()
    return axes


def level_densities(
    axes: Any,
    table: LevelTable,
    moments: Moments,
    drawn: Mapping[str, tuple[np.ndarray, np.ndarray]],
    level: str = RATE,
) -> Any:
    """The optimal densities of the level and ``drawn``, (rates, density) of ``warp_density``."""
    value = moments.value
    targets = (
        ("p* (independent levels)", value.second, "-"),
        ("p* (stratified levels)", value.pattern + value.data, "--"),
    )
    for label, target, style in targets:
        if np.any(target > 0):
            density = optimal_density(table, target)
            axes.plot(table.masking_rates, density, style, color="black", label=label)
    for number, (name, (rates, density)) in enumerate(drawn.items()):
        axes.plot(rates, density, color=f"C{number % 10}", linewidth=1, label=name)
    # Logarithmic: methods differ at small rates.
    axes.set(xlabel=level, ylabel="density", xscale="log", yscale="log")
    axes.set(xlim=(table.masking_rates[0], 1.0), ylim=(0.1, 20.0))
    axes.legend(fontsize="x-small")
    return axes


def level_loss(axes: Any, table: LevelTable, level: str = RATE) -> Any:
    """Mean loss per eligible element over the noise level, nats, with standard errors."""
    scale = table.nats_per_token / np.where(table.loss.value.mean, table.loss.value.mean, 1.0)
    error = np.asarray(table.loss.standard_error.mean) * scale
    axes.errorbar(
        table.masking_rates, table.nats_per_token, yerr=error, marker="o", ms=3, capsize=2
    )
    axes.set(xlabel=level, ylabel="nats per element", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    return axes


def _name_rows(axes: Any, names: Sequence[str] | Mapping[str, Any]) -> None:
    axes.set_yticks(np.arange(len(names)), list(names), fontsize="small")
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top; methods without a bar keep their row


LEVELS = np.linspace(-15.0, 15.0, 601)
"""logSNR of the curves."""


def recipe_densities(axes: Any, recipes: Mapping[str, Recipe]) -> Any:
    """Density p from which each recipe draws its noise levels."""
    for number, (name, recipe) in enumerate(recipes.items()):
        density = summarise(recipe, LEVELS).density
        axes.plot(LEVELS, density, color=f"C{number % 10}", label=name)
    axes.set(xlabel="logSNR", ylabel="density p of the drawn levels")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return axes


def effective_weights(axes: Any, recipes: Mapping[str, Recipe], at: float = 0.0) -> Any:
    """Effective weight W relative to that at logSNR ``at``; dotted where no levels are drawn."""
    for number, (name, recipe) in enumerate(recipes.items()):
        summary = summarise(recipe, np.append(LEVELS, at))
        weight = summary.weight[:-1] / summary.weight[-1]
        drawn = summary.density[:-1] > 0
        color = f"C{number % 10}"
        axes.plot(LEVELS, np.where(drawn, weight, np.nan), color=color, label=name)
        axes.plot(LEVELS, np.where(drawn, np.nan, weight), ":", color=color)
    axes.set(xlabel="logSNR", ylabel=f"effective weight W, 1 at logSNR {at:g}", yscale="log")
    axes.set_ylim(1e-4, 1e4)
    axes.legend(fontsize="small")
    return axes


def compare_recipes(recipes: Mapping[str, Recipe], size: tuple[float, float] = (11, 4)) -> Any:
    """Figure of the recipes' densities and effective weights; ``size`` in inches."""
    figure = new_figure(size)
    left, right = figure.subplots(1, 2)
    recipe_densities(left, recipes)
    effective_weights(right, recipes)
    return figure
