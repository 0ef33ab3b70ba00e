"""Accuracy of a run's answers to held-out prompts, where its data come with a checker."""

from collections.abc import Callable
from typing import Any

import tqdm

from mdm_jax import data, distributed
from mdm_jax.evaluation.accuracy import measure_task_accuracy
from mdm_jax.launch.experiment import Experiment
from mdm_jax.types import PyTree


def check_accuracy(experiment: Experiment) -> None:
    """Raises ValueError where the accuracy could not be measured."""
    count = experiment.config.sample.num_answers
    if count < 0:
        raise ValueError(f"sample.num_answers must be at least 1, or 0 for all rows, got {count}")


def measure_accuracy(
    experiment: Experiment, params: PyTree, check: Callable[..., None] | None = None
) -> dict[str, Any]:
    """``sample.num_answers`` prompts of the final split, answered by the configured sampler.

    Args:
        experiment: the run.
        params: parameters to answer with.
        check: called after every batch; may raise.

    Returns:
        JSON values; none where the data have no checker.
    """
    c, dataset = experiment.config, experiment.dataset
    if dataset.check is None:
        return {}
    split, source = experiment.held_out(c.evaluate.final_split)
    rows = min(c.sample.num_answers or len(source), len(source))
    silent = not distributed.is_first()
    with tqdm.tqdm(total=rows, desc=f"answering {split}", unit="row", disable=silent) as bar:

        def progress(count: int) -> None:
            bar.update(min(count, rows - bar.n))
            if check is not None:
                check()

        found = measure_task_accuracy(
            experiment.generator(),
            params,
            experiment.key(0, "answers"),
            data.evaluation_batches(source, min(c.evaluate.batch_size, rows), rows),
            check=dataset.check,
            tokenizer=dataset.tokenizer,
            progress=progress,
        )
    left_to_right = c.process == "autoregressive"
    return {
        **found.to_dict(),
        "answered_by": "next_token" if left_to_right else c.sample.sampler,
        "temperature": c.sample.temperature,
    }
