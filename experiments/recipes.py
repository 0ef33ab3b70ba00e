"""Gaussian diffusion recipes trained side by side, with a table of their results.

    python -m experiments.recipes --workdir=runs/recipes [--steps=1500] [--recipes=vdm,edm]

Every recipe gets the same network, data order, steps and optimiser; only its law, weighting and
output differ (``--config=digits_gaussian:NAME``). Stopped runs resume.
The table, ``recipes.md`` and ``recipes.json`` in the workdir, holds

* the bound in bits per dimension on the test split, by one estimator for all;
* the squared Frechet distance between samples and test pictures in the leading principal
  components of the training pictures, beside the distance of as many training pictures;
* noise of the batch gradient over its signal, with independent levels and with the run's chain: how
  many batches must be averaged until noise equals signal. Gradients of different recipes have
  different scales, so only this ratio can be compared.
"""

import argparse
import math
import pathlib
import sys
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from experiments.study.gradient_noise import drawn_batches
from mdm_jax import data, meter, variance
from mdm_jax.data.tokenizers import printable
from mdm_jax.evaluation import quality as picture_quality
from mdm_jax.gaussian.recipes import RECIPES
from mdm_jax.launch import presets
from mdm_jax.launch.build import Experiment, load_parameters, make_experiment
from mdm_jax.launch.modes import evaluate, train
from mdm_jax.launch.workdir import WorkdirError, write_json
from mdm_jax.training.checkpoints import CheckpointError
from mdm_jax.training.loop import TrainingStopped
from mdm_jax.types import PyTree

COMPONENTS = 16


def main() -> int:
    """Trains, measures, and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Recipes of Gaussian diffusion, side by side.")
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="of all runs")
    parser.add_argument("--recipes", default=",".join(sorted(RECIPES)), help="which, with commas")
    parser.add_argument("--steps", type=int, help="training steps; the config's own if not given")
    parser.add_argument("--samples", type=int, default=512, help="pictures for the distance")
    parser.add_argument("--smoke", action="store_true", help="tiny network and a few steps")
    options = parser.parse_args()
    logging.set_verbosity(logging.WARNING)
    records = {}
    for name in options.recipes.split(","):
        workdir = options.workdir / name
        try:
            experiment = make_experiment(configure(name, options.steps, options.smoke))
            print(f"--- {name}\n{experiment.describe()}", flush=True)
            if not train.train(experiment, workdir):
                print(f"stopped and saved in {workdir}; the same command resumes")
                return 130
            records[name] = measure(experiment, workdir, options.samples)
        except (ValueError, OSError, WorkdirError, CheckpointError, TrainingStopped) as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            return 2
        write_json(options.workdir / "recipes.json", records)
    text = table(records)
    (options.workdir / "recipes.md").write_text(text, "utf-8")
    print(text)
    return 0


def configure(recipe: str, steps: int | None = None, smoke: bool = False) -> ConfigDict:
    """The config of one recipe's run.

    Raises:
        ValueError: if there is no such recipe.
    """
    config = presets.digits_gaussian(recipe)
    if smoke:
        config = presets.digits_gaussian("smoke")
        config.gaussian.recipe = recipe
    if steps is not None:
        config.train.steps = steps
    return config


def measure(experiment: Experiment, workdir: pathlib.Path, samples: int) -> dict[str, Any]:
    """The figures of a finished run in the table."""
    record = evaluate.evaluate(experiment, workdir)
    step, params = load_parameters(experiment, workdir)
    distance, floor = distances(experiment, params, samples)
    chains = {"independent": variance.identity(), "chain": experiment.transform}
    figures = {name: gradient_noise(experiment, params, chain) for name, chain in chains.items()}
    return {
        "step": step,
        "bits_per_dimension": record["bits_per_unit"],
        "standard_error": record["standard_error_bits_per_unit"],
        "distance": distance,
        "distance_of_data": floor,
        "chain": experiment.transform.name,
        "gradient_noise": _over_signal(figures),
    }


def distances(experiment: Experiment, params: PyTree, samples: int) -> tuple[float, float]:
    """Distance to the test pictures of as many samples, and of as many training pictures."""
    top = experiment.dataset.vocab_size - 2
    train, test = (
        _rows(split) / top for split in (experiment.dataset.train, experiment.dataset.test)
    )
    components = min(COMPONENTS, len(train) - 1)
    space = picture_quality.principal_space(train, components)
    canvas = np.full((samples, experiment.dataset.length), experiment.dataset.mask_id, np.int32)
    drawn = experiment.generate(params, experiment.key(0, "distance"), canvas) / top
    held_out = space.project(test)
    some = np.random.default_rng(0).permutation(len(train))[:samples]
    return (
        picture_quality.frechet_distance(space.project(drawn), held_out),
        picture_quality.frechet_distance(space.project(train[some]), held_out),
    )


def gradient_noise(
    experiment: Experiment, params: PyTree, transform: variance.VarianceTransform
) -> meter.Efficiency:
    """Variance of the batch gradient with the data fixed, and its squared mean."""
    batches = drawn_batches(experiment, 8, experiment.config.seed)
    estimator = meter.make_estimator(experiment.apply_fn, experiment.objective)
    state = transform.init(experiment.spec)
    return meter.efficiency(
        meter.Subject(estimator, params, transform, state, experiment.spec),
        batches,
        experiment.key(0, "efficiency"),
        groups=8,
        redraws=12,
    )


def _over_signal(figures: dict[str, meter.Efficiency]) -> dict[str, dict[str, Any]]:
    """Variance times passes over the squared mean gradient, which all exact methods share."""
    signal = float(np.mean([figure.signal for figure in figures.values()]))
    ratios = {}
    for name, figure in figures.items():
        known = figure.settled and signal > 0
        value, error = figure.variance_times_passes if known else (math.nan, math.nan)
        ratios[name] = {
            "value": value / signal if known else None,
            "standard_error": error / signal if known else None,
            "unsettled": figure.unsettled,
        }
    return ratios


def table(records: dict[str, dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    lines = [
        "| recipe | bits/dim | distance (data) | gradient noise/signal | with the chain |",
        "|---|---|---|---|---|",
    ]
    for name, r in records.items():
        noise = [_ratio(r["gradient_noise"][kind]) for kind in ("independent", "chain")]
        error = r["standard_error"]
        lines.append(
            f"| {name} | {r['bits_per_dimension']:.3f}"
            + (f" ± {error:.3f}" if error is not None else "")
            + f" | {r['distance']:.3f} ({r['distance_of_data']:.3f}) | {noise[0]} | {noise[1]} |"
        )
    return "\n".join(lines) + "\n"


def _ratio(noise: dict[str, Any]) -> str:
    if noise["value"] is None or not math.isfinite(noise["value"]):
        return "not settled"
    return f"{noise['value']:.3g} ± {noise['standard_error']:.2g}"


def _rows(source: data.RowSource) -> np.ndarray:
    return np.asarray(data.gather(source, np.arange(len(source))).tokens, np.float64)


if __name__ == "__main__":
    sys.exit(main())
