"""Variants of the training step: settings, as data.

To add one, add a line to ``TRAIN``. A variant that asks for something which this machine or this
version does not have is reported as unavailable, with the reason.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from experiments.benchmarks import machine
from mdm_jax import variance


class Variant(NamedTuple):
    """How a training step differs from the library's plainest.

    Attributes:
        summary: one line for the reader.
        config: fields of ``TransformerConfig`` that are not at their default.
        readout: losses through a ``models.Readout``, at masked places only, instead of logits.
        chain: names of variance transforms, from ``variants.CHAINS``.
        num_microbatches: parts of the batch whose gradients are accumulated; None for as many as
            ``setting.microbatches`` finds best on this machine.
    """

    summary: str
    config: Mapping[str, Any] = {}
    readout: bool = False
    chain: tuple[str, ...] = ("stratified",)
    num_microbatches: int | None = 1


YARDSTICK = "yardstick"
"""Not a variant of the library: the plain code of ``experiments.benchmarks.yardstick``."""

_FLOAT32 = {"dtype": jnp.float32}
_BFLOAT16 = {"dtype": jnp.bfloat16}
PLAIN = Variant("logits of all places, float32, einsum", _FLOAT32 | {"attention": "einsum"})
"""Without any of the means of being fast."""

CHOSEN = Variant(
    "logits at masked places; attention, dtype and parts of the batch as chosen for this machine",
    {"dtype": machine.product_dtype()},
    readout=True,
    num_microbatches=None,
)
"""What one would use here."""


def _chosen(summary: str, config: Mapping[str, Any] = {}, **fields: Any) -> Variant:
    return CHOSEN._replace(summary=summary, config={**CHOSEN.config, **config}, **fields)


TRAIN: Mapping[str, Variant | None] = {
    YARDSTICK: None,
    "library": CHOSEN,
    "dense": PLAIN,
    "dense, recomputed attention": PLAIN._replace(
        summary="dense, probabilities computed anew in the backward pass",
        config=_FLOAT32 | {"attention": "recompute"},
    ),
    "readout": PLAIN._replace(summary="dense, but logits at masked places", readout=True),
    "library float32": _chosen("library in float32", _FLOAT32),
    "library bfloat16": _chosen("library with bfloat16 operands", _BFLOAT16),
    "library, all logits": _chosen("library, logits of all places", readout=False),
    "attention einsum": _chosen("library, all rows at once", {"attention": "einsum"}),
    "attention recompute": _chosen("library, a few rows at a time", {"attention": "recompute"}),
    "attention xla": _chosen("library, jax.nn.dot_product_attention", {"attention": "xla"}),
    "attention cudnn": _chosen("library, cuDNN's kernel", {"attention": "cudnn"}),
    "attention splash": _chosen("library, TPU kernel", {"attention": "splash"}),
    "scan over layers": _chosen("library, one compiled block", {"scan_layers": True}),
    "remat dots": _chosen("library, keeps products alone", {"remat": "dots"}),
    "remat full": _chosen("library, keeps the inputs of blocks alone", {"remat": "full"}),
    "no chain": _chosen("library, independent noise", chain=()),
    "chain with ppots": _chosen("library, learnt level density", chain=("stratified", "ppots")),
    "one microbatch": _chosen("library, all rows at a time", num_microbatches=1),
    "two microbatches": _chosen("library, gradients accumulated", num_microbatches=2),
}
TRAIN_SETS = {
    "default": (YARDSTICK, "library", "dense", "library bfloat16", "no chain"),
    "attention": tuple(name for name in TRAIN if name.startswith("attention")),
    "all": tuple(TRAIN),
}
"""Names of sets of variants for the command line."""

CHAINS: Mapping[str, Callable[[], variance.VarianceTransform]] = {
    "stratified": variance.stratified,
    "systematic": variance.systematic,
    "antithetic_pairs": variance.antithetic_pairs,
    "ppots": variance.ppots,
    "mirror": variance.mirror,
}
"""Variance transforms that benchmarks name."""
