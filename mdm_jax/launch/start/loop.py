"""Options of the training loop from a config."""

import inspect

from ml_collections import ConfigDict

from mdm_jax import data, training
from mdm_jax.launch.start import scaled
from mdm_jax.objectives import Objective


def loop_options(
    config: ConfigDict, dataset: data.Dataset, objective: Objective, views: int
) -> training.LoopOptions:
    """Frequencies of a run, and the unit of the bits shown: none of a "biased" objective's.

    ValueError for early stopping without validation.
    """
    c = config.train
    every = scaled.evaluate_every(config)
    if c.stop.patience and not (every and len(dataset.valid)):
        raise ValueError(
            f"train.stop.patience={c.stop.patience} counts evaluations, and there are none: set "
            "train.evaluate_every and give validation rows, or leave it at 0"
        )
    own = set(inspect.signature(training.LoopOptions).parameters) & set(c)
    unit = "char" if dataset.unit == "character" else "dim"
    return training.LoopOptions(
        total_steps=c.steps,
        views=views,
        unit="" if objective.bias == "biased" else unit,
        **{name: c[name] for name in own} | {"evaluate_every": every},
    )
