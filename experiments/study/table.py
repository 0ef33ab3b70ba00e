"""Tables of a study: means, spreads, and paired intervals."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.study import runs as study_runs
from experiments.study.runs import Run
from experiments.study.suites import Suite, Task
from mdm_jax.estimates import finite_or_none, standard_error_of_mean, standard_error_of_ratio
from mdm_jax.evaluation.seeds import (
    format_difference,
    format_number,
    format_spread,
    markdown_table,
    summarise_seeds,
)
from mdm_jax.launch.workdir import provenance, write_json

RESULTS = pathlib.Path(__file__).parents[1] / "results"

BUDGETS = {"passes": "equal forward passes", "steps": "equal steps"}


def write(suite: Suite, root: pathlib.Path) -> dict[str, Any]:
    """Writes ``study.json`` and ``study.md`` from whatever is finished; returns the former."""
    root.mkdir(parents=True, exist_ok=True)
    results = {
        budget: {
            task: summarise(suite, task, records(suite, root, task, budget)) for task in suite.tasks
        }
        for budget in suite.budgets
    }
    finished, total = count(suite, root)
    record = {
        "suite": suite.name,
        "finished": finished,
        "planned": total,
        "provenance": provenance(min(suite.seeds)),
        "revisions": revisions(suite, root),
        "results": results,
    }
    write_json(root / "study.json", record)
    (root / "study.md").write_text(markdown(suite, record), "utf-8")
    return record


def published(name: str) -> dict[str, Any]:
    """The ``study.json`` of a suite in ``experiments/results``; ``docs/study.md`` discusses it.

    Raises:
        ValueError: for a suite without published results, naming those with.
    """
    files = {file.stem: file for file in RESULTS.glob("*.json")}
    if name not in files:
        raise ValueError(f"no results of {name!r} in {RESULTS}, only of {sorted(files)}")
    return json.loads(files[name].read_text("utf-8"))


def revisions(suite: Suite, root: pathlib.Path) -> dict[str, int]:
    """Number of finished runs by git revision."""
    runs = [r for r in study_runs.plan(suite) if study_runs.read_record(root, r) is not None]
    names = [study_runs.revision(root, run) for run in runs]
    return {name: names.count(name) for name in sorted(set(names))}


def records(
    suite: Suite, root: pathlib.Path, task: str, budget: str
) -> dict[str, list[dict[str, Any]]]:
    """The records of the finished runs by method, in the order of the seeds, with their curves."""
    by_method = {}
    for method in suite.methods:
        runs = [
            study_runs.planned_as(suite, Run(task, method, budget, seed)) for seed in suite.seeds
        ]
        read = [(run, study_runs.read_record(root, run)) for run in runs]
        by_method[method] = [
            record | {"curve": study_runs.validation_curve(root, run, record)}
            for run, record in read
            if record is not None
        ]
    return by_method


def summarise(
    suite: Suite, task: str, by_method: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Every method of one task under one budget, each compared with the baseline seed by seed.

    Args:
        suite: the plan.
        task: name of the task.
        by_method: records, from :func:`records`.

    Returns:
        JSON values by method; None where nothing is finished.
    """
    settings = suite.tasks[task]
    summaries = summarise_seeds(
        {method: scores(settings, runs) for method, runs in by_method.items()},
        suite.baseline,
        settings.higher_is_better,
        [name for name in by_method if not suite.methods[name].same_as],
    )
    results = {}
    for method, runs in by_method.items():
        if not runs:
            results[method] = None
            continue
        results[method] = summaries[method] | {
            "failed": [run["seed"] for run in runs if run["failed"]],
            "training_seconds": float(np.mean([run["training_seconds"] for run in runs])),
            "steps": runs[0]["steps"],
            "batch_size": runs[0]["batch_size"],
            "forward_passes": runs[0]["forward_passes"],
            "bits_per_unit": _mean([_field(run, "bits_per_unit") for run in runs]),
            "curves": {str(run["seed"]): run["curve"] for run in runs},
            "gradient": gradient(runs),
        }
    for method, result in results.items():
        if result is not None:
            base = _ended(results.get(suite.baseline))
            result["share_of_passes"] = share_of_passes(_ended(result), base)
            same = results.get(suite.methods[method].same_as or method)
            for name in ("total", "noise"):
                result[f"{name}_over_baseline"] = _over(name, same, results.get(suite.baseline))
    return results


