"""What ``sample.quality_steps`` and numbers of steps need of a run."""

from ml_collections import ConfigDict

from mdm_jax.data import Dataset
from mdm_jax.launch.families import Family
from mdm_jax.launch.processes.parts import grid_samplers


def check_quality(config: ConfigDict, dataset: Dataset, family: Family) -> None:
    """Raise ValueError where ``sample.quality_steps`` cannot be measured."""
    if dataset.tokenizer is None:
        raise ValueError("sample.quality_steps is about text, and this run's data are pictures")
    if not family.takes_steps:
        raise ValueError(f"sample.quality_steps: {own_steps(config)}")


def own_steps(config: ConfigDict) -> str:
    """Why a number of steps means nothing to the configured sampler, and which ones take it."""
    if config.process == "autoregressive":
        return "an autoregressive model has one step per token"
    c = config.sample
    return (
        f"{c.sampler!r} sets its own number of steps; those that take any number are "
        f"{', '.join(grid_samplers(c))} (--config.sample.sampler)"
    )
