"""What to expect of a suite before it is run: its power, and its time on one GPU, an estimate."""

import pathlib

import numpy as np
from scipy import optimize, stats

from experiments.published.gpu_time import PEAK
from experiments.study import runs as study_runs
from experiments.study.suites import Suite
from mdm_jax import training
from mdm_jax.launch.build import Experiment, make_experiment
from mdm_jax.launch.processes import parts

SHARE = 0.4
"""Of the peak, assumed."""


def detectable(seeds: int, comparisons: int, level: float = 0.05, power: float = 0.8) -> float:
    """Least mean difference that is found with ``power``, in standard deviations of differences.

    By Student's paired test at ``level / comparisons``, the strictest of Holm's steps. ValueError
    for fewer than two seeds.
    """
    if seeds < 2:
        raise ValueError(f"a test needs at least two seeds, got {seeds}")
    limit = stats.t.ppf(1 - level / comparisons / 2, seeds - 1)

    def missed(size: float) -> float:
        return stats.nct.cdf(limit, seeds - 1, size * np.sqrt(seeds)) - (1 - power)

    return float(optimize.brentq(missed, 1e-3, 100.0))


def power_line(suite: Suite) -> str:
    """The power of a suite's comparisons with its baseline, for the terminal; "" without any."""
    methods = [name for name, method in suite.methods.items() if not method.same_as]
    comparisons = len(methods) - (suite.baseline in methods)
    if len(suite.seeds) < 2 or not comparisons:
        return ""
    size = detectable(len(suite.seeds), comparisons)
    return (
        f"power: {len(suite.seeds)} seeds and {comparisons} comparisons a table find a mean "
        f"difference of {size:.2f} standard deviations of the differences with probability 0.8 "
        "(Holm, 5 %)"
    )


def operations(experiment: Experiment) -> float:
    """Of one run: training, the final bound, and answers; products with weights and attention."""
    config, dataset = experiment.config, experiment.dataset
    weights = training.num_params(experiment.shapes())
    length = dataset.length
    attention = 2 * config.model.depth * length * config.model.width
    forward = 2.0 * weights + 2 * attention
    # Frozen weights have no gradients of their own.
    backward = forward if experiment.adapter is not None else 2 * forward
    rows = config.train.steps * config.train.batch_size * experiment.transform.views
    e = config.evaluate
    held_out = min(e.max_rows or len(dataset.test), len(dataset.test))
    bounds = held_out * e.final_passes * e.final_replicates
    sampler, _ = parts.masked_sampler(config, dataset)
    steps = config.sample.num_steps
    if sampler.num_steps is not None:
        steps = sampler.num_steps(getattr(dataset.layout, "answer_length", length))
    answers = min(config.sample.num_answers or len(dataset.test), len(dataset.test)) * steps
    return length * (rows * (forward + backward) + (bounds + answers) * forward)


def time_lines(suite: Suite, root: pathlib.Path) -> list[str]:
    """Hours of one H100 by task, and of the whole suite; of suites for a GPU, else none.

    Every run is counted as the first of its task: views that are not paid for by fewer steps,
    validations and measurements of gradients come on top.
    """
    if not suite.gpu:
        return []
    lines, total = [], 0.0
    count = dict.fromkeys((*suite.pretrainings, *suite.tasks), 0)
    for run in study_runs.plan(suite):
        count[run.task] += 1
    for task, number in count.items():
        run = next(r for r in study_runs.plan(suite) if r.task == task)
        config = study_runs.configure(suite, run, root)
        config.train.init_from = ""
        hours = number * operations(make_experiment(config)) / (SHARE * PEAK) / 3600
        total += hours
        lines.append(f"  {task}: {number} runs, {hours:.1f} hours")
    return [
        f"expected on one H100 at {SHARE:.0%} of its peak (an estimate of operations, without "
        f"compilation, validations, measurements and further views): {total:.1f} hours",
        *lines,
    ]
