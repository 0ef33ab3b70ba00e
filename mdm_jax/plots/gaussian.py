"""Plots of Gaussian recipes laid over each other. Functions draw on axes, as in ``plots.py``."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mdm_jax.gaussian.recipes import Recipe, summarise

LEVELS = np.linspace(-15.0, 15.0, 601)
"""logSNR of the curves."""


def level_densities(axes: Any, recipes: Mapping[str, Recipe]) -> Any:
    """p, what each recipe draws its levels from."""
    for number, (name, recipe) in enumerate(recipes.items()):
        density = summarise(recipe, LEVELS).density
        axes.plot(LEVELS, density, color=f"C{number % 10}", label=name)
    axes.set(xlabel="logSNR", ylabel="density p of the drawn levels")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    return axes


def effective_weights(axes: Any, recipes: Mapping[str, Recipe], at: float = 0.0) -> Any:
    """W of each recipe, relative to its value at one level, on a logarithmic axis.

    Solid where the recipe draws levels, dotted where it does not: there its weight is zero,
    whatever the weighting says.

    Args:
        axes: matplotlib axes.
        recipes: by name.
        at: logSNR at which all curves are 1.
    """
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
    """A new figure: the densities of the recipes on the left, their effective weights on the right.

    Args:
        recipes: by name; their parameters must be known numbers.
        size: inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    level_densities(left, recipes)
    effective_weights(right, recipes)
    return figure