def share_of_passes(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    baseline: Mapping[str, Mapping[str, Sequence[float]]],
) -> dict[str, Any] | None:
    """Share of the baseline's passes after which its last validation bound is reached, by seed.

    ``curves`` are by seed, as of :func:`study_runs.validation_curve`, with straight lines between
    validations. A seed that does not reach the bound has None; ``at_most`` says that one had
    reached it at its first validation, perhaps before. ``mean`` and ``standard_error`` are None
    where a seed has None; None without a seed that both have.
    """
    shares: dict[str, float | None] = {}
    at_most = False
    for seed in (seed for seed in curves if seed in baseline):
        passes, bits = (
            np.array(curves[seed][name]) for name in ("forward_passes", "bits_per_unit")
        )
        wanted, whole = (baseline[seed][n][-1] for n in ("bits_per_unit", "forward_passes"))
        reached = np.flatnonzero(bits <= wanted)
        shares[seed] = None
        if len(reached):
            part = slice(max(reached[0] - 1, 0), reached[0] + 1)
            at_most = at_most or reached[0] == 0
            # Falling from above to the bound or below it.
            shares[seed] = float(np.interp(-wanted, -bits[part], passes[part]) / whole)
    if not shares:
        return None
    values = [share for share in shares.values() if share is not None]
    complete = len(values) == len(shares)
    error = finite_or_none(standard_error_of_mean(np.array(values))) if complete else None
    return {
        "by_seed": shares,
        "at_most": bool(at_most),
        "mean": float(np.mean(values)) if complete else None,
        "standard_error": error,
    }


def _ended(result: Mapping[str, Any] | None) -> dict[str, Any]:
    """The curves of a method's runs that did not diverge and were validated, by seed."""
    if result is None:
        return {}
    return {
        seed: curve
        for seed, curve in result["curves"].items()
        if int(seed) not in result["failed"] and curve["forward_passes"]
    }


