"""STORM, tried and left out: the gradient of the same rows, levels and masks at two parameters.

    python -m experiments.tried.storm [--task=text] [--method=recommended]

The estimate of the gradient is ``d_t = g(theta_t; xi_t) + (1 - a) (d_{t-1} - g(theta_{t-1};
xi_t))``, two passes of the rows of xi_t. Along a training run of the study, which does not use
it, it is compared with estimates of as many passes: a batch of twice the rows, and the running
mean of such batches with the same a, which is what the momentum of an optimiser makes of them
anyway. What counts is the mean squared distance from the full gradient, since a running mean lags
behind. One seed; standard errors take the measured steps as independent, which they are not where
1/a is longer than the steps between them.
Source: Cutkosky and Orabona 2019.
"""

import argparse
import contextlib
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.study import runs
from experiments.study.suites import SUITES
from mdm_jax import data, meter, rng
from mdm_jax.estimates import mean_estimate, standard_error_of_ratio
from mdm_jax.launch.build import Experiment, make_experiment
from mdm_jax.types import Array, Batch, PyTree
from mdm_jax.variance.transform import draw_batch

DECAYS = (0.02, 0.1, 0.3)
REFERENCE = 32, 16
"""Batches, and rows of each, of what stands for the full gradient."""


class StormState(NamedTuple):
    """The estimate, and whether there is one yet."""

    estimate: PyTree
    started: Array


def storm(decay: float) -> optax.GradientTransformationExtraArgs:
    """Replaces gradients by STORM's estimate, given ``previous``: those at the last parameters."""

    def init(params: PyTree) -> StormState:
        return StormState(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), bool))

    def update(gradients: PyTree, state: StormState, params: PyTree = None, *, previous: PyTree):
        del params

        def next_estimate(now: Array, before: Array, kept: Array) -> Array:
            return now + jnp.where(state.started, (1 - decay) * (kept - before), 0.0)

        new = jax.tree.map(next_estimate, gradients, previous, state.estimate)
        return new, StormState(new, jnp.ones((), bool))

    return optax.GradientTransformationExtraArgs(init, update)


def measure(experiment: Experiment, steps: int, every: int) -> dict[str, Any]:
    """Mean squared errors over those of a batch of twice the rows, at every ``every`` steps."""
    estimator = meter.make_estimator(experiment.apply_fn, experiment.objective)
    transform, source = experiment.transform, experiment.dataset.train
    length = experiment.dataset.length
    whole = experiment.spec
    half = experiment.objective.spec(whole.batch_size // 2, length)
    large = experiment.objective.spec(REFERENCE[1], length)

    def drawn(spec: Any, state: PyTree, name: str, step: int, number: int = 0) -> tuple:
        key = rng.stream(jax.random.fold_in(jax.random.key(step), number), name)
        generator = np.random.default_rng([step, number, spec.batch_size])
        batch = data.sample_rows(source, spec.batch_size, generator)
        return jax.tree.map(jnp.asarray, batch), draw_batch(key, transform, state, spec)

    def gradient(params: PyTree, batch: Batch, draw: Any) -> Array:
        leaves = jax.tree.leaves(estimator.gradient(params, batch, draw, 1))
        return jnp.concatenate([leaf.ravel() for leaf in leaves])

    step_fn = jax.jit(experiment.step)
    state = experiment.initial_state()
    zeros = jnp.zeros(sum(leaf.size for leaf in jax.tree.leaves(state.params)))
    storms: dict[float, Callable] = {decay: storm(decay) for decay in DECAYS}
    kept = {decay: each.init(zeros) for decay, each in storms.items()}
    means: dict[float, Array] = dict.fromkeys(DECAYS, zeros)
    before, errors = state.params, []
    with contextlib.closing(experiment.train_batches()) as batches:
        for step in range(1, steps + 1):
            rows = drawn(half, state.variance, "storm", step)
            now, last = gradient(state.params, *rows), gradient(before, *rows)
            double = gradient(state.params, *drawn(whole, state.variance, "double", step))
            for decay in DECAYS:
                _, kept[decay] = storms[decay].update(now, kept[decay], previous=last)
                rate = max(decay, 1 / step)
                means[decay] = (1 - rate) * means[decay] + rate * double
            if step % every == 0:
                parts = jnp.stack(
                    [
                        gradient(state.params, *drawn(large, state.variance, "full", step, number))
                        for number in range(REFERENCE[0])
                    ]
                )
                full, spread = parts.mean(0), float(jnp.sum(parts.var(0, ddof=1)))

                def distance(estimate: Array, full=full, own=spread / REFERENCE[0]) -> float:
                    return float(jnp.sum(jnp.square(estimate - full))) - own

                found = {"twice the rows": distance(double)}
                found |= {f"running mean, {a:g}": distance(means[a]) for a in DECAYS}
                found |= {f"STORM, {a:g}": distance(kept[a].estimate) for a in DECAYS}
                found["signal"] = float(jnp.sum(full**2)) - spread / REFERENCE[0]
                errors.append(found)
            before = jax.tree.map(jnp.copy, state.params)
            state, _ = step_fn(state, next(batches))
    return {name: np.array([each[name] for each in errors]) for name in errors[0]}


def main() -> None:
    """Train, measure, and print the table of both halves of the run."""
    parser = argparse.ArgumentParser("experiments.tried.storm", allow_abbrev=False)
    parser.add_argument("--task", default="text")
    parser.add_argument("--method", default="recommended")
    parser.add_argument("--every", type=int, default=12)
    parser.add_argument("--steps", type=int, default=0, help="of the run's; all by default")
    parser.add_argument("--width", type=int, default=0, help="the task's by default")
    parser.add_argument("--depth", type=int, default=0, help="the task's by default")
    parser.add_argument("--length", type=int, default=0, help="the task's by default")
    given = parser.parse_args()
    run = runs.Run(given.task, given.method, "passes", 0)
    config = runs.configure(SUITES["small"], run, pathlib.Path())
    config.train.monitors = ()
    config.model.width = given.width or config.model.width
    config.model.depth = given.depth or config.model.depth
    config.data.length = given.length or config.data.length
    found = measure(make_experiment(config), given.steps or config.train.steps, given.every)
    reference = found["twice the rows"]
    middle = len(reference) // 2
    for title, part in (("first half", slice(middle)), ("second half", slice(middle, None))):
        print(f"{title}: squared error over that of twice the rows ({len(reference[part])} steps)")
        for name, values in found.items():
            ratio = values[part].mean() / reference[part].mean()
            error = standard_error_of_ratio(values[part], reference[part])
            mean = mean_estimate(values[part]).value
            print(f"  {name:24}{ratio:8.3f} ± {error:.3f}   ({mean:.4g})")


if __name__ == "__main__":
    main()
