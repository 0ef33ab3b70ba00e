"""Variance of a run's batch gradient, on the same rows for all methods."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from mdm_jax import data, meter, rng, sharding
from mdm_jax.launch.build import Experiment, open_workdir
from mdm_jax.types import Batch, PyTree


def drawn_batches(experiment: Experiment, count: int, seed: int, size: int = 0) -> list[Batch]:
    """Placed training batches of rows drawn with replacement.

    Args:
        experiment: the run.
        count: how many.
        seed: of the rows.
        size: rows drawn for each batch, of which the run's batch takes the first; default its own
            size. Runs with smaller batches then have a subset of the rows of larger ones.
    """
    rows = experiment.spec.batch_size
    indices = _rows(experiment, count, size or rows, seed)[:, :rows]
    place = sharding.batch_sharding(experiment.mesh)
    source = experiment.dataset.train
    return [sharding.place_batch(data.gather(source, index), place) for index in indices]


def along_training(
    experiment: Experiment,
    workdir: pathlib.Path,
    *,
    batch_size: int,
    groups: int,
    redraws: int,
    noise: bool = True,
    reference: Experiment | None = None,
    check: Callable[..., None] | None = None,
) -> list[dict[str, Any]]:
    """Variance of the batch gradient under the run's own chain, at every checkpoint of its plan.

    Checkpoints left by interruptions are skipped. ``noise`` is the variance over levels and masks
    with the data fixed; ``total`` is over rows too, as the optimiser sees it. At the last step
    ``reference`` is the total of another method at the same parameters.

    Args:
        experiment: the run.
        workdir: its working directory.
        batch_size: rows of a batch at one forward pass each.
        noise: whether that with the data fixed is measured.
        groups, redraws: as for ``meter.efficiency``.
        reference: a run of the other method over the same data; its transform state is fresh.
        check: called between measurements; may raise.

    Returns:
        JSON values by checkpoint, in order.
    """
    own = meter.make_estimator(experiment.apply_fn, experiment.objective)
    batches = drawn_batches(experiment, groups, 0, batch_size)
    pool = _pool(experiment, groups * batch_size)
    sizes = {"groups": groups, "redraws": redraws, "progress": check}
    records = []
    for step, params, state in checkpoints_along(experiment, workdir):
        key = experiment.key(0, "gradient noise")
        subject = meter.Subject(own, params, experiment.transform, state, experiment.spec)
        record = {"step": step, "noise": None, "reference": None}
        if noise and experiment.config.process != "autoregressive":  # which has none
            record["noise"] = meter.efficiency(
                subject, batches, rng.stream(key, "noise"), **sizes
            ).to_dict()
        total_key = rng.stream(key, "total")
        record["total"] = meter.efficiency_with_data(subject, pool, total_key, **sizes).to_dict()
        records.append(record)
    if records and reference is not None:
        state = reference.transform.init(reference.spec)
        estimator = meter.make_estimator(reference.apply_fn, reference.objective)
        records[-1]["reference"] = meter.efficiency_with_data(
            meter.Subject(estimator, params, reference.transform, state, reference.spec),
            pool,
            total_key,
            **sizes,
        ).to_dict()
    return records


def _pool(experiment: Experiment, rows: int) -> Batch:
    index = _rows(experiment, 1, rows, seed=0)[0]
    return jax.tree.map(jax.numpy.asarray, data.gather(experiment.dataset.train, index))


def _rows(experiment: Experiment, count: int, size: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, len(experiment.dataset.train), (count, size))


def checkpoints_along(
    experiment: Experiment, workdir: pathlib.Path
) -> Iterator[tuple[int, PyTree, PyTree]]:
    """(step, parameters, state of the chain) at every checkpoint of a run's plan, in order."""
    checkpoints = open_workdir(workdir)
    try:
        abstract: PyTree = experiment.abstract_state()
        every = experiment.config.train.checkpoint_every
        for step in (s for s in checkpoints.steps() if s % every == 0):
            state = checkpoints.restore_step(step, abstract)
            yield step, state.params, state.variance
    finally:
        checkpoints.close()
