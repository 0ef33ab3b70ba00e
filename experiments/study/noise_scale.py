"""Gradient noise scale along training, by chain: the batch at which doubling stops to pay.

    python -m experiments.study --suite=noise_scale --workdir=runs/noise_scale
    python -m experiments.study.noise_scale --workdir=runs/noise_scale
    python -m experiments.study.noise_scale --results=small --workdir=runs/noise_scale_small

``B = P tr Cov(g) / |E g|^2`` of the batch gradient g over P forward passes, rows, rates and masks
drawn anew (McCandlish et al. 2018, B_simple). A batch far below B halves the number of steps when
it is doubled, one far above gains nothing. Chains that tie the rows of a batch (strata) are counted
as they are at the batch of the run. Errors are over seeds, of a ratio of means; with ``--results``,
kept results of a suite in ``experiments/results``, they are of the variance alone, over groups of
redraws, since the signal's was not kept. Writes ``noise_scale.json`` and ``noise_scale.png`` into
the directory, from finished runs.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.study import runs as study_runs
from experiments.study.suites import SUITES, Suite
from experiments.study.table import RESULTS, published
from mdm_jax import files, plots
from mdm_jax.estimates import finite_or_none, standard_error_of_ratio
from mdm_jax.evaluation.seeds import markdown_table
from mdm_jax.launch.workdir import write_json


def noise_scale(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """B in forward passes at every measured step, from the records of the seeds of a method.

    ``standard_error`` is None for one seed, both are None where no signal is left. ``settled``: the
    variance of every seed is.
    """
    measured = [run for run in runs if run["gradient"]]
    points = []
    for number in range(min((len(run["gradient"]) for run in measured), default=0)):
        each = [run["gradient"][number] for run in measured]
        passes = measured[0]["batch_size"] * measured[0]["views"]
        noise = np.array([passes * np.mean(point["total"]["group_variances"]) for point in each])
        signal = np.array([point["total"]["signal"] for point in each])
        known = signal.mean() > 0
        error = standard_error_of_ratio(noise, signal) if known and len(each) > 1 else np.nan
        points.append(
            {
                "step": each[0]["step"],
                "forward_passes": each[0]["step"] * passes,
                "noise_scale": float(noise.mean() / signal.mean()) if known else None,
                "standard_error": finite_or_none(error),
                "seeds": len(each),
                "settled": all(not point["total"]["unsettled"] for point in each),
            }
        )
    return points


def collect(suite: Suite, root: pathlib.Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """:func:`noise_scale` by task and method, of what is finished."""
    found: dict[str, dict[str, Any]] = {}
    for task in suite.tasks:
        found[task] = {}
        for method in suite.methods:
            runs = [study_runs.Run(task, method, "passes", seed) for seed in suite.measured_seeds]
            records = [study_runs.read_record(root, run) for run in runs]
            points = noise_scale([record for record in records if record is not None])
            if points:
                found[task][method] = points
    return found


def of_results(record: Mapping[str, Any]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """As :func:`collect`, of the ``study.json`` of a suite, which holds the signal of all seeds
    together: there are no standard errors."""
    found: dict[str, dict[str, Any]] = {}
    for task, methods in record["results"]["passes"].items():
        found[task] = {}
        for method, result in methods.items():
            points = []
            for point in result["gradient"] if result else ():
                ratio, total = point["noise_to_signal"], point["total"]
                passes = point["forward_passes"] / point["step"]
                points.append(
                    {name: point[name] for name in ("step", "forward_passes")}
                    | {"noise_scale": None if ratio is None else ratio * passes}
                    | {"standard_error": None, "settled": total["settled"]}
                    | {"seeds": len(total["groups"])}
                )
            if points:
                found[task][method] = points
    return found


def table(suite: Suite, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One task: a row for each method, a column for each step; * marks unsettled variances."""
    steps = [point["step"] for point in next(iter(found.values()))]
    rows = [[suite.methods[name].label, *map(_figure, points)] for name, points in found.items()]
    return markdown_table(["method", *(f"step {step}" for step in steps)], rows)


def _figure(point: Mapping[str, Any]) -> str:
    if point["noise_scale"] is None:
        return "no signal left"
    error = point["standard_error"]
    figure = f"{point['noise_scale']:.0f}" + "*" * (not point["settled"])
    return figure + (f" ± {error:.0f}" if error is not None else "")


def draw(suite: Suite, found: Mapping[str, Mapping[str, Any]], path: pathlib.Path) -> None:
    """B over steps on a logarithmic axis, a panel for each task."""
    figure = plots.new_figure((5.0 * len(found), 3.2))
    for axes, (task, methods) in zip(np.atleast_1d(figure.subplots(1, len(found))), found.items()):
        for number, (name, points) in enumerate(methods.items()):
            known = [point for point in points if point["noise_scale"] is not None]
            errors = [point["standard_error"] or 0.0 for point in known]
            axes.errorbar(
                [point["step"] for point in known],
                [point["noise_scale"] for point in known],
                errors,
                **plots.line(number),
                label=suite.methods[name].label,
            )
        axes.set_yscale("log")
        plots.dress(axes, f"{task}: gradient noise scale", "step", "forward passes")
    plots.write(figure, path)


def main() -> int:
    """Read a study, print the tables, write the figure."""
    parser = argparse.ArgumentParser("experiments.study.noise_scale", allow_abbrev=False)
    parser.add_argument("--suite", default="noise_scale", choices=sorted(SUITES))
    kept = sorted(file.stem for file in RESULTS.glob("*.json") if file.stem in SUITES)
    parser.add_argument("--results", default="", choices=["", *kept], help="kept ones of a suite")
    parser.add_argument("--methods", default="", help="names, separated by commas; all by default")
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    given = parser.parse_args()
    suite = SUITES[given.results or given.suite]
    if given.results:
        all_tasks = of_results(published(given.results))
    else:
        all_tasks = collect(suite, given.workdir)
    wanted = given.methods.split(",") if given.methods else [*suite.methods]
    if unknown := sorted(set(wanted) - set(suite.methods)):
        parser.error(f"--methods: {unknown} are not of the suite, which has {[*suite.methods]}")
    own = [name for name in wanted if not suite.methods[name].same_as]
    found = {
        task: {name: methods[name] for name in own if name in methods}
        for task, methods in all_tasks.items()
    }
    found = {task: methods for task, methods in found.items() if methods}
    if not found:
        print(
            f"error: {given.results or given.workdir} has no finished run of {suite.name} whose "
            "gradient was measured; run python -m experiments.study first",
            file=sys.stderr,
        )
        return 2
    for task, methods in found.items():
        print(f"{task}, forward passes:\n\n{table(suite, methods)}\n")
    given.workdir.mkdir(parents=True, exist_ok=True)
    write_json(files.as_path(given.workdir) / "noise_scale.json", found)
    draw(suite, found, given.workdir / "noise_scale.png")
    print(f"written to {given.workdir / 'noise_scale.json'} and noise_scale.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
