"""More steps for a run that is there already: ``train.steps`` raised, nothing else changed."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mdm_jax import files, training

RESULTS = ("evaluation.json", "report.txt")
"""Results of the steps so far, which are kept beside those that come."""


def describe(old: Mapping[str, Any], config: ConfigDict, step: int) -> str:
    """What raised ``train.steps`` do to the learning rate at ``step``, where the run goes on."""
    steps, more = old["train"]["steps"], config.train.steps
    o, c = old["optimizer"], config.optimizer
    before = training.warmup_cosine(o["peak"], o["warmup_steps"], steps, o["final_fraction"])
    after = training.warmup_cosine(c.peak, c.warmup_steps, more, c.final_fraction)
    return (
        f"train.steps raised from {steps} to {more}: the schedule of {more} steps counts from step "
        f"{step} on. The learning rate goes from {float(before(step)):.3g} to "
        f"{float(after(step)):.3g} at once, then by a cosine to {c.peak * c.final_fraction:.3g} at "
        f"step {more}. Earlier steps had the schedule of {steps}, so this is not the run that "
        f"{more} steps from the start would give"
    )


def set_results_aside(workdir: files.Path) -> None:
    """Rename ``report.txt`` and ``evaluation.json`` to ``report.1.txt`` etc."""
    for path in (workdir / name for name in RESULTS):
        if path.exists():
            path.rename(files.beside(path))
