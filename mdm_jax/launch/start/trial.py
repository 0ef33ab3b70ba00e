"""The measured speed of a config: a few compiled steps on its own data."""

import contextlib
import time
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mdm_jax import training
from mdm_jax.launch.build import make_experiment

WARM_UP = 2
"""Steps before the measured ones."""


class Trial(NamedTuple):
    """Seconds of compiling, the median and slowest step, how many were measured, and memory.

    ``training_rows``: rows of the training split; ``vocab_size``: ids of the tokenizer.
    """

    compiling: float
    step: float
    slowest: float
    steps: int
    memory_bytes: int | None
    training_rows: int
    vocab_size: int
    length: int


def measure(config: ConfigDict, seconds: float, most: int = 30) -> Trial:
    """Train for about ``seconds``, at least 3 and at most ``most`` steps, and throw it away.

    Raises what ``build.make_experiment`` does, and MemoryError where it does not fit.
    """
    experiment = make_experiment(config)
    compiled = training.compile_step(
        experiment.step,
        experiment.abstract_state(),
        experiment.abstract_batch(),
        *experiment.constants,
    )
    state, times = experiment.initial_state(), []
    with contextlib.closing(experiment.train_batches()) as batches:
        started = time.monotonic()
        while len(times) < WARM_UP + 3 or (
            len(times) < WARM_UP + most and time.monotonic() - started < seconds
        ):
            before = time.monotonic()
            state, metrics = compiled.call(state, next(batches))
            jax.block_until_ready(metrics)
            times.append(time.monotonic() - before)
    measured = times[WARM_UP:]
    return Trial(
        compiled.seconds,
        float(np.median(measured)),
        max(measured),
        len(measured),
        compiled.memory_bytes,
        len(experiment.dataset.train),
        experiment.dataset.vocab_size,
        experiment.dataset.length,
    )
