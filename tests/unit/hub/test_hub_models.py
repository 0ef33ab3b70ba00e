"""Loaded models give the logits of the original classes, on the checkpoints of tests/data/hub."""

import pathlib

import numpy as np
import pytest

from mdm_jax import hub

DATA = pathlib.Path(__file__).parents[2] / "data" / "hub"
TRANSFORMERS = sorted(
    path.name for path in DATA.iterdir() if path.name.startswith(("a2d", "llada", "dream", "sdar"))
)


def reference(name):
    with np.load(DATA / name / "reference.npz") as arrays:
        return dict(arrays)


def test_the_checkpoints_are_found():
    assert len(TRANSFORMERS) == 16


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_float32_logits_are_those_of_the_original_class(name):
    """The noise floor of float32 is 1e-5; a wrong eps moves logits by 3e-4 or more."""
    model, arrays = hub.load(DATA / name, dtype="float32"), reference(name)
    kept = arrays["attention_mask"] == 1
    logits = np.asarray(model.logits(arrays["input_ids"], arrays["attention_mask"]))
    assert logits.dtype == np.float32 and logits.shape == arrays["logits"].shape
    np.testing.assert_allclose(logits[kept], arrays["logits"][kept], rtol=0, atol=1e-4)
    unmasked = np.asarray(model.logits(arrays["input_ids"][1:3]))
    np.testing.assert_allclose(unmasked, arrays["logits_no_mask"], rtol=0, atol=1e-4)
