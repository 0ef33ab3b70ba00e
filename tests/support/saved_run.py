"""Directories of runs for tests of what reads them: nothing is trained or compiled for one."""

import jax
import numpy as np
import tiny

from mdm_jax import training
from mdm_jax.launch.build import Experiment
from mdm_jax.launch.workdir import claim

STEP = 4


def save(experiment: Experiment, workdir) -> None:
    """A run of four steps that was never evaluated, with random parameters and another average."""
    claim(workdir, experiment.config)
    experiment.dataset.tokenizer.save(workdir / "tokenizer.json")
    abstract = experiment.abstract_state()
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    state = state.replace(
        step=np.int32(STEP),
        params=tiny.perturbed(state.params, seed=0),
        ema=tiny.perturbed(state.ema, seed=1),
    )
    state = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), state, abstract)
    checkpoints = training.Checkpoints(workdir / "checkpoints")
    checkpoints.save(STEP, state, {}, {})
    checkpoints.close()
    writer = training.MetricWriter(workdir)
    writer.record(STEP, "train", {"loss": 1.0, "bits_per_unit": np.log2(np.e)})
    writer.close()
