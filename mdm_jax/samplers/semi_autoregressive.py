"""Blocks from left to right, each filled in a fixed number of steps: how LLaDA generates.

What its authors call remasking happens within a step: tokens are drawn at all masked places of the
block, some are kept and the others masked again. A token once kept stays.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdm_jax.draws import open_uniform
from mdm_jax.samplers.filters import LogitFilter, compose, draw_tokens
from mdm_jax.samplers.sampler import (
    Denoise,
    Sampler,
    SamplerState,
    StepContext,
    no_mask_left,
    row_streams,
)
from mdm_jax.samplers.scores import best_places, counted_logsnr
from mdm_jax.typing import Array

Preference = Callable[[StepContext, Array, Array], Array]
"""``preference(context, logits [B, L, K], drawn [B, L]) -> [B, L]``: the highest are kept."""


def low_confidence_remasking(
    block_size: int, steps_per_block: int, token_filter: LogitFilter | None = None
) -> Sampler:
    """Keeps the drawn tokens that the network finds most likely. Takes no grid.

    A row's places to fill are cut, from left to right and whatever lies between them, into blocks
    of ``block_size``; the last may be shorter. A block of n places keeps ``floor(n / steps)``
    tokens per step, and one more in the first ``n mod steps`` steps. The likelihood of a token is
    that of the network's own distribution, also where a filter draws it from another.

    Bias: biased, towards likely tokens: the kept ones are the most likely of those drawn.

    Args:
        block_size: places per block; the length of the row for a single block.
        steps_per_block: forward passes per block; as many as places for one token at a time.
        token_filter: e.g. ``temperature(0.0)``.

    Raises:
        ValueError: if a number is below 1.

    Reference: Nie et al. 2025 (LLaDA, arXiv 2502.09992), low-confidence remasking.
    """

    def probability(context: StepContext, logits: Array, drawn: Array) -> Array:
        del context
        probs = jax.nn.softmax(logits, axis=-1)
        return jnp.take_along_axis(probs, drawn[..., None], axis=-1)[..., 0]

    return _in_blocks(
        "low_confidence_remasking", block_size, steps_per_block, token_filter, probability
    )


def random_remasking(
    block_size: int, steps_per_block: int, token_filter: LogitFilter | None = None
) -> Sampler:
    """Keeps drawn tokens at random; otherwise as :func:`low_confidence_remasking`.

    Bias: biased by the order of the blocks. In a single block it is discretised, and exact at one
    token per step.

    Args:
        block_size: as for :func:`low_confidence_remasking`, like the rest.
        steps_per_block: likewise.
        token_filter: likewise.

    Raises:
        ValueError: if a number is below 1.

    Reference: Nie et al. 2025 (LLaDA), random remasking.
    """

    def noise(context: StepContext, logits: Array, drawn: Array) -> Array:
        del logits
        shape = drawn.shape[1:]
        keys = row_streams(context.keys, "order")
        return jax.vmap(lambda key: open_uniform(key, shape))(keys)

    return _in_blocks("random_remasking", block_size, steps_per_block, token_filter, noise)


def kept_count(block_places: Array, step_in_block: Array, steps_per_block: int) -> Array:
    """How many of a block's n places a step fills: ``floor(n / steps)``, and one more early on."""
    extra = step_in_block < block_places % steps_per_block
    return block_places // steps_per_block + extra.astype(block_places.dtype)


def _in_blocks(
    name: str,
    block_size: int,
    steps_per_block: int,
    token_filter: LogitFilter | None,
    preference: Preference,
) -> Sampler:
    if block_size < 1 or steps_per_block < 1:
        raise ValueError(
            f"{name} needs block_size and steps_per_block of at least 1, got {block_size} and "
            f"{steps_per_block}"
        )
    choose = compose() if token_filter is None else token_filter

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        del keys, mask_id
        return SamplerState(canvas, ())

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        block, step_in_block = jnp.divmod(context.index, steps_per_block)
        number = (jnp.cumsum(context.free, axis=-1) - 1) // block_size
        current = context.free & (number == block)
        count = kept_count(jnp.sum(current, axis=-1), step_in_block, steps_per_block)

        def fill(tokens: Array) -> Array:
            logits = denoise(tokens, counted_logsnr(tokens, context.free, context.mask_id))
            drawn = draw_tokens(row_streams(context.keys, "token"), choose(logits))
            masked = current & (tokens == context.mask_id)
            keep = best_places(preference(context, logits, drawn), masked, count)
            return jnp.where(keep, drawn, tokens)

        tokens = jax.lax.cond(jnp.any(count > 0), fill, lambda tokens: tokens, state.tokens)
        return SamplerState(tokens, ())

    def num_steps(length: int) -> int:
        return -(-length // block_size) * steps_per_block

    return Sampler(name, init, step, no_mask_left, num_steps)
