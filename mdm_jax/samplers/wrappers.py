"""Changing what a network says before a sampler hears it.

A :data:`~mdm_jax.samplers.filters.LogitFilter` sees one place's logits and nothing else. A wrapper
also sees the tokens of the row and which of them were given, in generation block by block also what
stands before the block (``context.before``), and goes around the whole network, so that it works in
every sampler.
"""

from collections.abc import Callable

import jax.numpy as jnp

from mdm_jax.samplers.sampler import Denoise, Sampler, SamplerState, StepContext
from mdm_jax.typing import Array

DenoiseWrapper = Callable[[StepContext, Denoise], Denoise]
"""``wrapper(context, denoise) -> denoise`` of the same signature, with further keyword arguments
handed on if the wrapper is to stand between the network and another; rows must not see each
other."""


def wrapped(sampler: Sampler, *wrappers: DenoiseWrapper) -> Sampler:
    """A sampler that hears the network through wrappers, the first of them next to the network.

    ``wrapped(ancestral(), prompt_guidance(2.0), no_repeat_ngrams(3))`` guides and then forbids. The
    bias label stays: it is relative to what the sampler hears.
    """

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        for wrapper in wrappers:
            denoise = wrapper(context, denoise)
        return sampler.step(context, denoise, state)

    return sampler._replace(step=step)


def all_rows(tokens: Array, rows: Array | None) -> Array:
    """The rows of the canvas that ``tokens`` [N, L] belong to, [N] int32."""
    return jnp.arange(tokens.shape[0]) if rows is None else rows
