"""The picture of docs/decoding.md, ``docs/decoding.svg``, from the table of RESULTS.md.

python -m experiments.benchmarks.decoding_picture
"""

import itertools
import pathlib
from typing import Any

import matplotlib

from mdm_jax import plots

ROOT = pathlib.Path(__file__).parents[2]
KINDS = {
    "positions at once, where sure": ("parallel,", "entropy"),
    "a number a step, by score": ("exact", "by_"),
    "at random, and remasking": ("first", "ancestral", "cached", "remdm", "predictor", "random"),
    "blocks, with and without a cache": ("blocks", "parallel in"),
}
"""Label: how the names of its ways begin."""
NAMED = ("exact", "by_confidence, 8 a step", "entropy_bounded, 0.5 nats", "parallel, factor 0.5",
         "parallel, above 0.9", "blocks of 9", "blocks of 9, dual cache", "ancestral, 8 steps",
         "remdm_confidence, 32 steps")  # fmt: skip


def rows(text: str) -> dict[str, tuple[float, float]]:
    """Milliseconds a row and share right of each way, of the section "Fast decoding"."""
    text = text[text.index("## Fast decoding") :]
    lines = text[text.index("| way ") :].splitlines()[2:]
    lines = itertools.takewhile(lambda line: line.startswith("|"), lines)
    table = [line.strip("|").split("|") for line in lines]
    return {cells[0].strip(): (float(cells[3]), float(cells[1])) for cells in table}


def draw(axes: Any) -> Any:
    """Quality against time, both axes linear but for the logarithm of the time."""
    table = rows((ROOT / "experiments/benchmarks/RESULTS.md").read_text("utf-8"))
    for number, (label, begins) in enumerate(KINDS.items()):
        own = [
            at for way, at in table.items() if way.startswith(begins) and "parallel in" not in way
        ]
        style = {"linestyle": "", "marker": "osD^"[number], "markersize": 6, "alpha": 0.8}
        axes.plot(*zip(*own), color=plots.PALETTE[number], label=label, **style)
    for name in NAMED:
        axes.annotate(name, table[name], (4, -10), textcoords="offset points", fontsize=7.5)
    axes.set_xscale("log")
    axes.set_xlim(4.5, 200)
    axes.set_xticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
    axes.minorticks_off()
    title = "6×6 Sudoku: grids solved, and time to solve one"
    return plots.dress(axes, title, "milliseconds a grid", "share of 32 grids")


def main() -> None:
    options = {"svg.hashsalt": "mdm_jax", "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        figure = plots.new_figure((7, 4.2))
        draw(figure.add_subplot())
        figure.savefig(ROOT / "docs/decoding.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
