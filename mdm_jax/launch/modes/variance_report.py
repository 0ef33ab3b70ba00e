"""The output of the mode ``variance``: a recommendation, a table, a CSV, and plots."""

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mdm_jax import files, meter, plots
from mdm_jax.meter.decompose import Decomposition
from mdm_jax.meter.efficiency import Efficiency
from mdm_jax.meter.levels import LevelTable

BASELINE = "independent"
"""The reference: independent levels, one mask per row, the same compute."""

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


@dataclasses.dataclass(frozen=True)
class Result:
    """Measurements of one method.

    Attributes:
        chain, corruption: names of the transform and of the corruption.
        bias, chain_bias: the weaker label of objective and chain; that of the chain alone.
        loss, gradient: A, B, C of one forward pass.
        efficiency: of the batch gradient, data fixed.
        training: of the batch gradient with rows drawn anew, in batches of as many forward passes
            as the run has rows; None where the views do not divide these.
        density: (masking rates, density) that it draws from, None for the objective's own law.
        refused: why it could not be measured, or ""; everything else is None then.
    """

    chain: str
    corruption: str
    bias: str
    chain_bias: str = "exact"
    loss: Decomposition | None = None
    gradient: Decomposition | None = None
    efficiency: Efficiency | None = None
    training: Efficiency | None = None
    density: tuple[np.ndarray, np.ndarray] | None = None
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the density."""
        names = ("chain", "corruption", "bias", "chain_bias", "refused")
        record: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name in ("loss", "gradient", "efficiency", "training"):
            part = getattr(self, name)
            record[name] = None if part is None else part.to_dict()
        return record


def write_report(
    directory: files.Path,
    record: Mapping[str, Any],
    results: Mapping[str, Any],
    table: LevelTable,
    level: str,
) -> list[str]:
    """Write ``variance.csv`` and the plots; returns the files, the JSON record's included.

    ``record`` is from ``measure.measure``, ``table`` of the run's process, ``level`` an axis label.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_csv(directory / "variance.csv", record)
    measured = {name: result for name, result in results.items() if not result.refused}
    densities = {name: r.density for name, r in measured.items() if r.density is not None}
    paths = [directory / "variance.json", directory / "variance.csv"]

    def draw(name: str, size: tuple[float, float], plot: Callable, *arguments: Any) -> None:
        paths.append(directory / f"{name}.png")
        plots.save(lambda axes: plot(axes, *arguments), paths[-1], size)

    bars, curve, long_legend = (8, 1.6 + 0.25 * len(measured)), (6.4, 4.4), (6.4, 6)
    for of in ("gradient", "loss"):
        parts = {name: getattr(result, of) for name, result in measured.items()}
        draw(f"components_{of}", bars, plots.component_bars, parts, of)
    figures = {name: result.efficiency for name, result in measured.items()}
    draw("efficiency", bars, plots.efficiency_bars, figures)
    for of in ("loss", "gradient"):
        moments = getattr(table, of)
        draw(f"levels_{of}", curve, plots.level_moments, table, moments, of, level)
    draw("densities", long_legend, plots.level_densities, table, table.gradient, densities, level)
    draw("level_loss", curve, plots.level_loss, table, level)
    return [str(path) for path in paths]


def write_csv(path: files.Path, record: Mapping[str, Any]) -> None:
    """One line per method; empty where there is no number."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS, restval="")
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
    files.write(path, table.getvalue())


def recommend(results: Mapping[str, Any]) -> dict[str, Any]:
    """The exact method with the least gradient variance per compute, with its lead and confidence.

    Exact: no bias beyond that of independent draws. Returns name (None if no exact method has
    settled), ``text`` for display, and comparisons with the baseline and the runner-up: ratio,
    difference in standard errors, methods less than two standard errors from the best.
    """
    # A truncated objective makes every label truncated: compare with the baseline's label.
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
