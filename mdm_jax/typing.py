"""Shared type names and the glossary of axes.

Axes, always in this order where several occur:

* ``V`` views of one example (replications such as the two masks of MIRROR),
* ``B`` rows of the *global* batch,
* ``S`` independent noise levels per row (1; one per block; one per data type),
* ``L`` elements of a row (tokens, or pixels flattened),
* ``K`` vocabulary entries.

The noise coordinate is the log signal-to-noise ratio ``logsnr`` = lambda, with large values clean.
For tokens the survival probability is ``sigmoid(logsnr)``, the masking rate ``sigmoid(-logsnr)``.
"""

from collections.abc import Callable
from typing import Any

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
