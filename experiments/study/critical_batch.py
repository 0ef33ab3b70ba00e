"""Whether doubling the batch halves the steps: training runs at several batch sizes.

    python -m experiments.study.critical_batch --workdir=runs/critical_batch
    python -m experiments.study.critical_batch --results=critical_batch --workdir=runs/kept

The task ``text`` of the study at batches of 4 to 64 passes. The learning rate is constant after the
warm-up, ``0.02 sqrt(batch / 16)`` times ``--factors`` (0.02: suite ``tune``); warm-up and average
of the parameters span 640 passes each, whatever the batch. Counted are the optimiser steps until
the validation bound of the averaged parameters first falls below a target, interpolated between
evaluations on the same rows and masks for every run. Fitted by relative errors, seed by seed:

    steps(batch) = S_min (1 + B / batch)        (McCandlish et al. 2018)

B is the critical batch in passes: there the steps are twice their minimum. A run is a file of what
came out, its settings, its target and its provenance; finished ones are skipped, those of other
settings or an easier target refused; Ctrl-C loses the run at hand. ``--results`` reads the kept
file instead. Either way ``--methods``, ``--batches``, ``--seeds`` and ``--factors`` choose.
"""

import argparse
import contextlib
import json
import math
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy.optimize import least_squares

from experiments.study import runs as study_runs
from experiments.study.suites import SUITES
from experiments.study.table import RESULTS
from mdm_jax import plots, rng, training
from mdm_jax.estimates import mean_estimate
from mdm_jax.evaluation.seeds import markdown_table
from mdm_jax.launch import command_line
from mdm_jax.launch.build import Experiment, make_experiment
from mdm_jax.launch.workdir import WorkdirError, differences, provenance, resolved, write_json

SUITE = SUITES["confirmation"]
METHODS = tuple(SUITE.methods)
BATCHES = (4, 8, 16, 32, 64)
TARGETS = {"masked": (3.5, 3.35, 3.2), "autoregressive": (2.6, 2.4, 2.2)}
"""Bits per character, of the masked methods and of the autoregressive model."""
SPAN = 640
"""Passes of the warm-up, and of the average of the parameters."""
MOST = 32_000
"""Passes after which a run ends without having reached its targets."""
SPACING = 1.15
"""Ratio of the steps of two evaluations, the first after 2 SPAN passes."""
ROWS, PASSES = 128, 4
"""Validation rows and forward passes of each."""


def targets(method: str) -> tuple[float, ...]:
    """Bits per character that a method's runs are to reach, decreasing."""
    return TARGETS["autoregressive" if method == "autoregressive" else "masked"]


