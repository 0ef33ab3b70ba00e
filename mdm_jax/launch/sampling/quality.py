"""What ``sample.quality_steps`` and numbers of steps need of a run."""

from typing import TYPE_CHECKING

from mdm_jax.launch.processes.parts import grid_samplers

if TYPE_CHECKING:
    from mdm_jax.launch.build import Experiment


def check_quality(experiment: "Experiment") -> None:
    """Raise ValueError or WorkdirError where ``sample.quality_steps`` cannot be measured."""
    if experiment.dataset.tokenizer is None:
        raise ValueError("sample.quality_steps is about text, and this run's data are pictures")
    if not experiment.family.takes_steps:
        raise ValueError(f"sample.quality_steps: {own_steps(experiment)}")


def own_steps(experiment: "Experiment") -> str:
    """Why a number of steps means nothing to the configured sampler, and which ones take it."""
    if experiment.config.process == "autoregressive":
        return "an autoregressive model has one step per token"
    c = experiment.config.sample
    return (
        f"{c.sampler!r} sets its own number of steps; those that take any number are "
        f"{', '.join(grid_samplers(c))} (--config.sample.sampler)"
    )
