"""Curves of a study: validation bound with bands over seeds, gradient variance over training.

    python -m experiments.study.plots

draws the picture of docs/study.md, ``docs/seeds.svg``: every fresh seed of the study, one dot each.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from experiments.study.suites import Suite
from experiments.study.table import published
from mdm_jax import plots as mdm_plots

ROOT = pathlib.Path(__file__).parents[2]
PANELS = {
    "sudoku6": ("6×6 Sudoku, scratch", "accuracy (higher is better)"),
    "sudoku4_noisy": ("Noisy 4×4, fine-tuned", "accuracy (higher is better)"),
    "text": ("Text, bound", "bits per character (lower is better)"),
    "sudoku9": ("9×9 Sudoku, scratch", "accuracy (higher is better)"),
    "countdown4": ("Countdown, bound", "bits per character (lower is better)"),
    "text_subwords": ("Text in subwords, bound", "bits per character (lower is better)"),
}
ROWS = {
    "standard": "standard masked diffusion",
    "recommended": "default chain (keeps the bound)",
    "recommended_for_answers": "rates in [0.3, 0.8]",
    "flat_slopes": "flat weights, P-POTS",
}


def write(suite: Suite, root: pathlib.Path, record: Mapping[str, Any]) -> list[pathlib.Path]:
    """Writes the plots of finished runs below ``root/plots``; returns the files.

    Args:
        suite: the plan.
        root: the study's directory.
        record: from ``table.write``.
    """
    files = []
    for budget, results in record["results"].items():
        for task in suite.tasks:
            found = {
                suite.methods[name].label: curves(result)
                for name, result in results[task].items()
                if result
            }
            if found:
                files.append(root / "plots" / f"training-{task}-{budget}.png")
                mdm_plots.save(lambda axes, c=found: training_bands(axes, c), files[-1], (8, 7))
            points = {
                suite.methods[name].label: result["gradient"]
                for name, result in results[task].items()
                if result and result["gradient"]
            }
            if points and budget == "passes":
                files.append(root / "plots" / f"gradient-variance-{task}.png")
                mdm_plots.save(lambda axes, p=points: variance_curves(axes, p), files[-1], (8, 7))
    return files


def curves(result: Mapping[str, Any] | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """(forward passes, validation bits per unit) of each finished run, one per seed.

    Args:
        result: of one method in ``study.json``.
    """
    made = result["curves"].values() if result else ()
    return [(np.array(c["forward_passes"]), np.array(c["bits_per_unit"])) for c in made]


def training_bands(axes: Any, curves: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]) -> Any:
    """Mean over seeds, in a band from the worst to the best seed.

    Args:
        axes: matplotlib axes.
        curves: by method, one (forward passes, bits) per seed; a seed that ended early is drawn
            as far as all of its method's go.
    """
    for number, (label, seeds) in enumerate(curves.items()):
        length = min(len(bits) for _, bits in seeds)
        passes = seeds[0][0][:length]
        bits = np.stack([bits[:length] for _, bits in seeds])
        style = mdm_plots.line(number)
        axes.plot(passes, bits.mean(0), label=label, marker=".", **style)
        color = style["color"]
        axes.fill_between(passes, bits.min(0), bits.max(0), color=color, alpha=0.15, linewidth=0)
    title = "Validation loss (bound; autoregressive: exact), means and ranges over seeds"
    return mdm_plots.dress(axes, title, "forward passes", "bits per unit")


def variance_curves(axes: Any, points: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Variance of the batch gradient at equal forward passes, rows included, along training.

    Args:
        axes: matplotlib axes.
        points: by method, of ``study_table.gradient``; open circles have not settled.
    """
    for number, (label, found) in enumerate(points.items()):
        style = mdm_plots.line(number)
        passes = np.array([point["forward_passes"] for point in found])
        total = np.array([point["total"]["mean"] for point in found])
        errors = np.array([point["total"]["standard_error"] for point in found], np.float64)
        axes.errorbar(passes, total, errors, label=label, **style)
        for point in found:
            color = style["color"]
            face = color if point["total"]["settled"] else "none"
            axes.plot(point["forward_passes"], point["total"]["mean"], "o", color=color, mfc=face)
    axes.set(yscale="log")
    title = "Variance of the batch gradient ± 1 standard error (open: not settled)"
    return mdm_plots.dress(axes, title, "forward passes", "variance of the batch gradient")


def main() -> None:
    """Draw ``docs/seeds.svg``: every fresh seed of the study, one dot each."""
    found = [published(name)["results"]["passes"] for name in ("eight", "weights", "larger")]
    matplotlib.rcParams["svg.hashsalt"] = "mdm_jax"  # the same file each time
    figure = mdm_plots.new_figure((9, 4.6))
    panels = figure.subplots(2, len(PANELS) // 2, sharey=True)
    for axes, (task, (title, score)) in zip(panels.flat, PANELS.items()):
        results = {m: r for each in found for m, r in each.get(task, {}).items() if r}
        for row, method in enumerate(ROWS):
            if method not in results:
                continue
            scores = list(results[method]["scores"].values())
            color = "0.45" if row == 0 else mdm_plots.PALETTE[row - 1]
            axes.plot(scores, [row] * len(scores), "o", color=color, alpha=0.7, markersize=6)
            axes.plot(sum(scores) / len(scores), row, "|", color=color, markersize=18, mew=2)
        mdm_plots.dress(axes, title, score)
        axes.margins(x=0.08, y=0.15)
    for axes in panels[:, 0]:
        axes.set_yticks(range(len(ROWS)), ROWS.values(), fontsize=9)
    panels[0, 0].invert_yaxis()
    figure.savefig(ROOT / "docs/seeds.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
