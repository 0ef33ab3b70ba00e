"""Adaptive noise levels: mechanisms side by side on one Gaussian and one masked run.

    python -m experiments.adaptive --workdir=runs/adaptive [--runs=digits,text] [--seeds=0,1]
                                   [--mechanisms=ema_bins,cdcd_warp]

Runs differ in what sets their noise levels and weights alone; those of one seed have the same
initial parameters, data and order. ``static`` is the recipe, beside which the others are set; it is
always run. Stopped runs resume, and finished ones are not repeated. In the workdir:

* ``adaptive.md``, ``adaptive.json``: a table per run. A mechanism is described by the four axes of
  Dieleman's "Noise schedules considered harmful": its aim, how it tracks the loss, what it takes as
  the importance of a level, and how that is used. Beside them noise over signal of the batch
  gradient (variance with the data fixed over the squared mean), at the parameters that ``static``
  ends with, where the mechanism has learned for ``measure.warm_up`` batches first, and at the
  mechanism's own last ones; and the results on held-out rows;
* ``digits.gif``, ``text.gif``: the density of the levels that are drawn and the effective
  weighting (``meter.effective_weighting``) of all mechanisms over the training of the first seed;
* ``weightings.png``: their last frames.
"""

import argparse
import functools
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from experiments.study.gradient_noise import checkpoints_along, drawn_batches
from mdm_jax import meter, plots, rng
from mdm_jax.data.tokenizers import printable
from mdm_jax.estimates import mean_estimate, standard_error_of_ratio
from mdm_jax.launch import command_line, presets
from mdm_jax.launch.build import Experiment, load_parameters, make_experiment, read_parameters
from mdm_jax.launch.modes import evaluate, train
from mdm_jax.launch.modes import measure as measuring
from mdm_jax.launch.spacing.problem import make_samples
from mdm_jax.launch.workdir import WorkdirError, saved_config, write_json
from mdm_jax.schedules.coordinates import logsnr_from_masking_rate
from mdm_jax.training.checkpoints import CheckpointError
from mdm_jax.training.loop import TrainingStopped
from mdm_jax.types import PyTree

STATIC = "static"
FRAMES = 16
"""Checkpoints of a run, evenly spaced."""
REPLICATES = 4
"""Sets of samples for the distance."""


class Mechanism(NamedTuple):
    """The four axes, in words, and the settings by run that make it; None: not made for the run."""

    aim: str
    tracking: str
    importance: str
    use: str
    digits: Mapping[str, Any] | None
    text: Mapping[str, Any] | None


def _learned(name: str, aim: str, tracking: str, importance: str, use: str) -> Mechanism:
    changes = {"variance.order": ("stratified", name)}
    return Mechanism(aim, tracking, importance, use, changes, changes)


_EXACT, _LAW, _WEIGHT = "law, paid for by the weight", "law alone", "weight alone"
_VARIANCE, _FIXED = "less variance of the loss", "none: fixed"

MECHANISMS = {
    STATIC: Mechanism("as published", _FIXED, "the recipe's", "law and weight", {}, {}),
    "ema_bins": _learned(
        "ema_bins", _VARIANCE, "running means, 25 equal bins", "mean loss", _EXACT
    ),
    "loss_history": _learned(
        "loss_history", _VARIANCE, "10 latest losses, 32 equal bins", "root mean square", _EXACT
    ),
    "learned_quantile": _learned(
        "learned_quantile", _VARIANCE, "monotone network", "gradient of the variance", _EXACT
    ),
    "ppots": _learned(
        "ppots", _VARIANCE, "running moments, 32 log-spaced bins", "root mean square", _EXACT
    ),
    "uncertainty_weighting": _learned(
        "uncertainty_weighting", "equal losses", "Fourier features", "1 / mean loss", _WEIGHT
    ),
    "cdcd_warp": _learned(
        "cdcd_warp", "equal rise of the loss", "curve of 100 cells", "slope of the loss", _LAW
    ),
    "beta_time": Mechanism(
        "faster training",
        _FIXED,
        "chosen by hand",
        _LAW,
        {"gaussian.modifiers": ("beta_time",), "gaussian.weighting": "unit_output"},
        {"law.name": "beta", "weighting.name": "law"},
    ),
    "two_rates": Mechanism(
        "faster training",
        _FIXED,
        "where sigma settles, by hand",
        _LAW,
        {"gaussian.modifiers": ("two_rates",), "gaussian.weighting": "unit_output"},
        None,
    ),
}
"""Names are those of the settings.

``cdtd_warp`` with one level a row is ``cdcd_warp``. ``two_rates`` is the law of SpeeD, whose rule
finds no boundary under EDM's law: sigma never settles as its time goes on. Masked runs take no
modifiers of laws.
"""

