"""Ancestral sampling that runs the network on no row that does not need it."""

import jax
import jax.numpy as jnp

from mdm_jax.samplers.ancestral import fill_places, places_at_once, places_to_reveal
from mdm_jax.samplers.filters import LogitFilter, compose
from mdm_jax.samplers.sampler import (
    Denoise,
    Sampler,
    SamplerState,
    StepContext,
    no_mask_left,
    read_places,
    row_streams,
)
from mdm_jax.typing import Array


def cached_ancestral(rows_per_pass: int, token_filter: LogitFilter | None = None) -> Sampler:
    """:func:`~mdm_jax.samplers.ancestral`, paying for those rows only in which something changes.

    MDLM's caching sampler keeps the logits of a time-free network until a token changes, for the
    batch as a whole. Here each row is on its own, and nothing needs to be stored: which places a
    step reveals is known before the logits are, so a row in which it reveals nothing is skipped,
    and one in which it reveals something has no valid logits to go back to, since its last ones
    were used up by the change that followed. Hence it is right for networks that see the level,
    too. The rows to run are packed into passes of ``rows_per_pass``.

    The tokens are those of ``ancestral`` under the same key, as far as the network's rounding does
    not depend on its batch size. On N levels uniform in the masking rate a row of L places takes
    ``N (1 - (1 - 1/N)^L)`` passes on average, never more than L. Packing moves rows across devices
    if the batch is sharded. Bias: discretised.

    Args:
        rows_per_pass: rows of one pass of the network. Small ones waste less on the last pass of a
            step, large ones use the hardware better.
        token_filter: as for ``ancestral``.

    Raises:
        ValueError: unless rows_per_pass >= 1.

    Reference: Sahoo et al. 2024 (MDLM), caching.
    """
    if rows_per_pass < 1:
        raise ValueError(f"cached_ancestral needs rows_per_pass >= 1, got {rows_per_pass}")
    choose = compose() if token_filter is None else token_filter

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        del keys, mask_id
        return SamplerState(canvas, ())

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        batch_size = state.tokens.shape[0]
        size = min(rows_per_pass, batch_size)
        places = places_at_once(context, state.tokens.shape[1])
        reveal = places_to_reveal(context, state.tokens)
        needed = jnp.any(reveal, axis=-1)
        # Rows to run come first; the number behind the last row fills up the last pass.
        order = jnp.argsort(~needed, stable=True)
        order = jnp.pad(order, (0, -batch_size % size), constant_values=batch_size)

        def run(index: Array, tokens: Array) -> Array:
            seats = jax.lax.dynamic_slice_in_dim(order, index * size, size)
            rows = jnp.minimum(seats, batch_size - 1)
            read = read_places(denoise, tokens[rows], context.logsnr, rows)
            keys = row_streams(context.keys[rows], "token")
            filled = fill_places(keys, reveal[rows], tokens[rows], choose, read, places)
            return tokens.at[seats].set(filled, mode="drop")

        passes = -(-jnp.sum(needed) // size)
        return SamplerState(jax.lax.fori_loop(0, passes, run, state.tokens), ())

    return Sampler("cached_ancestral", init, step, no_mask_left, bias="discretised")
