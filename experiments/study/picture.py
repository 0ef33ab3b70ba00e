"""The study's picture, ``docs/seeds.svg``: every fresh seed of the study, one dot each.

python -m experiments.study.picture
"""

import json
import pathlib

import matplotlib

from mdm_jax import plots

ROOT = pathlib.Path(__file__).parents[2]
FILES = ("confirmation", "confirmation_rates")
TASKS = {
    "sudoku6": ("6×6 Sudoku, scratch", "accuracy (higher is better)"),
    "sudoku4_noisy": ("Noisy 4×4, fine-tuned", "accuracy (higher is better)"),
    "text": ("Text, bound", "bits per character (lower is better)"),
}
METHODS = {
    "standard": "standard masked diffusion",
    "recommended": "default chain (keeps the bound)",
    "recommended_for_answers": "rates in [0.3, 0.8]",
    "highest_rates": "rates in [0.5, 1]",
}


def main() -> None:
    records = [
        json.loads((ROOT / f"experiments/results/{name}.json").read_text("utf-8")) for name in FILES
    ]
    results = {
        task: {
            method: record["results"]["passes"][task][method]["scores"]
            for record in records
            for method in record["results"]["passes"][task]
        }
        for task in TASKS
    }
    matplotlib.rcParams["svg.hashsalt"] = "mdm_jax"  # the same file each time
    figure = plots.new_figure((9, 2.4))
    panels = figure.subplots(1, len(TASKS), sharey=True)
    for axes, (task, (title, score)) in zip(panels, TASKS.items()):
        for row, method in enumerate(METHODS):
            scores = list(results[task][method].values())
            color = "0.45" if row == 0 else plots.PALETTE[row - 1]
            axes.plot(scores, [row] * len(scores), "o", color=color, alpha=0.7, markersize=6)
            axes.plot(sum(scores) / len(scores), row, "|", color=color, markersize=18, mew=2)
        plots.dress(axes, title, score)
        axes.margins(x=0.08, y=0.15)
    panels[0].set_yticks(range(len(METHODS)), METHODS.values(), fontsize=9)
    panels[0].invert_yaxis()
    figure.savefig(ROOT / "docs/seeds.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
