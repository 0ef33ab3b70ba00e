"""Progressive masks (PUMA), for the study alone: rows are unmasked by the model that they train.

    python -m experiments.tried.progressive [--task=text] [--seeds=20,21] [--stages=8] [--out=FILE]

Every row stays in the batch for ``stages`` steps. It enters with random places revealed, a share of
them in [0, 1 / stages], and from each step to the next the true tokens are revealed at those places
where the logits of the training pass are surest, until the share lies in the next interval. Rows
enter in turns, so a batch has all intervals. The loss is the mean over the masked places of a row.
There are no passes beside those of training, but each row is seen ``stages`` times. Contexts follow
the model and not the uniform law, so the bias label is "biased". Trained as the study trains its
task: the same network, optimiser, steps and passes, the best of as many validations by the bound.
Source: Kim et al. 2026 (arXiv 2602.10314) and its code; what is surest is the most probable token's
probability, whether or not that token is the true one.

This is the code's mode ``standard``. Its configs for Sudoku and TinyGSM use ``confidence_collapse``
instead, which also reveals every place where a token has more than 0.9 and takes the stage from the
share that is revealed; the one for TinyGSM lowers the tokens of a stage from 42 to 12 while
training, that for Sudoku restarts rows from their clues alone. So a result here is not one of PUMA
as it was published.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.study import runs
from experiments.study.suites import SUITES
from mdm_jax import rng, training
from mdm_jax.launch.build import Experiment, make_experiment
from mdm_jax.launch.modes.evaluate import measure_accuracy
from mdm_jax.models.cross_entropy import as_logits
from mdm_jax.training.ema import averaged, update_average
from mdm_jax.types import Array, Batch, PyTree


class Pool(NamedTuple):
    """Partly revealed rows: the ``Batch``, what is masked [B, L], and the interval of each [B]."""

    rows: Batch
    masked: Array
    stage: Array


def _revealed(key: Array, stage: Array, eligible: Array, stages: int) -> Array:
    """[B] tokens to be revealed in an interval; at least one stays masked."""
    share = (stage + jax.random.uniform(key, stage.shape)) / stages
    count = jnp.sum(eligible, axis=-1)
    return jnp.minimum(jnp.round(share * count).astype(jnp.int32), count - 1)


def _reveal(masked: Array, scores: Array, count: Array) -> Array:
    """``masked`` without the ``count`` [B] masked places of the highest scores."""
    order = jnp.argsort(-jnp.where(masked, scores, -jnp.inf), axis=-1)
    return masked & (jnp.argsort(order, axis=-1) >= count[:, None])


def enter(key: Array, rows: Batch, stage: Array, stages: int) -> Pool:
    """Rows with places revealed at random, as many as their interval has."""
    own, other = jax.random.split(key)
    count = _revealed(own, stage, rows.eligible, stages)
    scores = jax.random.uniform(other, rows.tokens.shape)
    return Pool(rows, _reveal(rows.eligible, scores, count), stage)


def advance(key: Array, pool: Pool, logits: Array, fresh: Batch, stages: int) -> Pool:
    """The next batch: surest places revealed; ``fresh`` [B / stages] for the rows that are through.

    As many rows must be through at every step, which :func:`start` sees to.
    """
    own, other = jax.random.split(key)
    stage = pool.stage + 1
    target = _revealed(own, stage, pool.rows.eligible, stages)
    shown = jnp.sum(pool.rows.eligible & ~pool.masked, axis=-1)
    surest = jnp.max(jax.nn.log_softmax(logits), axis=-1)
    moved = Pool(pool.rows, _reveal(pool.masked, surest, jnp.maximum(target - shown, 0)), stage)
    count = fresh.tokens.shape[0]
    through = jnp.argsort(-stage)[:count]
    new = enter(other, fresh, jnp.zeros(count, jnp.int32), stages)
    return jax.tree.map(lambda old, one: old.at[through].set(one), moved, new)


def start(key: Array, rows: Batch, stages: int) -> Pool:
    """A first pool, whose intervals are all of them in equal numbers; ValueError if they do not
    divide the rows."""
    if rows.tokens.shape[0] % stages:
        raise ValueError(f"{stages} stages do not divide the batch of {rows.tokens.shape[0]} rows")
    return enter(key, rows, jnp.arange(rows.tokens.shape[0], dtype=jnp.int32) % stages, stages)


def first_rows(batches: Iterator[Batch], stages: int) -> Batch:
    """Rows of the first pool: those of as many fresh batches as there are stages."""
    first = [next(batches) for _ in range(stages)]
    return jax.tree.map(lambda *fields: jnp.concatenate(fields), *first)


def train(experiment: Experiment, stages: int, evaluations: int) -> tuple[float, PyTree]:
    """(best validation bound in bits, its averaged parameters).

    FloatingPointError if no validation was finite.
    """
    dataset, config = experiment.dataset, experiment.config
    optimizer, decay = experiment.optimizer, config.optimizer.ema_decay
    rows = config.train.batch_size
    if rows % stages:
        raise ValueError(f"{stages} stages do not divide the batch of {rows} rows")

    def loss_fn(params: PyTree, pool: Pool) -> tuple[Array, Array]:
        inputs = jnp.where(pool.masked, dataset.mask_id, pool.rows.tokens)
        level = jnp.zeros((rows, 1))
        logits = as_logits(experiment.apply_fn(params, inputs, level, pool.rows.documents))
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, pool.rows.tokens)
        of_row = jnp.sum(nats * pool.masked, -1) / jnp.sum(pool.masked, -1)
        return jnp.mean(of_row), logits

    @jax.jit
    def step(state: Any, pool: Pool, fresh: Batch) -> tuple[Any, Pool]:
        (_, logits), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params, pool)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        done = (1.0 + state.step) / (10.0 + state.step)  # as the launcher's step
        ema = update_average(state.ema, state.params, params, jnp.minimum(decay, done))
        key = rng.stream(rng.step_key(config.seed, state.step), "progressive")
        kept = {"params": params, "opt_state": opt_state, "ema": ema, "step": state.step + 1}
        return state.replace(**kept), advance(key, pool, logits, fresh, stages)

    state = experiment.initial_state()
    best: tuple[float, PyTree] = (np.inf, None)
    with contextlib.closing(experiment.train_batches(rows // stages)) as fresh:
        key = rng.stream(rng.step_key(config.seed, 0), "pool")
        pool = start(key, first_rows(fresh, stages), stages)
        for number in range(1, config.train.steps + 1):
            state, pool = step(state, pool, next(fresh))
            if number % (config.train.steps // evaluations) == 0:
                params = averaged(state)
                batches = experiment.batches(dataset.valid, config.evaluate.max_rows)
                found = experiment.validate(params, experiment.key(number, "validate"), batches)
                bits = found.bits_per_unit
                print(f"  step {number}: {bits:.3f} bits", flush=True)
                if bits < best[0]:  # never of a bound that is not a number
                    best = bits, jax.tree.map(jnp.copy, params)
    if best[1] is None:
        raise FloatingPointError("diverged: no validation bound was finite")
    return best


def result(task: str, seed: int, stages: int) -> dict[str, Any]:
    """Bound on the test split and accuracy, if any, as the study scores its runs."""
    suite = dataclasses.replace(SUITES["eight"], seeds=(seed,))
    config = runs.configure(suite, runs.Run(task, "standard", "passes", seed), pathlib.Path())
    config.corruption.name, config.law.name = "fixed_count", "linear"  # of the bound alone
    experiment = make_experiment(config)
    _, params = train(experiment, stages, suite.evaluations)
    source = experiment.held_out[1]
    batches = experiment.batches(source, config.evaluate.max_rows)
    bound = experiment.evaluate(params, experiment.key(0, "final"), batches)
    accuracy = measure_accuracy(experiment, pathlib.Path(), params)
    found = {"task": task, "seed": seed, "stages": stages, "steps": config.train.steps}
    found |= {"parameters": training.num_params(params), "bits_per_unit": bound.bits_per_unit}
    return found | {"accuracy": accuracy.get("accuracy")}


def main() -> None:
    """Train, and print a line of JSON for each seed."""
    parser = argparse.ArgumentParser("experiments.tried.progressive", allow_abbrev=False)
    parser.add_argument("--task", default="text", choices=("text", "sudoku6"))
    parser.add_argument("--seeds", default="20,21")
    parser.add_argument("--stages", type=int, default=8)
    parser.add_argument("--out", type=pathlib.Path, help="lines are appended")
    given = parser.parse_args()
    for seed in map(int, given.seeds.split(",")):
        try:
            line = json.dumps(result(given.task, seed, given.stages))
        except (FloatingPointError, ValueError) as error:
            raise SystemExit(f"error: seed {seed}: {error}") from None
        print(line, flush=True)
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
