"""Plots of noise schedules, recipes, and sampling paths over the logSNR."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax.gaussian.recipes import Recipe, summarise
from mdm_jax.plots.style import dress, line, new_figure

LEVELS = np.linspace(-15.0, 15.0, 601)
"""logSNR of the curves."""
_TIME = "time, the quantile of the noise"


def schedule_curves(axes: Any, laws: Mapping[str, Any], points: int = 401) -> Any:
    """logSNR over time, 0 = clean to 1 = noise, of named schedules (``schedules.TwoSidedLaw``)."""
    for number, (name, (time, logsnr)) in enumerate(_curves(laws, points)):
        axes.plot(time, logsnr, label=name, **line(number))
    axes.set(xlim=(0, 1))
    return dress(axes, "Schedules", _TIME, "logSNR, nats")


def noise_curves(axes: Any, laws: Mapping[str, Any], points: int = 401) -> Any:
    """Noise over signal, ``sigma / alpha = exp(-logSNR / 2)``, over time of named schedules."""
    for number, (name, (time, logsnr)) in enumerate(_curves(laws, points)):
        axes.plot(time, np.exp(-logsnr / 2), label=name, **line(number))
    axes.set(xlim=(0, 1), yscale="log")
    return dress(axes, "Noise over signal", _TIME, "sigma / alpha")


def law_densities(axes: Any, laws: Mapping[str, Any], low: float = -15, high: float = 15) -> Any:
    """Densities over the logSNR of named schedules."""
    logsnr = np.linspace(low, high, 601)
    for number, (name, law) in enumerate(laws.items()):
        axes.plot(logsnr, np.exp(np.asarray(law.log_pdf(logsnr))), label=name, **line(number))
    axes.set(xlim=(low, high))
    axes.set_ylim(bottom=0)
    return dress(axes, "Densities of the noise levels", "logSNR, nats", "density, 1 / nat")


def _curves(laws: Mapping[str, Any], points: int):
    time = (np.arange(points) + 0.5) / points
    for name, law in laws.items():
        yield name, (time, np.asarray(law.icdf(1 - time)))


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
    return dress(axes, "Sampling paths", "logSNR, nats", "state")


def grid_panels(grids: Mapping[int, Mapping[str, np.ndarray]]) -> Any:
    """Figure of sampling grids, logSNR [N + 1] over the step; a panel for each number of steps."""
    figure = new_figure((3.2 * len(grids) + 0.6, 4.6))
    panels = np.atleast_1d(figure.subplots(1, len(grids), sharey=True))
    for number, (axes, (num_steps, named)) in enumerate(zip(panels, grids.items())):
        for row, (name, levels) in enumerate(named.items()):
            label = name if number == 0 else None
            axes.plot(np.arange(len(levels)), levels, label=label, **line(row))
        dress(axes, f"{num_steps} steps", "step", "logSNR, nats" if number == 0 else "")
    return figure


def tried_settings(
    names: Sequence[str], tried: Sequence[tuple[int, Sequence[float], Sequence[float]]]
) -> Any:
    """Figure of a search: distance over each of the settings ``names``, colours by length of runs.

    ``tried``: training steps, values (() for the start, a line), distances [R] of each run.
    """
    figure = new_figure((4.2 * len(names), 4.2))
    for index, axes in enumerate(np.atleast_1d(figure.subplots(1, len(names), sharey=True))):
        for number, steps in enumerate(sorted({each[0] for each in tried})):
            own = [(p, np.asarray(d)) for s, p, d in tried if s == steps]
            color = line(number)["color"]
            runs = [(p[index], d.mean(), d.std(ddof=1) / d.size**0.5) for p, d in own if p]
            x, y, error = np.array(runs).reshape(-1, 3).T
            style = {"fmt": "o", "markersize": 4, "color": color}
            axes.errorbar(x, y, yerr=error, label=f"{steps} training steps", **style)
            for start in (d.mean() for p, d in own if not p):
                axes.axhline(start, linestyle=":", color=color, label=f"start, {steps} steps")
        axes.set_yscale("log")
        dress(axes, "Distance of samples" if index == 0 else "", names[index], "")
    return figure


def weighting_panels(
    figure: Any,
    levels: np.ndarray,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    xlabel: str,
    tops: tuple[float, float],
    when: str = "",
) -> Any:
    """Two panels over ``levels`` [N]: densities of the levels drawn, and effective weightings.

    ``curves``: (density [N], weighting [N]) by name; the first is drawn grey and broad, behind the
    others. ``tops``: ends of the y axes, the same in all frames of a film. ``when`` goes into the
    title. Draws on an empty figure and returns it.
    """
    titles = (f"Levels that are drawn{when}", f"Effective weighting{when}")
    for side, axes in enumerate(figure.subplots(1, 2)):
        for number, (name, pair) in enumerate(curves.items()):
            style = line(number - 1) if number else {"color": "0.75", "linewidth": 5}
            axes.plot(levels, pair[side], label=None if side else name, **style)
        axes.set(xlim=(levels[0], levels[-1]), ylim=(0, tops[side]))
        dress(axes, titles[side], xlabel, "density", columns=3)
    return figure


def recipe_densities(axes: Any, recipes: Mapping[str, Recipe]) -> Any:
    """Density p from which each recipe draws its noise levels."""
    for number, (name, recipe) in enumerate(recipes.items()):
        density = summarise(recipe, LEVELS).density
        axes.plot(LEVELS, density, label=name, **line(number))
    axes.set_ylim(bottom=0)
    return dress(axes, "Levels that are drawn", "logSNR, nats", "density p, 1 / nat")


def effective_weights(axes: Any, recipes: Mapping[str, Recipe], at: float = 0.0) -> Any:
    """Effective weight W relative to that at logSNR ``at``; pale dots where no levels are drawn."""
    for number, (name, recipe) in enumerate(recipes.items()):
        summary = summarise(recipe, np.append(LEVELS, at))
        weight = summary.weight[:-1] / summary.weight[-1]
        drawn = summary.density[:-1] > 0
        style = line(number)
        axes.plot(LEVELS, np.where(drawn, weight, np.nan), label=name, **style)
        axes.plot(LEVELS, np.where(drawn, np.nan, weight), ":", color=style["color"], alpha=0.6)
    axes.set(yscale="log", ylim=(1e-4, 1e4))
    return dress(
        axes, "What is minimised", "logSNR, nats", f"effective weight W, 1 at logSNR {at:g}"
    )


def compare_recipes(recipes: Mapping[str, Recipe], size: tuple[float, float] = (11, 5)) -> Any:
    """Figure of the recipes' densities and effective weights; ``size`` in inches."""
    figure = new_figure(size)
    left, right = figure.subplots(1, 2)
    recipe_densities(left, recipes)
    effective_weights(right, recipes)
    return figure
