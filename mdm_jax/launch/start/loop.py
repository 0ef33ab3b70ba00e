"""Options of the training loop from a config."""

import inspect
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mdm_jax import data, training
from mdm_jax.launch.start import scaled


def loop_options(
    config: ConfigDict, dataset: data.Dataset, views: int, bias: str
) -> training.LoopOptions:
    """Frequencies of a run, and the unit of bits; ``bias``: of objective and chain together.

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
        unit="" if bias == "biased" and not levels_give_the_bound(config) else unit,
        biased=bias == "biased",
        **{name: c[name] for name in own} | {"evaluate_every": every},
    )


def levels_give_the_bound(config: Mapping[str, Any]) -> bool:
    """Whether ``normalised_loss`` (the monitor "levels") is the bound under any weighting and law.

    It is of masked tokens' cross-entropies as they are, without weights.
    """
    clamp = config.get("weighting", {}).get("clamp")
    prompts = config["data"].get("structural_prompt_tokens")
    return config["process"] in ("masked", "block", "partition") and not (clamp or prompts)
