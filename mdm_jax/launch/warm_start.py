"""A run that starts from the parameters of another one: fine-tuning, or another way of training.

A plain masked model goes on as a block or autoregressive model this way, since all of them are one
network under different attention masks.
"""

import pathlib

import jax

from mdm_jax import training
from mdm_jax.data.tokenizers import load_tokenizer
from mdm_jax.launch import build
from mdm_jax.launch.experiment import Experiment, load_parameters
from mdm_jax.launch.workdir import WorkdirError, read_config
from mdm_jax.training.state import TrainState


def initial_state(experiment: Experiment) -> TrainState:
    """The state at step 0, with the parameters of ``train.init_from`` if that names a run.

    Optimiser, averages and variance transforms start afresh.

    Raises:
        WorkdirError: if there is no run, or its tokenizer numbers tokens otherwise.
        CheckpointError: if it has no checkpoint, or one of another network.
    """
    source = experiment.config.train.init_from
    if not source:
        return experiment.initial_state()
    directory = pathlib.Path(source)
    check_source(experiment, directory, "train.init_from")
    step, params = load_parameters(experiment, directory)
    print(f"parameters of {directory}, step {step}", flush=True)
    state = experiment.initial_state()
    average = training.new_average(params, build.DTYPES[experiment.config.optimizer.ema_dtype])
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), average, state.ema)
    return state.replace(params=params, ema=placed)


def check_source(experiment: Experiment, directory: pathlib.Path, field: str) -> None:
    """Raises WorkdirError unless a run with the same tokens lies in ``directory``."""
    if read_config(directory) is None:
        raise WorkdirError(f"{field}: {directory} holds no run (no config.json)")
    saved, tokenizer = directory / "tokenizer.json", experiment.dataset.tokenizer
    if tokenizer is None or not saved.exists():
        return
    if load_tokenizer(saved).fingerprint != tokenizer.fingerprint:
        raise WorkdirError(
            f"{field}: the tokenizer of {directory} is another than this run's, so its "
            f"parameters mean other tokens; pass --config.data.tokenizer={saved}"
        )
