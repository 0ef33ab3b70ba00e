"""Plots of the variance meter. Each function draws on axes and returns them, as in ``plots.py``."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax.meter.decompose import Decomposition
from mdm_jax.meter.efficiency import Efficiency
from mdm_jax.meter.levels import LevelTable, Moments, optimal_density

_PARTS = (("pattern", "A: pattern"), ("rate", "B: rate"), ("data", "C: data"))
RATE = "masking rate"
"""Label of the noise axis; ``sigmoid(-logSNR)`` is its name in general."""


def component_bars(axes: Any, results: Mapping[str, Decomposition], what: str) -> Any:
    """A, B and C of each method as stacked bars, with the total's standard error.

    ``what`` is "loss" or "gradient", for the label. Negative estimates are drawn as zero.
    """
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
    """Variance of the batch gradient times forward passes, with standard errors.

    Methods whose estimate has not settled are named and have no bar.
    """
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
    """g, root of v and root of c over the noise level, in the unit of the loss.

    ``moments`` is ``table.loss`` or ``table.gradient``; ``what`` names it and ``level`` the table's
    rates, for the labels.
    """
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
    """The optimal densities of the noise level and those that methods draw from.

    ``moments`` is ``table.loss`` or ``table.gradient``; ``drawn`` holds (rates, density) by method,
    as ``warp_density`` returns them; ``level`` names the table's rates, for the label.
    """
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
    # Logarithmic: what sets the methods apart happens at small rates.
    axes.set(xlabel=level, ylabel="density", xscale="log", yscale="log")
    axes.set(xlim=(table.masking_rates[0], 1.0), ylim=(0.1, 20.0))
    axes.legend(fontsize="x-small")
    return axes


def level_loss(axes: Any, table: LevelTable, level: str = RATE) -> Any:
    """Mean loss per scored element over the noise level, nats, with standard errors."""
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