def scores(task: Task, runs: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The task's score by seed; runs that diverged have none."""
    return {run["seed"]: run["evaluation"][task.score] for run in runs if not run["failed"]}


def gradient(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Variance of the batch gradient by checkpoint, over all groups of the measured runs.

    Batches have equally many forward passes. ``total`` is over rows, levels and masks; ``noise``
    over levels and masks with the rows fixed; ``reference`` the total of the baseline at the same
    parameters. Each is None or has ``mean``, ``standard_error``, ``settled`` (in all runs) and
    ``groups`` by seed. ``over_reference`` is the ratio of total to reference, ``noise_to_signal``
    the total over the squared norm of the mean gradient, None where that is not positive.
    """
    measured = {run["seed"]: run["gradient"] for run in runs if run["gradient"]}
    points_by_step = []
    for number in range(min(map(len, measured.values()), default=0)):
        points = {seed: each[number] for seed, each in measured.items()}
        step = next(iter(points.values()))["step"]
        point = {
            "step": step,
            "forward_passes": step * runs[0]["batch_size"] * runs[0]["views"],
        }
        for name in ("total", "noise", "reference"):
            parts = {seed: p[name] for seed, p in points.items() if p[name]}
            groups = {str(seed): part["group_variances"] for seed, part in parts.items()}
            point[name] = None
            if groups:
                joined = np.concatenate(list(groups.values()))
                point[name] = {
                    "mean": float(joined.mean()),
                    "standard_error": finite_or_none(standard_error_of_mean(joined)),
                    "settled": all(not part["unsettled"] for part in parts.values()),
                    "groups": groups,
                }
        signal = np.mean([p["total"]["signal"] for p in points.values()])
        point["noise_to_signal"] = point["total"]["mean"] / signal if signal > 0 else None
        point["over_reference"] = _ratio(point["total"], point["reference"])
        points_by_step.append(point)
    return points_by_step


def count(suite: Suite, root: pathlib.Path) -> tuple[int, int]:
    """Finished and planned runs."""
    runs = study_runs.plan(suite)
    return sum(study_runs.read_record(root, run) is not None for run in runs), len(runs)


def progress(suite: Suite, root: pathlib.Path) -> str:
    """Finished and planned runs by task and method, for the terminal."""
    runs, names = study_runs.plan(suite), {**suite.pretrainings, **suite.tasks}
    rows = [["", *names]]
    for method in dict.fromkeys(run.method for run in runs):
        row = [method]
        for task in names:
            planned = [run for run in runs if (run.task, run.method) == (task, method)]
            done = sum(study_runs.read_record(root, run) is not None for run in planned)
            row.append(f"{done}/{len(planned)}" if planned else "")
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
    finished, total = count(suite, root)
    return "\n".join([*lines, f"{finished} of {total} runs are finished"])


def line(suite: Suite, run: Run, record: Mapping[str, Any], done: int, total: int, left: float):
    """One finished run, for the terminal; ``left`` in seconds."""
    task = {**suite.pretrainings, **suite.tasks}[run.task]
    ended = "diverged" if record["failed"] else f"{task.score} {_field(record, task.score):.4f}"
    return (
        f"[{done}/{total}] {run.name}: {ended}, trained {record['training_seconds']:.0f} s; "
        f"about {left / 60:.0f} min left"
    )


def markdown(suite: Suite, record: Mapping[str, Any]) -> str:
    """All tables."""
    made = record["provenance"]
    parts = [
        f"{record['finished']} of {record['planned']} runs finished; {len(suite.seeds)} seeds; "
        f"jax {made['packages']['jax']}, {made['platform']}; runs by revision: "
        + ", ".join(f"{count} of {name[:12]}" for name, count in record["revisions"].items())
        + "."
    ]
    for budget, results in record["results"].items():
        parts.append(f"## Mean ± standard deviation over seeds, {BUDGETS[budget]}")
        parts.append(_overview(suite, results))
        for task in suite.tasks:
            parts.append(f"### {task}, {BUDGETS[budget]}")
            parts.append(_details(suite, results[task]))
    notes = [f"* **{m.label}**: {m.note}." for m in suite.methods.values() if m.note]
    return "\n\n".join([*parts, "\n".join(notes)]) + "\n"


def _overview(suite: Suite, results: Mapping[str, Any]) -> str:
    heads = [
        f"{name} ({task.score.replace('_', ' ')}, {'up' if task.higher_is_better else 'down'})"
        for name, task in suite.tasks.items()
    ]
    rows = [
        [method.label, *(_spread(results[task][name]) for task in suite.tasks)]
        for name, method in suite.methods.items()
    ]
    return markdown_table(["method", *heads], rows)


def _details(suite: Suite, results: Mapping[str, Any]) -> str:
    head = ["method", "mean ± s.d.", "worst seed", "against the baseline (95 %)"]
    head += ["in standard errors", "p of signs", "p (Holm)", "worst beats best baseline"]
    head += ["bits per unit", "variance ÷ baseline's", "at same θ", "noise ÷ baseline's"]
    head += ["noise to signal", "passes to the baseline's last bound", "passes", "seconds"]
    rows = []
    for name, method in suite.methods.items():
        r = results[name]
        if r is None:
            rows.append([method.label, "not yet run", *[""] * (len(head) - 2)])
            continue
        last = r["gradient"][-1] if r["gradient"] else {}
        paired = r["against_baseline"]
        rows.append(
            [
                method.label + (f" ({len(r['failed'])} diverged)" if r["failed"] else ""),
                format_spread(r),
                format_number(r["worst"]),
                format_difference(paired),
                _standard_errors(paired),
                format_number(paired and paired["sign_flips"]),
                format_number(paired and paired["holm_p"]),
                {True: "yes", False: "no", None: ""}[r["worst_beats_best_of_baseline"]],
                format_number(r["bits_per_unit"]),
                _measured(r["total_over_baseline"]),
                _measured(last.get("over_reference")),
                _measured(r["noise_over_baseline"]),
                format_number(last.get("noise_to_signal")) + _star(last.get("total")),
                _share(r.get("share_of_passes")),
                f"{r['forward_passes']:,}",
                f"{r['training_seconds']:.0f}",
            ]
        )
    return markdown_table(head, rows)


def _spread(result: Mapping[str, Any] | None) -> str:
    return "not yet run" if result is None else format_spread(result)


def _standard_errors(paired: Mapping[str, Any] | None) -> str:
    if paired is None or not paired["standard_error"]:
        return ""
    return f"{paired['mean'] / paired['standard_error']:+.1f}"


def _share(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return ""
    if share["mean"] is None:
        reached = [value for value in share["by_seed"].values() if value is not None]
        return f"reached by {len(reached)} of {len(share['by_seed'])} seeds"
    error = share["standard_error"]
    bound = "at most " if share["at_most"] else ""
    return f"{bound}{share['mean']:.0%}" + (f" ± {error:.0%}" if error else "")


def _measured(ratio: Mapping[str, Any] | None) -> str:
    if ratio is None:
        return ""
    error = ratio["standard_error"]
    return format_number(ratio["ratio"]) + (f" ± {error:.2g}" if error else "") + _star(ratio)


def _star(estimate: Mapping[str, Any] | None) -> str:
    return "" if estimate is None or estimate["settled"] else "*"


def _over(
    name: str, result: Mapping[str, Any] | None, baseline: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Ratio of the variances at the last checkpoints."""
    if not (result and baseline and result["gradient"] and baseline["gradient"]):
        return None
    return _ratio(*(each["gradient"][-1][name] for each in (result, baseline)))


def _ratio(
    above: Mapping[str, Any] | None, below: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Ratio of two variances, with its standard error to first order, paired by group."""
    seeds = [seed for seed in above["groups"] if seed in below["groups"]] if above and below else []
    if not seeds:
        return None
    parts = [np.concatenate([each["groups"][seed] for seed in seeds]) for each in (above, below)]
    if parts[1].sum() <= 0:
        return None
    error = standard_error_of_ratio(*parts) if len(parts[0]) == len(parts[1]) else np.nan
    return {
        "ratio": float(parts[0].mean() / parts[1].mean()),
        "standard_error": finite_or_none(error),
        "settled": above["settled"] and below["settled"],
    }


def _field(run: Mapping[str, Any], name: str) -> float | None:
    return None if run["failed"] else run["evaluation"][name]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
