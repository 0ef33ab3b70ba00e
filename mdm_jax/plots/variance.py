"""Plots of the variance meter: parts by method, efficiency, moments by noise level."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax.meter.decompose import Decomposition
from mdm_jax.meter.efficiency import Efficiency
from mdm_jax.meter.levels import LevelTable, Moments, optimal_density
from mdm_jax.plots.run import PARTS
from mdm_jax.plots.style import bar, dress, line
from mdm_jax.variance.ppots import EprFit, epr_curve

RATE = "masking rate"
"""Label of the noise axis; ``sigmoid(-logSNR)`` is its name in general."""


def component_bars(axes: Any, results: Mapping[str, Decomposition], what: str) -> Any:
    """Stacked bars of A, B, C by method, with the total's standard error; negative ones as zero."""
    rows = np.arange(len(results))
    left = np.zeros(len(results))
    for number, (name, label) in enumerate(PARTS):
        width = np.array([max(getattr(r, name).value, 0.0) for r in results.values()])
        axes.barh(rows, width, left=left, label=label, **bar(number))
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
    return dress(
        axes,
        f"Variance of the {what} by source",
        f"variance of the {what} of one row, all its views (± 1 standard error of the total)",
        columns=3,
    )


def efficiency_bars(axes: Any, results: Mapping[str, Efficiency]) -> Any:
    """Variance of the batch gradient times forward passes; no bar for unsettled estimates.

    Colours tell numbers of passes apart.
    """
    passes = sorted({result.passes for result in results.values() if result.settled})
    named = set()
    for row, result in enumerate(results.values()):
        if result.settled:
            value, error = result.variance_times_passes
            style = bar(passes.index(result.passes))
            if result.passes not in named:
                style["label"] = f"{result.passes} forward pass{'es' * (result.passes > 1)} per row"
            named.add(result.passes)
            axes.barh(row, value, xerr=error, capsize=2, **style)
        else:
            axes.text(0.0, row, " not settled", va="center", color="0.4")
    _name_rows(axes, results)
    axes.set_xlim(left=0)
    return dress(
        axes,
        "Variance of the batch gradient at equal compute (lower is better)",
        "variance of the batch gradient × forward passes per row (± 1 standard error)",
        columns=3,
    )


def level_moments(
    axes: Any, table: LevelTable, moments: Moments, what: str, level: str = RATE
) -> Any:
    """g, root of v and root of c by noise level, for ``table.loss`` or ``table.gradient``."""
    curves = (("mean_square", "g (mean)"), ("pattern", "√v (pattern)"), ("data", "√c (rows)"))
    for number, (name, label) in enumerate(curves):
        square = np.asarray(getattr(moments.value, name))
        error = np.asarray(getattr(moments.standard_error, name))
        low, middle, high = (np.sqrt(np.maximum(square + s * error, 0.0)) for s in (-1, 0, 1))
        style = line(number)
        axes.plot(table.masking_rates, middle, marker="o", ms=3, label=label, **style)
        axes.fill_between(table.masking_rates, low, high, color=style["color"], alpha=0.2)
    axes.set(xlim=(0, 1))
    axes.set_ylim(bottom=0)
    return dress(axes, f"Moments of the {what} by {level}", level, f"{what} of one row", columns=3)


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
            wide = {"color": "0.6", "linewidth": 3}
            axes.plot(table.masking_rates, density, style, label=label, **wide)
    for number, (name, (rates, density)) in enumerate(drawn.items()):
        axes.plot(rates, density, label=name, **line(number) | {"linewidth": 1})
    # Logarithmic: methods differ at small rates.
    axes.set(xscale="log", yscale="log")
    axes.set(xlim=(table.masking_rates[0], 1.0), ylim=(0.1, 20.0))
    return dress(axes, f"Densities of the {level}: best, and as drawn", level, "density")


def fitted_curve(axes: Any, table: LevelTable, curve: EprFit, level: str = RATE) -> Any:
    """Measured and fitted density of the level, of ``variance.ppots.fit_epr``."""
    value, rates = table.loss.value, table.masking_rates
    measured = optimal_density(table, value.mean**2 + np.maximum(value.pattern, 0.0))
    fitted = table.base_density * epr_curve(curve.parameters, 1.0 - table.quantiles)
    axes.plot(rates, measured, "o", ms=3, color="0.5", label="√(g² + v), measured")
    axes.plot(rates, fitted / np.trapezoid(fitted, rates), label="fitted", **line(0))
    axes.set(xlim=(0, 1))
    axes.set_ylim(bottom=0)
    title = f"Density of the {level} for P-POTS, KL {curve.divergence:.2g} nats"
    return dress(axes, title, level, "density", columns=2)


def level_loss(axes: Any, table: LevelTable, level: str = RATE) -> Any:
    """Mean loss per eligible element over the noise level, nats, with standard errors."""
    scale = table.nats_per_token / np.where(table.loss.value.mean, table.loss.value.mean, 1.0)
    error = np.asarray(table.loss.standard_error.mean) * scale
    style = line(0) | {"marker": "o", "ms": 3, "capsize": 2}
    axes.errorbar(table.masking_rates, table.nats_per_token, yerr=error, **style)
    axes.set(xlim=(0, 1))
    axes.set_ylim(bottom=0)
    return dress(axes, f"Loss by {level} (± 1 standard error)", level, "nats per element")


def _name_rows(axes: Any, names: Sequence[str] | Mapping[str, Any]) -> None:
    axes.set_yticks(np.arange(len(names)), list(names), fontsize="small")
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top; methods without a bar keep their row
