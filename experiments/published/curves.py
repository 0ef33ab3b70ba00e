"""Curves of the benchmarks' local runs: kept in ``experiments/results``, drawn in ``docs``.

python -m experiments.published.curves --name=sudoku9 --workdir=runs/sudoku9 --cpu_seconds=3600

keeps those of a run under a name, with --held_out=FILE what ``experiments.published.held_out``
printed; without arguments only the picture is drawn.
"""

import argparse
import json
import pathlib
from typing import Any

from mdm_jax import plots, training

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = ROOT / "experiments/results/published.json"
PICTURE = ROOT / "docs/benchmarks.png"
TITLES = {
    "text8": "6 blocks of width 192, novels in 27 letters (not text8)",
    "sudoku9": "8 blocks of width 256, 9 × 9 Sudoku, generated",
}
FINAL = (
    *("step", "split", "rows", "unit", "bits_per_unit", "standard_error_bits_per_unit"),
    *("data_standard_error_bits_per_unit", "unigram_bits_per_unit", "bigram_bits_per_unit"),
    *("accuracy", "accuracy_interval", "answers", "answered_by"),
)
"""What is kept of ``evaluation.json``."""


def kept(workdir: pathlib.Path, cpu_seconds: float) -> dict[str, Any]:
    """Training and validation curves of a run, bits per unit, and its final evaluation if any."""
    records = training.read_metrics(workdir / "metrics.jsonl")
    curves = [
        {
            "step": r["step"],
            "kind": r["kind"],
            "loss": 0,  # in another unit, not drawn
            "bits_per_unit": round(r["bits_per_unit"], 4),
            "bits_per_unit_standard_error": round(plots.bits_error(r), 4),
        }
        for r in records
        if r["kind"] in ("train", "evaluate")
    ]
    final = workdir / "evaluation.json"
    found = json.loads(final.read_text("utf-8")) if final.exists() else {}
    return {
        "cpu_seconds": cpu_seconds,
        "steps": curves[-1]["step"],
        "curves": curves,
        "final": {name: found[name] for name in FINAL if name in found},
    }


def draw(axes: Any, name: str, result: dict[str, Any]) -> Any:
    """Training and validation curve of a kept run."""
    final, test = result["final"], None
    if final:
        error = final["standard_error_bits_per_unit"]
        test = plots.Result(final["split"], final["step"], final["bits_per_unit"], error)
    plots.training_curve(axes, result["curves"], "character", result=test)
    minutes = result["cpu_seconds"] / 60
    axes.set_title(f"{TITLES[name]}\n{minutes:.0f} CPU minutes", loc="left", fontsize=9)
    axes.set_ylim(bottom=0)
    return axes


def main() -> None:
    parser = argparse.ArgumentParser("python -m experiments.published.curves")
    parser.add_argument("--name", choices=sorted(TITLES), help="under which a run is kept")
    parser.add_argument("--workdir", type=pathlib.Path, help="of the run")
    parser.add_argument("--cpu_seconds", type=float, help="that the run has taken")
    parser.add_argument("--held_out", type=pathlib.Path, help="what held_out printed")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    if arguments.name:
        if arguments.workdir is None or arguments.cpu_seconds is None:
            parser.error("--name needs --workdir and --cpu_seconds")
        results[arguments.name] = kept(arguments.workdir, arguments.cpu_seconds)
        if arguments.held_out is not None:
            found = json.loads(arguments.held_out.read_text("utf-8"))
            names = ("path", *FINAL)
            results[arguments.name]["held_out"] = {n: found[n] for n in names if n in found}
        RESULTS.write_text(json.dumps(results) + "\n", "utf-8")
    figure = plots.new_figure((10, 3.6))
    for axes, name in zip(figure.subplots(1, len(results), squeeze=False)[0], sorted(results)):
        draw(axes, name, results[name])
    plots.write(figure, PICTURE)


if __name__ == "__main__":
    main()