_SHORT = {
    "variance.ema_bins.num_bins": 25,
    "variance.ema_bins.warmup_steps": 20,
    "variance.ppots.warmup_steps": 20,
    "train.monitors": (),
    "train.evaluate_every": 0,
    "panel.cost": 0.0,
    "optimizer.name": "adamw",  # compiles in half the time
}
"""Settings of all runs, which are short."""
_SMALL = {
    "model.width": 64,
    "model.depth": 2,
    "train.steps": 400,
    "optimizer.peak": 5e-3,
    "optimizer.warmup_steps": 20,
    "optimizer.ema_decay": 0.98,
    "measure.warm_up": 150,
    "measure.redraws": 8,
    "evaluate.max_rows": 128,
    "evaluate.final_passes": 16,
    "evaluate.final_replicates": 2,
}
RUNS = {
    "digits": ("digits_gaussian:edm", _SMALL | {"sample.num_steps": 16}),
    "text": ("quickstart:char", _SMALL | {"train.batch_size": 16}),
}
"""Config and settings of each run."""


class Curves(NamedTuple):
    """Densities over ``levels`` [N] after ``steps`` [T]: of draws and of the loss, [T, N] each.

    Levels are logSNR, or for masked runs masking rates.
    """

    steps: np.ndarray
    levels: np.ndarray
    drawn: np.ndarray
    weighting: np.ndarray


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, measures, draws, and prints the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description="Adaptive noise levels, side by side.")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of all runs")
    parser.add_argument("--runs", default=",".join(RUNS), help="which, with commas")
    parser.add_argument("--mechanisms", default=",".join(MECHANISMS), help="which, with commas")
    parser.add_argument("--seeds", default="0,1", help="of each, with commas")
    parser.add_argument("--smoke", action="store_true", help="tiny networks and a few steps")
    options = parser.parse_args(arguments)
    logging.set_verbosity(logging.WARNING)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    try:
        plan = {run: chosen(run, options.mechanisms.split(",")) for run in options.runs.split(",")}
        records: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for run, names in plan.items():
            records[run] = {name: [] for name in names}
            for seed, name in itertools.product(seeds, names):
                record = finished(run, name, seed, options.workdir / run, options.smoke)
                if record is None:
                    print(f"stopped and saved in {options.workdir}; the same command resumes")
                    return 130
                records[run][name].append(record)
    except (ValueError, OSError, WorkdirError, CheckpointError, TrainingStopped) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    write_json(options.workdir / "adaptive.json", records)
    text = "\n".join(table(run, found) for run, found in records.items())
    (options.workdir / "adaptive.md").write_text(text, "utf-8")
    draw(records, options.workdir)
    print(text)
    return 0


def chosen(run: str, names: Sequence[str]) -> list[str]:
    """Those of the mechanisms that the run can have, ``static`` first; ValueError for others."""
    for known, given in ((RUNS, [run]), (MECHANISMS, names)):
        if wrong := [name for name in given if name not in known]:
            raise ValueError(f"{wrong[0]!r} is none of {', '.join(known)}")
    return [n for n in MECHANISMS if n in (STATIC, *names) and _changes(run, n) is not None]


