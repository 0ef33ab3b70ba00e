"""Comparison plots of Gaussian recipes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mdm_jax.gaussian.recipes import Recipe, summarise
from mdm_jax.plots.runs import new_figure

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
    """Effective weight W of each recipe relative to that at logSNR ``at``, on a logarithmic axis.

    Dotted where the recipe draws no levels, so that the actual weight is zero.
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
    """A figure of ``size`` inches: densities of the recipes and their effective weights."""
    figure = new_figure(size)
    left, right = figure.subplots(1, 2)
    recipe_densities(left, recipes)
    effective_weights(right, recipes)
    return figure
