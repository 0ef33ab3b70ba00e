"""Table, comparison and plot of tuned settings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax import files, plots
from mdm_jax.evaluation.seeds import (
    format_difference,
    format_spread,
    markdown_table,
    summarise_seeds,
)
from mdm_jax.launch.workdir import writing

START, BEST = "as begun", "tuned"


def label(point: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in point) or START


def compared(final: Mapping[str, Mapping[int, Mapping[int, np.ndarray]]]) -> dict[str, Any]:
    """Means of distances by seed, all numbers of sampling steps together and each by itself.

    ``final``: distances by name, seed and number of steps.
    """

    def summary(counts: Sequence[int]) -> dict[str, Any]:
        scores = {
            name: {seed: float(np.mean([each[n] for n in counts])) for seed, each in own.items()}
            for name, own in final.items()
        }
        return summarise_seeds(scores, START)

    known = next(iter(final.get(START, {}).values()), {})
    return {"scores": summary([*known]), "by_steps": {n: summary([n]) for n in known}}


def write(record: Mapping[str, Any], names: Sequence[str], workdir: files.Path) -> str:
    """Write ``tune.json``, ``tune.md``, ``tune.png``; returns the text of the second."""
    text = _markdown(record, names)
    with writing(workdir / "tune.json"):
        files.write_json(workdir / "tune.json", record)
        files.write(workdir / "tune.md", text + "\n")
        tried = [(t["steps"], t["point"], t["distances"]) for t in record["tried"]]
        plots.write(plots.tried_settings(names, tried), workdir / "tune.png")
    return text


def _markdown(record: Mapping[str, Any], names: Sequence[str]) -> str:
    head = ["training steps", *names, "distance ± s.e. of its samples"]
    rows = []
    ranked = sorted(record["tried"], key=lambda t: (-t["steps"], np.mean(t["distances"])))
    for each in ranked:
        point = [f"{v:g}" for v in each["point"]] or [START] * len(names)
        values = np.asarray(each["distances"])
        error = np.std(values, ddof=1) / np.sqrt(values.size)
        rows.append([str(each["steps"]), *point, f"{values.mean():.4f} ± {error:.4f}"])
    parts = [markdown_table(head, rows)]
    if not record["settings"]:
        return "\n\n".join([*parts, "No settings were better than the start; nothing is gained."])
    head = ["sampling steps", START, BEST, "difference over seeds (95 %)"]
    scores = {"all": record["scores"]} | record["by_steps"]
    rows = [
        [
            str(n),
            format_spread(each[START]),
            format_spread(each[BEST]),
            format_difference(each[BEST]["against_baseline"]),
        ]
        for n, each in scores.items()
        if n == "all" or len(scores) > 2
    ]
    return "\n\n".join(
        [
            *parts,
            "Distances of full runs, the same seeds for both, others than in the search: means "
            "over seeds ± s.d.; below 0 is better.",
            markdown_table(head, rows),
        ]
    )