def configure(run: str, name: str, seed: int, smoke: bool = False) -> ConfigDict:
    """The config of a mechanism's run."""
    preset, changes = RUNS[run]
    if smoke:
        config = presets.get_config(f"{preset.partition(':')[0]}:smoke")
        config.update_from_flattened_dict(_SHORT)
        if run == "digits":
            config.gaussian.recipe = "edm"
    else:
        config = presets.get_config(preset)
        config.update_from_flattened_dict(_SHORT | changes)
    config.variance.order = ("stratified",)
    config.update_from_flattened_dict(_changes(run, name))
    config.train.checkpoint_every = max(config.train.steps // FRAMES, 1)
    config.train.keep_last = FRAMES + 1
    config.seed = seed
    return config


def finished(
    run: str, name: str, seed: int, directory: pathlib.Path, smoke: bool
) -> dict[str, Any] | None:
    """The record of a run of a seed, trained and measured unless it is there; None if stopped.

    The run of ``static`` with that seed, whose parameters are shared, must be finished.
    """
    workdir, path = (directory / f"{each}-{seed}" for each in (name, STATIC))
    config = configure(run, name, seed, smoke)
    if (workdir / "record.json").exists():
        if (steps := saved_config(workdir).train.steps) != config.train.steps:
            raise WorkdirError(
                f"{workdir} holds a run of {steps} steps, not of {config.train.steps}; --smoke "
                "needs a --workdir of its own"
            )
        return json.loads((workdir / "record.json").read_text("utf-8"))
    experiment = make_experiment(config)
    print(f"--- {run}, {name}, seed {seed}\n{experiment.describe()}", flush=True)
    if not train.train(experiment, workdir):
        return None
    shared = None if name == STATIC else parameters_of_static(run, seed, path, smoke)
    record = measure(experiment, workdir, shared)
    write_json(workdir / "record.json", record)
    return record


@functools.lru_cache(maxsize=1)
def parameters_of_static(run: str, seed: int, workdir: pathlib.Path, smoke: bool) -> PyTree:
    """The parameters that the finished run of ``static`` ended with."""
    experiment = make_experiment(configure(run, STATIC, seed, smoke))
    return read_parameters(workdir, experiment.abstract_state(), last=True)[1]


def measure(experiment: Experiment, workdir: pathlib.Path, shared: PyTree | None) -> dict[str, Any]:
    """The figures of a finished run; ``shared``: parameters of ``static``, None: this run's own."""
    result = evaluate.evaluate(experiment, workdir)
    _, step, params, state = measuring.parameters(experiment, workdir)
    estimator = meter.make_estimator(experiment.apply_fn, experiment.objective)
    own = gradient_noise(experiment, estimator, params, state)
    other = own
    if shared is not None:
        other = gradient_noise(experiment, estimator, shared, warmed_up(experiment, shared))
    return {
        "step": step,
        "bits_per_unit": result["bits_per_unit"],
        "bits_per_unit_error": result["standard_error_bits_per_unit"],
        "distance": distance(experiment, workdir),
        "noise_at_shared_parameters": other,
        "noise_at_own_parameters": own,
        "curves": {k: v.tolist() for k, v in curves(experiment, workdir)._asdict().items()},
    }


def warmed_up(experiment: Experiment, params: PyTree) -> PyTree:
    """The state that the transform comes to at fixed parameters."""
    batches = drawn_batches(experiment, 8, seed=1)
    count = experiment.config.measure.warm_up
    return meter.warm_up(
        experiment.apply_fn,
        experiment.objective,
        experiment.transform,
        experiment.spec,
        params,
        experiment.transform.init(experiment.spec),
        itertools.islice(itertools.cycle(batches), count),
        experiment.key(0, "warm-up"),
    )


def gradient_noise(
    experiment: Experiment, estimator: meter.Estimator, params: PyTree, state: PyTree
) -> dict[str, Any]:
    """Variance of the batch gradient with the data fixed, and its squared mean, by group."""
    c = experiment.config.measure
    figure = meter.efficiency(
        meter.Subject(estimator, params, experiment.transform, state, experiment.spec),
        drawn_batches(experiment, c.data_batches, seed=0),
        experiment.key(0, "efficiency"),
        groups=c.groups,
        redraws=c.redraws,
    )
    lost = "" if figure.signal > 0 else "the mean gradient is lost in the noise"
    return {
        "variances": figure.group_variances.tolist(),
        "signals": figure.group_signals.tolist(),
        "unsettled": figure.unsettled or lost,
    }


def distance(experiment: Experiment, workdir: pathlib.Path) -> dict[str, float] | None:
    """Frechet distance of samples from held-out pictures, a mean over sets; None of texts."""
    if experiment.dataset.tokenizer is not None:
        return None
    c = experiment.config.sample
    _, params = load_parameters(experiment, workdir)
    samples, levels = make_samples(experiment, params), experiment.family.levels("", c.num_steps)
    key = experiment.key(0, "distance")
    each = [
        samples.distance(samples.draw(levels, rng.stream(key, f"set {i}")))
        for i in range(REPLICATES)
    ]
    value, error = mean_estimate(np.array(each))
    return {"value": value, "standard_error": error, "of_data": samples.reference}


def curves(experiment: Experiment, workdir: pathlib.Path) -> Curves:
    """Densities at the start and at every checkpoint."""
    gaussian, g = experiment.config.process == "gaussian", experiment.config.gaussian
    levels = np.linspace(g.low, g.high, 129) if gaussian else np.linspace(0.005, 0.995, 100)
    logsnr = levels if gaussian else np.asarray(logsnr_from_masking_rate(levels))
    # A masking rate changes by m (1 - m) for a unit of logSNR.
    unit = np.ones_like(levels) if gaussian else levels * (1 - levels)

    @jax.jit
    def densities(state: PyTree) -> meter.LevelWeighting:
        return meter.effective_weighting(
            experiment.objective,
            experiment.transform,
            state,
            logsnr,
            experiment.spec.num_levels,
        )

    def states() -> Iterator[tuple[int, PyTree]]:
        yield 0, experiment.transform.init(experiment.spec)
        for step, _params, state in checkpoints_along(experiment, workdir):
            yield step, state

    steps, found = zip(*((step, densities(state)) for step, state in states()))
    drawn, weighting = (np.stack([np.asarray(a) / unit for a in each]) for each in zip(*found))
    return Curves(np.array(steps), levels, drawn, weighting)


# --- tables and pictures --------------------------------------------------------------------------


def table(run: str, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Records by mechanism and seed as a Markdown table.

    Results are means over seeds, with the difference from ``static`` over the same seeds in
    brackets. Standard errors, in the header, are of what varies with the seed: pooled over
    mechanisms, as two or three seeds of one say little. Of one seed they are Monte Carlo errors.
    """
    unit = "bits/dim" if run == "digits" else "bits/character"
    results = {unit: _estimates(records, lambda r: (r["bits_per_unit"], r["bits_per_unit_error"]))}
    if records[STATIC][0]["distance"] is not None:
        of_data = records[STATIC][0]["distance"]["of_data"]
        results[f"distance of pictures ({of_data:.3f} of training pictures)"] = _estimates(
            records, lambda r: (r["distance"]["value"], r["distance"]["standard_error"])
        )
    header = ["mechanism", "aim", "tracking", "importance", "use"]
    header += ["noise/signal, same parameters", "noise/signal, own end"]
    cells = {
        name: [
            name,
            *MECHANISMS[name][:4],
            _noise(_noises(seeds, "shared"), _noises(records[STATIC], "shared"))
            if name != STATIC
            else _noise(_noises(seeds, "shared")),
            _noise(_noises(seeds, "own")),
        ]
        for name, seeds in records.items()
    }
    for title, scores in results.items():
        base = scores[STATIC]
        gains = {name: own - base for name, own in scores.items() if name != STATIC}
        header.append(f"{title} ({_errors(scores, gains)})")
        for name, own in scores.items():
            gain = "" if name == STATIC else f" ({gains[name][:, 0].mean():+.3f})"
            cells[name].append(f"{own[:, 0].mean():.3f}{gain}")
    lines = [header, ["---"] * len(header), *cells.values()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _estimates(
    records: Mapping[str, Sequence[Mapping[str, Any]]],
    read: Callable[[Mapping[str, Any]], tuple[float, float]],
) -> dict[str, np.ndarray]:
    """[seeds, 2] values and their Monte Carlo errors, by mechanism."""
    return {name: np.array([read(r) for r in seeds]) for name, seeds in records.items()}


def _errors(scores: Mapping[str, np.ndarray], gains: Mapping[str, np.ndarray]) -> str:
    """Standard errors, for a header, of means over seeds and of differences from ``static``."""
    if len(scores[STATIC]) < 2:
        error = math.sqrt(np.mean([own[0, 1] ** 2 for own in scores.values()]))
        return f"one seed; Monte Carlo error {error:.3f}"
    pooled = [
        math.sqrt(np.mean([own[:, 0].var(ddof=1) / len(own) for own in each.values()]))
        for each in (scores, gains)
        if each
    ]
    return "± " + ", difference ± ".join(f"{error:.3f}" for error in pooled)


def _noises(seeds: Sequence[Mapping[str, Any]], at: str) -> list[Mapping[str, Any]]:
    return [record[f"noise_at_{at}_parameters"] for record in seeds]


def _noise(
    figures: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]] | None = None
) -> str:
    """Noise over signal, a mean over seeds, and its ratio to that of ``others`` if given.

    Errors are from the spread of the meter's groups; those of the ratio, of paired groups, which
    have the same rows and base noise, by the jackknife over them (of its logarithm).
    """
    if any(figure["unsettled"] for figure in (*figures, *(others or ()))):
        return "not settled"
    groups = [np.array([figure["variances"], figure["signals"]]) for figure in figures]
    value = np.mean([variances.sum() / signals.sum() for variances, signals in groups])
    errors = [standard_error_of_ratio(*each) for each in groups]
    text = f"{value:.3g} ± {np.linalg.norm(errors) / len(errors):.1g}"
    if others is None:
        return text
    logs = []
    for own, other in zip(groups, others):
        base = np.array([other["variances"], other["signals"]])
        sums = [each.sum(1)[:, None] - np.c_[np.zeros(2), each] for each in (own, base)]
        logs.append(np.diff(np.log(sums[1]) - np.log(sums[0]), axis=0)[0])
    ratio, count = math.exp(np.mean([each[0] for each in logs])), len(logs[0]) - 1
    errors = [math.sqrt((count - 1) * each[1:].var()) for each in logs]
    return f"{text} (× {ratio:.3g} ± {ratio * np.linalg.norm(errors) / len(errors):.1g})"


def draw(records: Mapping[str, Mapping[str, Any]], workdir: pathlib.Path) -> None:
    """Write a film of each run, and the last frames as one picture."""
    for run, found in records.items():
        shown = {name: _curves_of(seeds[0]) for name, seeds in found.items()}
        steps = shown[STATIC].steps
        figures = (frame(run, shown, t, plots.new_figure((9, 4.2))) for t in range(len(steps)))
        plots.write_film(figures, workdir / f"{run}.gif")
    figure = plots.new_figure((9, 4.2 * len(records)))
    for part, (run, found) in zip(
        np.atleast_1d(figure.subfigures(len(records), 1)), records.items()
    ):
        frame(run, {name: _curves_of(seeds[0]) for name, seeds in found.items()}, -1, part)
    plots.write(figure, workdir / "weightings.png")


def frame(run: str, shown: Mapping[str, Curves], number: int, figure: Any) -> Any:
    """Densities of all mechanisms at checkpoint ``number``; weightings have the integral 1."""
    levels = shown[STATIC].levels
    each = {name: (c.drawn, shares(c)) for name, c in shown.items()}
    tops = tuple(1.05 * max(pair[side].max() for pair in each.values()) for side in (0, 1))
    now = {name: (drawn[number], weighting[number]) for name, (drawn, weighting) in each.items()}
    axis = "logSNR, nats" if run == "digits" else "masking rate"
    when = f", step {shown[STATIC].steps[number]}"
    return plots.weighting_panels(figure, levels, now, axis, tops, when)


def shares(curves: Curves) -> np.ndarray:
    """Weightings [T, N] over their integrals: a common factor is one on the learning rate."""
    mass = np.trapezoid(curves.weighting, curves.levels, axis=-1)
    return curves.weighting / mass[:, None]


def _curves_of(record: Mapping[str, Any]) -> Curves:
    return Curves(**{name: np.array(values) for name, values in record["curves"].items()})


def _changes(run: str, name: str) -> Mapping[str, Any] | None:
    return getattr(MECHANISMS[name], run)


if __name__ == "__main__":
    command_line.use_compilation_cache(None)
    sys.exit(main())
