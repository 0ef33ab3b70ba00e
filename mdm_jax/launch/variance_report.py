"""What the mode ``variance`` says: a recommendation, a table, a CSV, and plots."""

import csv
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdm_jax import meter, plots
from mdm_jax.meter.levels import LevelTable

BASELINE = "independent"
"""What every method is compared with: independent levels, one mask per row, the same compute."""

_PARTS = ("pattern", "rate", "data")

COLUMNS = (
    "method",
    "chain",
    "corruption",
    "bias",
    "passes",
    "variance_times_passes",
    "variance_times_passes_standard_error",
    "variance",
    "variance_standard_error",
    "noise_to_signal",
    "unsettled",
    "training_variance",
    "training_variance_standard_error",
    "training_unsettled",
    "refused",
    *(
        f"{of}_{part}{suffix}"
        for of in ("gradient", "loss")
        for part in ("pattern", "rate", "data", "total")
        for suffix in ("", "_standard_error")
    ),
)


def write_report(
    directory: pathlib.Path,
    record: Mapping[str, Any],
    results: Mapping[str, Any],
    table: LevelTable,
    level: str,
) -> list[str]:
    """Writes ``variance.csv`` and the plots; returns the files, the JSON record's included.

    Args:
        directory: made if missing.
        record: from ``variance.measure``.
        results: what was measured, by method.
        table: levels under the run's own process.
        level: label of the noise axis.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_csv(directory / "variance.csv", record)
    measured = {name: result for name, result in results.items() if not result.refused}
    height = 1.0 + 0.25 * len(measured)
    drawn = {name: r.density for name, r in measured.items() if r.density is not None}
    figures = {
        "components_gradient": (
            lambda axes: plots.component_bars(
                axes, {name: r.gradient for name, r in measured.items()}, "gradient"
            ),
            (8, height),
        ),
        "components_loss": (
            lambda axes: plots.component_bars(
                axes, {name: r.loss for name, r in measured.items()}, "loss"
            ),
            (8, height),
        ),
        "efficiency": (
            lambda axes: plots.efficiency_bars(
                axes, {name: r.efficiency for name, r in measured.items()}
            ),
            (8, height),
        ),
        "levels_loss": (
            lambda axes: plots.level_moments(axes, table, table.loss, "loss", level),
            (6, 4),
        ),
        "levels_gradient": (
            lambda axes: plots.level_moments(axes, table, table.gradient, "gradient", level),
            (6, 4),
        ),
        "densities": (
            lambda axes: plots.level_densities(axes, table, table.gradient, drawn, level),
            (6, 4),
        ),
        "level_loss": (lambda axes: plots.level_loss(axes, table, level), (6, 4)),
    }
    paths = [directory / "variance.json", directory / "variance.csv"]
    for name, (draw, size) in figures.items():
        paths.append(directory / f"{name}.png")
        plots.save(draw, paths[-1], size)
    return [str(path) for path in paths]


def write_csv(path: pathlib.Path, record: Mapping[str, Any]) -> None:
    """One line per method; empty where there is no number."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for name, method in record["methods"].items():
            line = {"method": name}
            line |= {key: method[key] for key in ("chain", "corruption", "bias", "refused")}
            for of in ("gradient", "loss"):
                parts = method[of] or {}
                line |= {f"{of}_{k}": v for k, v in parts.items() if f"{of}_{k}" in COLUMNS}
            line |= {k: v for k, v in (method["efficiency"] or {}).items() if k in COLUMNS}
            line |= {f"training_{k}": v for k, v in (method["training"] or {}).items()}
            line = {key: value for key, value in line.items() if key in COLUMNS}
            writer.writerow({key: "" if value is None else value for key, value in line.items()})


