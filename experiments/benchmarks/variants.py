"""Variants of the training step: settings, as data.

To add one, add a line to ``TRAIN``. A variant that asks for something which this machine or this
version does not have is reported as unavailable, with the reason.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from mdm_jax import variance


class Variant(NamedTuple):
    """How a training step differs from the library's plainest.

    Attributes:
        summary: one line for the reader.
        config: fields of ``TransformerConfig`` that are not at their default.
        readout: losses through a ``models.Readout``, at masked places only, instead of logits.
        chain: names of variance transforms, from ``variants.CHAINS``.
        num_microbatches: parts of the batch whose gradients are accumulated.
    """

    summary: str
    config: Mapping[str, Any] = {}
    readout: bool = False
    chain: tuple[str, ...] = ("stratified",)
    num_microbatches: int = 1


YARDSTICK = "yardstick"
"""Not a variant of the library: the plain step of ``experiments.benchmarks.yardstick``."""

_PLAIN = {"attention": "xla", "dtype": jnp.float32}
TRAIN: Mapping[str, Variant | None] = {
    YARDSTICK: None,
    "dense float32": Variant("logits of all places, float32, XLA's attention", _PLAIN),
    "readout float32": Variant("the same, logits at masked places only", _PLAIN, readout=True),
    "auto": Variant("what the library chooses here", {"attention": "auto"}, readout=True),
}
TRAIN_SETS = {"default": (YARDSTICK, "dense float32", "auto"), "all": tuple(TRAIN)}
"""Names of sets of variants for the command line."""

CHAINS: Mapping[str, Callable[[], variance.VarianceTransform]] = {
    "stratified": variance.stratified,
    "systematic": variance.systematic,
    "antithetic_pairs": variance.antithetic_pairs,
    "ppots": variance.ppots,
    "mirror": variance.mirror,
}
"""Variance transforms that benchmarks name."""
