"""Grids of several numbers of steps compared; the best of each is stored in the run.

A grid is compared by the distance of what is sampled along it from held-out rows, and by the bound
that steps lose (Align Your Steps). The bound says little of samples: on N(0, 1) its best grid is
worse than cosine's.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mdm_jax import files, rng
from mdm_jax.gaussian import samplers as search
from mdm_jax.gaussian.samplers import spacings
from mdm_jax.launch import names
from mdm_jax.launch.build import FAMILIES, Experiment, load_parameters
from mdm_jax.launch.modes.evaluate import judge_score
from mdm_jax.launch.processes.parts import placed
from mdm_jax.launch.sampling.quality import own_steps
from mdm_jax.launch.spacing import report
from mdm_jax.launch.spacing.problem import (
    Problem,
    Samples,
    learned_density,
    make_problem,
    make_samples,
)
from mdm_jax.launch.spacing.stored import path_of, store, stored_records
from mdm_jax.progress import progress_bar
from mdm_jax.types import Array, PyTree

_PAIRED_STEPS = 8
"""Most steps that are aligned by pairs of noisy rows, which cost two passes an interval; grids of
more are interpolated, as Sabour et al. do."""


class Judged(NamedTuple):
    """Grids of a run by sampler: experiments with these, what they share, records of each."""

    experiments: list[Experiment]
    params: PyTree
    problem: Problem
    step: int
    records: list[dict[str, Any]]


def compare(
    experiment: Experiment, workdir: files.Path, show: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """:func:`judge`, with its summary and plots.

    Returns {"records": one for each sampler and number of steps, "files"}: records, and plots of
    distances, of grids, and of pictures along them, with what earlier calls stored of the same
    parameters.
    """
    judged = judge(experiment, workdir, show)
    paths = [path_of(workdir, r["sampler"], r["num_steps"]) for r in judged.records]
    for each in judged.experiments:
        # Of other numbers of steps too.
        known = stored_records(workdir, each.config.sample.sampler, judged.step)
        paths += report.draw(each, judged.params, judged.problem, known, workdir)
    show(f"\n{report.summary(judged.records)}")
    return {"records": judged.records, "files": [str(path) for path in paths]}


def judge(
    experiment: Experiment, workdir: files.Path, show: Callable[[str], None] = lambda _: None
) -> Judged:
    """Judge and store grids of each of ``spacing.steps`` by each of ``spacing.samplers``.

    Grids are the rules of the process, those uniform in the curve of losses, the density that
    training learned, Align Your Steps by the curve and by pairs, and a search for the least
    distance that begins at the best of these. Distances share random numbers; those of the search
    are others. ValueError for a process or sampler without a grid.
    """
    c = experiment.config
    own = [_with_sampler(experiment, name) for name in c.spacing.samplers or (c.sample.sampler,)]
    for each in own:
        check(each)
    step, params = load_parameters(experiment, workdir)
    key = experiment.key(step, "spacing")
    problem, learned = make_problem(experiment, params, key), learned_density(experiment, workdir)
    score = judge_score(experiment, c.sample.judge) if c.sample.judge else None
    grids_of = functools.cache(_candidates(experiment, problem, learned))
    records = []
    with progress_bar(None, "spacing", "sets of samples") as bar:
        for each in own:
            samples = make_samples(each, params, score)
            for num_steps in c.spacing.steps:
                record = {
                    "step": step,
                    "sampler": each.config.sample.sampler,
                    "num_steps": num_steps,
                    "reference": samples.reference,
                } | _compared(each, problem, samples, grids_of(num_steps), key, bar.update)
                show(f"\n{record['sampler']}, {num_steps} steps\n{report.table(record)}")
                records.append(record)
                store(workdir, record)
    return Judged(own, params, problem, step, records)


def check(experiment: Experiment) -> None:
    """Raise ValueError where there is no grid to compare."""
    c = experiment.config
    if experiment.dataset.columns:
        raise ValueError("mdm spacing is not for tables: their samplers take the learned levels")
    if experiment.family.levels is None:
        raise ValueError(f"process={c.process!r} has no noise levels, hence no grid to space")
    if c.sample.restore_from is not None:
        raise ValueError(
            "grids are compared by samples from noise: leave sample.restore_from at None"
        )
    if not experiment.family.takes_steps:
        raise ValueError(f"there is no grid to space: {own_steps(experiment.config)}")
    if not c.spacing.steps:
        raise ValueError("spacing.steps names no number of steps; give --steps=4,8,16,32")


def _with_sampler(experiment: Experiment, name: str) -> Experiment:
    config = experiment.config.copy_and_resolve_references()
    if config.sample.sampler == name:
        return experiment
    config.sample.sampler = name
    own = placed(config, experiment.mesh)
    family = FAMILIES[config.process](own, experiment.dataset, experiment.source)
    return dataclasses.replace(experiment, config=config, family=family)


def _candidates(
    experiment: Experiment, problem: Problem, learned: Callable[[int], Array] | None
) -> Callable[[int], dict[str, np.ndarray]]:
    """``grids(num_steps)`` by name, before any search by samples."""

    def straight(num_steps: int) -> np.ndarray:
        return np.linspace(problem.low, problem.high, num_steps + 1)

    @functools.cache
    def by_curve(num_steps: int) -> np.ndarray:
        return search.align_steps(problem.cost, straight(num_steps), refinements=6).grid

    @functools.cache
    def by_pairs(num_steps: int) -> np.ndarray:
        few = {"refinements": 3, "candidates": 5, "max_sweeps": 2}
        return search.align_steps(problem.pairs, by_curve(num_steps), **few).grid

    def by_doubling(num_steps: int) -> np.ndarray:
        few = min(num_steps, _PAIRED_STEPS)
        at = np.linspace(0, few, num_steps + 1)
        return np.interp(at, np.arange(few + 1), by_pairs(few))

    made: dict[str, Callable[[int], Array]] = {}
    if problem.curve is not None:
        levels, errors = problem.curve
        middle = 0.5 * (errors[1:] + errors[:-1])
        made["equal information"] = lambda n: spacings.uniform_information(middle, levels, n)
        mmse = errors * np.exp(-levels)
        made["equal error"] = lambda n: spacings.uniform_mmse(mmse, levels, n)
    if learned is not None:
        made["learned density"] = learned
    if problem.cost is not None:
        made["align steps, curve"] = by_curve
    if problem.pairs is not None:
        made["align steps, pairs"] = by_doubling
    chosen = experiment.config.spacing.grids or (*experiment.family.rules, *made)
    if missing := [name for name in chosen if name in names.SEARCHED_GRIDS and name not in made]:
        raise ValueError(f"spacing.grids: {missing[0]!r} is not to be had for this run")

    def grids_of(num_steps: int) -> dict[str, np.ndarray]:
        found = {}
        for name in chosen:
            own = made.get(name, functools.partial(experiment.family.levels, name))
            found[name] = problem.closed(own(num_steps))
        return found

    return grids_of


def _compared(
    experiment: Experiment,
    problem: Problem,
    samples: Samples,
    found: dict[str, np.ndarray],
    key: Array,
    tick: Callable[[int], Any],
) -> dict[str, Any]:
    """{"best": name, "grids": by name distances, bounds, levels, figures of texts}."""
    c, found = experiment.config.spacing, dict(found)

    def measured(grid: np.ndarray, key: Array) -> tuple[float, np.ndarray]:
        tick(1)
        tokens = samples.draw(problem.open(grid), key)
        return samples.distance(tokens), tokens

    if c.budget and len(next(iter(found.values()))) > 2:

        def metric(number: int) -> Callable[[np.ndarray], float]:
            return lambda grid: measured(grid, rng.stream(key, f"search {number}"))[0]

        def anew(grid: np.ndarray) -> float:
            return metric(1)(grid) + metric(2)(grid)

        found["search"] = search.refined_grid(metric(0), anew, [*found.values()], c.budget)
    keys = [jax.random.fold_in(key, i) for i in range(c.replicates)]
    results = {}
    for name, grid in found.items():
        draws = [measured(grid, key) for key in keys]
        results[name] = {
            "distances": [distance for distance, _ in draws],
            "bound": problem.cost and search.klub(problem.cost, grid),
            "bound_by_pairs": problem.pairs and search.klub(problem.pairs, grid),
            "levels": grid.tolist(),
            "quality": samples.quality(draws[0][1]),
        }
    best = min(results, key=lambda name: np.mean(results[name]["distances"]))
    return {"best": best, "grids": results}