def recommend(results: Mapping[str, Any]) -> dict[str, Any]:
    """The exact method with the least gradient variance per compute; by how much and how sure.

    Exact is a method that estimates what independent draws estimate.

    Returns:
        name (None if no exact method has settled), ``text`` for people, and the comparisons with
        the baseline and with the runner-up: ratio, difference in standard errors, and the methods
        that cannot be told apart from the best (below two standard errors).
    """
    # A truncated objective makes every label truncated; what counts is that a method adds nothing.
    own = results[BASELINE].bias if BASELINE in results else "exact"
    settled = {
        name: result.efficiency
        for name, result in results.items()
        if (result.bias, result.chain_bias) == (own, "exact")
        and result.efficiency is not None
        and result.efficiency.settled
    }
    if not settled:
        text = "no exact method has a settled estimate; use more redraws"
        return {"name": None, "text": text, "tied": [], "versus": {}}
    best = min(settled, key=lambda name: settled[name].variance_times_passes.value)
    versus = {
        name: meter.compare(settled[best], other) for name, other in settled.items() if name != best
    }
    tied = [name for name, c in versus.items() if c.standard_errors > -2]
    value, error = settled[best].variance_times_passes
    text = f"{best}: variance x passes {value:.4g} ± {error:.2g}"
    if BASELINE in versus:
        against = versus[BASELINE]
        text += (
            f", {1 - against.ratio:.0%} below independent draws at equal compute "
            f"({-against.standard_errors:.1f} standard errors)"
        )
    text += f"; not told apart from: {', '.join(tied)}" if tied else "; ahead of all others"
    return {
        "name": best,
        "text": text,
        "tied": tied,
        "versus": {
            name: {
                "ratio": c.ratio,
                "difference": c.difference.value,
                "difference_standard_error": c.difference.standard_error,
                "standard_errors": c.standard_errors if np.isfinite(c.standard_errors) else None,
            }
            for name, c in versus.items()
        },
    }


def format_table(record: Mapping[str, Any]) -> str:
    """The record as a table for the terminal."""
    header = ("method", "bias", "passes", "A", "B", "C", "noise/signal", "variance x passes", "")
    header += ("training", "")
    base = record["methods"].get(BASELINE) or {}
    rows = [header] + [_row(name, method, base) for name, method in record["methods"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, 1, 8, 10) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(
        [
            f"gradient variance of {record['parameters']}, batches of {record['batch_size']} rows",
            *lines,
            "A pattern, B rate, C data: shares of one row's gradient variance (all its views).",
            "variance x passes: of the batch gradient with the data fixed, per forward pass.",
            "training: of the batch gradient with rows drawn anew, as the optimiser sees it, in",
            "batches of equally many forward passes. Factors compare with independent draws. An",
            "estimate is not settled where its groups disagree, a few redraws carry it, its tail",
            "index is low, redraws are few, or the variance is known to be infinite (Bernoulli",
            "masks down to rate 0).",
            f"recommended: {record['recommendation']['text']}",
        ]
    )


def _row(name: str, method: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[str, ...]:
    if method["refused"]:
        return (name, method["bias"], *[""] * 6, f"not measured: {method['refused']}", "", "")
    gradient, figure = method["gradient"], method["efficiency"]
    total = gradient["total"]
    shares = [f"{gradient[part] / total:.0%}" if total else "" for part in _PARTS]
    noise = "" if figure["noise_to_signal"] is None else f"{figure['noise_to_signal']:.3g}"
    return (
        *(name, method["bias"], str(figure["passes"]), *shares, noise),
        *_figure(figure, base.get("efficiency"), "variance_times_passes"),
        *_figure(method["training"], base.get("training"), "variance"),
    )


def _figure(
    figure: Mapping[str, Any] | None, base: Mapping[str, Any] | None, field: str
) -> tuple[str, str]:
    """An estimate with its error and its ratio to the baseline's, or why there is none."""
    if figure is None:
        return "views do not divide the batch", ""
    value, error = figure[field], figure[f"{field}_standard_error"]
    if value is None:
        spread = np.asarray(figure["group_variances"])
        relative = spread.std(ddof=1) / np.sqrt(len(spread)) / max(spread.mean(), 1e-300)
        tail = "none" if figure["tail_index"] is None else f"{figure['tail_index']:.1f}"
        note = f"± {relative:.0%}, top 1% {figure['top_share']:.0%}, tail {tail}"
        return "not settled", note
    text = f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
    known = base is not None and base[field]
    return text, f"{value / base[field]:.2f}x" if known else ""
