"""The README's picture, ``docs/seeds.svg``: every fresh seed of the study, one dot each.

python -m experiments.study.picture
"""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]
FILES = ("confirmation", "confirmation_rates")
TASKS = {
    "sudoku6": "6×6 Sudoku, from scratch\naccuracy →",
    "sudoku4_noisy": "noisy 4×4 Sudoku, fine-tuned\naccuracy →",
    "text": "text\n← bits per character (bound)",
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
    plt.rcParams["svg.hashsalt"] = "mdm_jax"  # the same file each time
    figure, panels = plt.subplots(1, len(TASKS), figsize=(9, 2.4), sharey=True)
    for axes, (task, title) in zip(panels, TASKS.items()):
        for row, method in enumerate(METHODS):
            scores = list(results[task][method].values())
            color = "0.45" if row == 0 else f"C{row - 1}"
            axes.plot(scores, [row] * len(scores), "o", color=color, alpha=0.7, markersize=6)
            axes.plot(sum(scores) / len(scores), row, "|", color=color, markersize=18, mew=2)
        axes.set_xlabel(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08, y=0.15)
    panels[0].set_yticks(range(len(METHODS)), METHODS.values(), fontsize=9)
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(ROOT / "docs/seeds.svg", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
