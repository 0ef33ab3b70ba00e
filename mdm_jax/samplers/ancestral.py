"""Ancestral sampling along any grid of noise levels.

Ancestral sampling that runs the network on no row that does not need it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdm_jax.draws import open_uniform
from mdm_jax.samplers.filters import LogitFilter, compose, draw_tokens_at
from mdm_jax.samplers.sampler import (
    Denoise,
    Sampler,
    SamplerState,
    StepContext,
    no_mask_left,
    read_places,
    row_streams,
)
from mdm_jax.types import Array

_PLACES_AT_ONCE = 8


def ancestral(token_filter: LogitFilter | None = None) -> Sampler:
    """Reveals each masked token with probability ``(m_t - m_s) / m_t`` per step from m_t to m_s.

    Tokens revealed in one step do not see each other, so the law approaches the model's as the grid
    is refined (its distance falls like 1/N). A step in which no row reveals anything costs no
    forward pass, which changes nothing else. Which places are revealed is settled before tokens are
    drawn, so tail tokens are not multiplied by a small probability (Zheng et al. 2024 describe what
    happens otherwise).

    Bias: discretised.

    Args:
        token_filter: e.g. ``compose(temperature(0.8), top_p(0.9))``.

    References: Austin et al. 2021 (D3PM, absorbing state), Sahoo et al. 2024 (MDLM), Shi et al.
    2024 (MD4).
    """
    choose = compose() if token_filter is None else token_filter

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        del keys, mask_id
        return SamplerState(canvas, ())

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        tokens = state.tokens
        reveal = places_to_reveal(context, tokens)
        keys = row_streams(context.keys, "token")
        size = places_at_once(context, tokens.shape[1])

        def fill(tokens: Array) -> Array:
            read = read_places(denoise, tokens, context.logsnr)
            return fill_places(keys, reveal, tokens, choose, read, size)

        tokens = jax.lax.cond(jnp.any(reveal), fill, lambda tokens: tokens, tokens)
        return SamplerState(tokens, ())

    return Sampler("ancestral", init, step, no_mask_left, bias="discretised")


def places_to_reveal(context: StepContext, tokens: Array) -> Array:
    """[B, L] bool: which masked places an ancestral step fills, decided before any token is."""
    probability = reveal_probability(context.logsnr, context.next_logsnr)
    # Exactly 1 at the end of every valid grid; forced because a traced grid is not checked.
    probability = jnp.where(context.index == context.num_steps - 1, 1.0, probability)
    return (tokens == context.mask_id) & (place_noise(context.keys, tokens) < probability)


def places_at_once(context: StepContext, length: int) -> int:
    """A number of places that is seldom exceeded in one step of one row."""
    return max(_PLACES_AT_ONCE, 2 * length // context.num_steps)


def fill_places(
    keys: Array,
    reveal: Array,
    tokens: Array,
    choose: LogitFilter,
    read: Callable[[Array], Array],
    size: int,
) -> Array:
    """Tokens [B, L] with one drawn at each place to reveal, ``size`` places of a row at a time.

    Args:
        keys: [B] typed keys, one per row.
        reveal: [B, L] bool.
        tokens: [B, L] int32.
        choose: filter of the logits.
        read: logits of places, from :func:`~mdm_jax.samplers.sampler.read_places`.
        size: places that are read and drawn together; changes nothing but the time it takes.
    """
    num_rows, length = tokens.shape
    size = min(size, length)
    # Places to reveal come first; the place behind the last fills up the end, and is not written.
    order = jnp.argsort(~reveal, axis=-1, stable=True)
    order = jnp.where(jnp.arange(length)[None] < jnp.sum(reveal, -1, keepdims=True), order, length)
    order = jnp.pad(order, ((0, 0), (0, -length % size)), constant_values=length)
    rows = jnp.arange(num_rows)[:, None]

    def fill(index: Array, tokens: Array) -> Array:
        seats = jax.lax.dynamic_slice_in_dim(order, index * size, size, axis=1)
        places = jnp.minimum(seats, length - 1)
        drawn = draw_tokens_at(keys, choose(read(places)), places)
        return tokens.at[rows, seats].set(drawn, mode="drop")

    passes = -(-jnp.max(jnp.sum(reveal, axis=-1)) // size)
    return jax.lax.fori_loop(0, passes, fill, tokens)


def place_noise(keys: Array, tokens: Array) -> Array:
    """[B, L] uniforms that decide which places change; each row's from its own key."""
    shape = tokens.shape[1:]
    return jax.vmap(lambda key: open_uniform(key, shape))(row_streams(keys, "reveal"))


def reveal_probability(logsnr: Array, next_logsnr: Array) -> Array:
    """``(m_t - m_s) / m_t`` for masking rates m = sigmoid(-logsnr), from level t to the cleaner s.

    Written as ``-expm1(lambda_t - lambda_s) sigmoid(lambda_s)``, which subtracts no rates from each
    other and stays exact at lambda_t = -inf and lambda_s = +inf.
    """
    return -jnp.expm1(logsnr - next_logsnr) * jax.nn.sigmoid(next_logsnr)


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
