"""The reference checkpoints of tests/data/hub, each loaded and compiled once for all tests."""

import functools
import json
import pathlib
import shutil

import numpy as np
from safetensors.numpy import load_file, save_file

from mdm_jax import hub

DATA = pathlib.Path(__file__).parents[1] / "data" / "hub"
CLOSE = {"rtol": 0, "atol": 1e-4}
"""The noise floor of float32 is 1e-5; a wrong eps moves logits by 3e-4 or more."""


@functools.cache
def loaded(name, dtype="float32", **settings):
    return hub.load(DATA / name, dtype=dtype, **settings)


@functools.cache
def reference(name):
    """Arrays recorded of the original class."""
    with np.load(DATA / name / "reference.npz") as arrays:
        return dict(arrays)


@functools.cache
def stated(name):
    return json.loads((DATA / name / "reference.json").read_text("utf-8"))


def logits(model, *inputs, **named):
    return np.asarray(model.logits(*inputs, **named))


def copied(name, tmp_path, change=None, **config):
    """A copy of a checkpoint, its tensors (of one file) changed by a function, and its config."""
    directory = shutil.copytree(DATA / name, tmp_path / "model")
    if change is not None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        save_file(change(dict(tensors)) or tensors, path)
    if config:
        write_config(directory, name, config)
    return directory


def write_config(directory, name, changes):
    """config.json of a checkpoint with other fields; ``...`` takes one out."""
    raw = json.loads((DATA / name / "config.json").read_text("utf-8")) | changes
    raw = {key: value for key, value in raw.items() if value is not ...}
    (directory / "config.json").write_text(json.dumps(raw), "utf-8")