def configured(method: str, batch: int, seed: int, factor: float) -> Experiment:
    """The run of the study's suite at another batch and a constant learning rate."""
    run = study_runs.Run("text", method, "passes", seed)
    config = study_runs.configure(SUITE, run, pathlib.Path())
    c = config.optimizer
    c.update(peak=factor * 0.02 * math.sqrt(batch / 16), final_fraction=1.0)
    c.update(warmup_steps=SPAN // batch, ema_decay=1 - batch / SPAN)
    config.train.update(steps=MOST // batch, batch_size=batch, monitors=(), num_microbatches=1)
    config.evaluate.update(batch_size=ROWS, passes=PASSES, replicates=1, max_rows=ROWS)
    return make_experiment(config)


def evaluation_steps(batch: int) -> list[int]:
    """Steps after which the bound is evaluated: a geometric sequence, as whole numbers."""
    count = math.ceil(math.log(MOST / (2 * SPAN), SPACING)) + 1
    return sorted({round(2 * SPAN / batch * SPACING**i) for i in range(count)} - {0})


def train(
    experiment: Experiment, step: Callable[..., Any], bound: Callable[..., float], lowest: float
) -> list[tuple[int, float]]:
    """(step, bits per character of the averaged parameters) until ``lowest`` is reached."""
    curve, due = [], evaluation_steps(experiment.spec.batch_size)
    state = experiment.initial_state()
    with contextlib.closing(experiment.train_batches()) as batches:
        for number in range(1, due[-1] + 1):
            state, _ = step(state, next(batches), *experiment.constants)
            if number in due:
                curve.append((number, bound(training.averaged(state))))
                if not curve[-1][1] > lowest:  # or it is not a number
                    break
    return curve


def crossing(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Steps to the target: bits are linear in log steps between evaluations; None: not reached."""
    for (before, high), (after, low) in zip(curve, curve[1:]):
        if low <= target < high:
            share = (high - target) / (high - low)
            return float(before * (after / before) ** share)
    return None


def fit(steps: Mapping[int, float]) -> tuple[float, float, float] | None:
    """(S_min, B, standard error of log B) of steps by batch, by least squares of the logarithms.

    The error is of the deviations from the law, which it takes as independent. B is sought from a
    tenth of the least batch to ten times the largest; None where the best one is an end of that.
    """
    batches = np.array([*steps], float)
    logs = np.log(np.array([*steps.values()]))
    ends = np.log([batches.min() / 10, batches.max() * 10])

    def residuals(parameters: np.ndarray) -> np.ndarray:
        least, critical = parameters
        return least + np.log1p(np.exp(critical) / batches) - logs

    start = np.array([logs.min() - 0.5, np.log(np.median(batches))])
    bounds = [-np.inf, ends[0]], [np.inf, ends[1]]
    found = least_squares(residuals, start, bounds=bounds, xtol=1e-12, ftol=1e-12)
    if np.min(np.abs(found.x[1] - ends)) < 1e-3:
        return None
    noise = np.sum(found.fun**2) / (len(batches) - 2)
    error = np.sqrt(noise * np.linalg.inv(found.jac.T @ found.jac)[1, 1])
    return float(np.exp(found.x[0])), float(np.exp(found.x[1])), float(error)


def summarise(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Steps by batch and seed and the fitted law, for every method, factor and target."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["method"], record["factor"]), []).append(record)
    found = []
    for (method, factor), group in groups.items():
        for target in targets(method):
            steps: dict[int, dict[int, float | None]] = {}
            for each in sorted(group, key=lambda r: (r["batch"], r["seed"])):
                reached = crossing(each["curve"], target)
                steps.setdefault(each["seed"], {})[each["batch"]] = reached
            whole = [own for own in steps.values() if len(own) > 2 and None not in own.values()]
            every = [fit(own) for own in whole]
            fits = np.array([one for one in every if one is not None])
            entry = {"method": method, "factor": factor, "target": target, "steps": steps}
            if len(fits) and len(fits) == len(every):
                residuals = [
                    np.log(own[b] / (least * (1 + critical / b)))
                    for own, (least, critical, _) in zip(whole, fits)
                    for b in own
                ]
                entry["least_steps"] = mean_estimate(fits[:, 0])
                entry["critical_batch"] = mean_estimate(fits[:, 1])
                entry["log_error"] = float(np.sqrt(np.mean(np.square(fits[:, 2]))))
                entry["residual"] = float(np.sqrt(np.mean(np.square(residuals))))
                entry["without"] = {left: _without(whole, left) for left in whole[0]}
            found.append(entry)
    return found


def _without(whole: Sequence[Mapping[int, float]], left: int) -> float | None:
    """Mean of B over seeds by all batches but one; None if it is unknown."""
    parts = [{batch: steps for batch, steps in own.items() if batch != left} for own in whole]
    fits = [fit(own) if len(own) > 2 else None for own in parts]
    return None if None in fits else float(np.mean([one[1] for one in fits if one]))


def table_without(found: Sequence[Mapping[str, Any]]) -> str:
    """B by all batches but one, a row for each method and target."""
    fitted = [entry for entry in found if "without" in entry]
    batches = sorted({batch for entry in fitted for batch in entry["without"]})
    rows = []
    for entry in fitted:
        each = (entry["without"].get(batch) for batch in batches)
        cells = ["-" if critical is None else f"{critical:.0f}" for critical in each]
        rows.append([_name(entry), f"{entry['target']:g}", *cells])
    return markdown_table(["method", "target", *(f"without {b}" for b in batches)], rows)


def _name(entry: Mapping[str, Any]) -> str:
    rate = "" if entry["factor"] == 1 else f", rate × {entry['factor']:g}"
    return SUITE.methods[entry["method"]].label + rate


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """A row for each method and target: mean steps by batch, S_min and B over seeds, the factor
    by which a seed's B may be off by its deviations from the law, and the size of these."""
    batches = sorted({b for entry in found for own in entry["steps"].values() for b in own})
    rows = []
    for entry in found:
        cells = []
        for batch in batches:
            each = [own.get(batch) for own in entry["steps"].values()]
            known = [steps for steps in each if steps is not None]
            cells.append(f"{np.mean(known):.0f}" if known and None not in each else "-")
        fitted = ["-"] * 4
        if "critical_batch" in entry:
            fitted = [_estimate(entry["least_steps"]), _estimate(entry["critical_batch"])]
            fitted.append(f"{math.exp(entry['log_error']):.2f}")
            fitted.append(f"{100 * entry['residual']:.0f} %")
        rows.append([_name(entry), f"{entry['target']:g}", *cells, *fitted])
    names = [f"{batch}" for batch in batches]
    heads = ["S_min", "B", "error of B, a factor", "deviation from the law"]
    return markdown_table(["method", "target", *names, *heads], rows)


def _estimate(estimate: Sequence[float]) -> str:
    value, error = estimate
    return f"{value:.0f}" if math.isnan(error) else f"{value:.0f} ± {error:.0f}"


def draw(found: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Steps over the batch at every method's last target, and the fitted law."""
    figure = plots.new_figure((6.4, 4.0))
    axes, last = figure.subplots(), {}
    for entry in found:
        if entry["factor"] == 1 and "critical_batch" in entry:
            last[entry["method"]] = entry
    for number, (method, entry) in enumerate(last.items()):
        style, least = plots.line(number), entry["least_steps"][0]
        for own in entry["steps"].values():
            relative = np.array([*own.values()]) / least
            axes.plot([*own], relative, "o", color=style["color"], alpha=0.7, markersize=4)
        batches = np.geomspace(min(BATCHES), max(BATCHES), 64)
        label = f"{SUITE.methods[method].label}: B = {_estimate(entry['critical_batch'])}"
        axes.plot(batches, 1 + entry["critical_batch"][0] / batches, label=label, **style)
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axes.set_yticks([2, 5, 10, 20, 40], ["2", "5", "10", "20", "40"])
    axes.minorticks_off()
    title = "text: steps to the target over their minimum"
    plots.dress(axes, title, "batch, passes", "steps / S_min", columns=1)
    plots.write(figure, path)


def read(root: pathlib.Path) -> list[dict[str, Any]]:
    """Records of the finished runs of a directory."""
    files = sorted((root / "runs").glob("*.json"))
    return [json.loads(file.read_text("utf-8")) for file in files]


def module_provenance(seed: int) -> dict[str, Any]:
    """Of the package, with the command that this module was started by."""
    line = ["python", "-m", "experiments.study.critical_batch", *sys.argv[1:]]
    return provenance(seed) | {"command": shlex.join(line)}


def check(path: pathlib.Path, settings: Mapping[str, Any], target: float) -> None:
    """Refuse a finished run that was made under other settings, or to an easier target.

    Raises:
        WorkdirError: naming what differs.
    """
    record = json.loads(path.read_text("utf-8"))
    if "settings" not in record:
        raise WorkdirError(f"{path} does not say how it was made; name another --workdir")
    changed = differences(record["settings"], settings)
    if record["target"] > target:
        changed.append(f"target: {record['target']} -> {target}")
    if changed:
        raise WorkdirError(
            f"{path} was made under other settings:\n  "
            + "\n  ".join(changed)
            + "\nName another --workdir, restore these settings, or remove this file."
        )


def run_all(
    root: pathlib.Path,
    wanted: Sequence[tuple[str, int, float]],
    seeds: Sequence[int],
    number: int,
) -> None:
    """Train what is not finished to the first ``number`` targets; seeds share a program.

    Raises:
        WorkdirError: if what is finished was made under other settings.
    """
    bounds: dict[bool, Any] = {}
    for method, batch, factor in wanted:
        step = None
        for seed in seeds:
            path = root / "runs" / f"{method}-{batch}-{seed}-{factor:g}.json"
            experiment = configured(method, batch, seed, factor)
            settings, target = resolved(experiment.config), targets(method)[number - 1]
            if path.exists():
                check(path, settings, target)
                continue
            if step is None:
                step = jax.jit(experiment.step, donate_argnums=0)
            causal = method == "autoregressive"
            if causal not in bounds:
                bounds[causal] = (
                    experiment,
                    list(experiment.batches(experiment.dataset.valid, ROWS)),
                )
            judge, rows = bounds[causal]

            def bound(params: Any, judge=judge, rows=rows) -> float:
                key = rng.stream(jax.random.key(0), "critical batch")
                return judge.family.record(judge.validate(params, key, rows))["bits_per_unit"]

            started = time.process_time()
            made = module_provenance(seed)
            curve = train(experiment, step, bound, target)
            record = {"method": method, "batch": batch, "seed": seed, "factor": factor}
            record |= {"peak": experiment.config.optimizer.peak, "curve": curve}
            record |= {"target": target, "settings": settings, "provenance": made}
            record["cpu_seconds"] = round(time.process_time() - started, 1)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, record)
            last = f"step {curve[-1][0]}, {curve[-1][1]:.3f} bits"
            print(f"{path.stem}: {last}, {record['cpu_seconds']:.0f} s of CPU", flush=True)


def main() -> int:
    """Train, print the table, write ``critical_batch.json`` and ``critical_batch.png``."""
    parser = argparse.ArgumentParser("experiments.study.critical_batch", allow_abbrev=False)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--results", default="", choices=["", "critical_batch"], help="kept ones")
    parser.add_argument("--methods", default=",".join(METHODS), help="separated by commas")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="likewise")
    parser.add_argument("--seeds", default="0,1", help="likewise")
    parser.add_argument("--factors", default="1", help="of the learning rate, likewise")
    parser.add_argument("--targets", type=int, default=3, choices=(1, 2, 3), help="to be reached")
    given = parser.parse_args()
    methods = given.methods.split(",")
    if unknown := sorted(set(methods) - set(METHODS)):
        parser.error(f"--methods: {unknown} are not among {[*METHODS]}")
    batches, seeds = ([int(n) for n in text.split(",")] for text in (given.batches, given.seeds))
    factors = [float(n) for n in given.factors.split(",")]
    try:
        given.workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--workdir: {error}")
    if given.results:
        kept = json.loads((RESULTS / f"{given.results}.json").read_text("utf-8"))
        made, records = kept["provenance"], kept["runs"]
    else:
        command_line.use_compilation_cache(None)
        wanted = [(m, b, f) for f in factors for b in batches for m in methods]
        try:
            run_all(given.workdir, wanted, seeds, given.targets)
        except WorkdirError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        made, records = module_provenance(seeds[0]), read(given.workdir)
    allowed = {"method": methods, "batch": batches, "seed": seeds, "factor": factors}
    records = [r for r in records if all(r[name] in among for name, among in allowed.items())]
    found = summarise(records)
    if not found:
        print(f"error: no such run in {given.results or given.workdir}", file=sys.stderr)
        return 2
    print(f"steps to the target, means over seeds:\n\n{table(found)}\n")
    print(f"B by all batches but one:\n\n{table_without(found)}\n")
    write_json(given.workdir / "critical_batch.json", {"provenance": made, "runs": records})
    draw(found, given.workdir / "critical_batch.png")
    print(f"written to {given.workdir / 'critical_batch.json'} and critical_batch.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
