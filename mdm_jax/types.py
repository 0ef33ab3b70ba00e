"""Shared types and the glossary of axes.

Axes, in this order: ``V`` views of one example (replications, as the two masks of MIRROR), ``B``
rows of the *global* batch, ``S`` noise levels per row (1, one per block or data type), ``L``
elements of a row (tokens or flattened pixels), ``K`` vocabulary entries. The noise coordinate is
the log signal-to-noise ratio ``logsnr`` = lambda, large values clean. For tokens the survival
probability is ``sigmoid(logsnr)``, the masking rate ``sigmoid(-logsnr)``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike

__all__ = [
    "BIAS_LABELS",
    "Array",
    "ArrayLike",
    "Batch",
    "KeyedBatch",
    "ModelFn",
    "PyTree",
    "worst_bias",
]

Array = jax.Array

PyTree = Any
"""Nested containers of arrays."""

ModelFn = Callable[..., Any]
"""``model_fn(inputs [N, L], logsnr [N, S] float32, documents [N, L] int32 | None)``: for tokens
logits [N, L, K] or a ``models.Readout`` of them, for Gaussian diffusion one number per element."""


class Batch(NamedTuple):
    """Clean examples in NumPy or JAX arrays; a single row has no leading axis.

    Attributes:
        tokens: [B, L] int32 clean token ids; padding holds any valid id.
        eligible: [B, L] bool, may be corrupted and carry a loss; False on prompt and padding.
        documents: [B, L] int32, 0 on padding; attention stays within a positive number. That of a
            picture is 1, or 2 plus its class where that is known.
        units: [B] int32 units of the eligible elements: raw text characters, or pixels x channels.
    """

    tokens: Array
    eligible: Array
    documents: Array
    units: Array


class KeyedBatch(NamedTuple):
    """A :class:`Batch` whose noise is keyed by example, not by slot.

    Attributes:
        example_keys: [B, L, 2] uint32: visits of the example in its source, and source and position
            of the token in the example; see :func:`mdm_jax.draws.by_example`.
    """

    tokens: Array
    eligible: Array
    documents: Array
    units: Array
    example_keys: Array


BIAS_LABELS = ("exact", "truncated", "biased")
"""Bias labels of estimators, from best to worst.

``exact``: the expectation of losses and gradients is that of the full bound, for every model.
``truncated``: that over a stated part of the noise range. ``biased``: something else, by design.
"""


def worst_bias(*labels: str) -> str:
    """The weakest label; a composition inherits it. ValueError for an unknown one."""
    for label in labels:
        if label not in BIAS_LABELS:
            raise ValueError(f"bias must be one of {', '.join(BIAS_LABELS)}, got {label!r}")
    return max(labels, key=BIAS_LABELS.index)
