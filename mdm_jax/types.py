"""Shared type names and the glossary of axes.

Axes, always in this order where several occur:

* ``V`` views of one example (replications such as the two masks of MIRROR),
* ``B`` rows of the *global* batch,
* ``S`` independent noise levels per row (1; one per block; one per data type),
* ``L`` elements of a row (tokens, or pixels flattened),
* ``K`` vocabulary entries.

The noise coordinate is the log signal-to-noise ratio ``logsnr`` = lambda, with large values clean.
For tokens the survival probability is ``sigmoid(logsnr)``, the masking rate ``sigmoid(-logsnr)``.

What a data pipeline hands to everything else.

The labels that say what an estimator's expectation is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike

Array = jax.Array
"""A JAX array; ``ArrayLike`` is used where NumPy arrays and Python scalars are accepted too."""

PyTree = Any
"""Nested containers of arrays."""

ModelFn = Callable[..., Any]
"""``model_fn(inputs [N, L], logsnr [N, S] float32, documents [N, L] int32 | None)``: for masked
processes int32 tokens -> logits [N, L, K], for Gaussian ones floats -> one number per element
[N, L]. Objectives and samplers see a network only through this signature. Objectives and likelihood
evaluations take a ``models.Readout`` for the logits too, of which they compute what they need."""

__all__ = ["Array", "ArrayLike", "ModelFn", "PyTree"]


class Batch(NamedTuple):
    """Clean examples. Fields are NumPy or JAX arrays; a single row has no leading axis.

    Attributes:
        tokens: [B, L] int32 clean token ids. Padding holds any valid id.
        eligible: [B, L] bool, positions that may be corrupted and are scored. Prompt and padding
            positions are never eligible.
        documents: [B, L] int32, 0 on padding; elements attend to each other only within the same
            positive number.
        units: [B] int32, how many units of measurement the eligible elements stand for: characters
            of the raw text, or pixels times channels.
    """

    tokens: Array
    eligible: Array
    documents: Array
    units: Array


BIAS_LABELS = ("exact", "truncated", "biased")
"""From best to worst.

``exact``: the expectation of losses and gradients is that of the whole bound, for every model.
``truncated``: it is the expectation over a stated part of the noise range.
``biased``: it is something else, by design.
"""


def worst_bias(*labels: str) -> str:
    """The worst of the labels, which is that of whatever is made of their bearers.

    Raises:
        ValueError: if a label is none of :data:`BIAS_LABELS`.
    """
    for label in labels:
        if label not in BIAS_LABELS:
            raise ValueError(f"bias must be one of {', '.join(BIAS_LABELS)}, got {label!r}")
    return max(labels, key=BIAS_LABELS.index)
