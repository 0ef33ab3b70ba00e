"""Ancestral sampling along a grid of noise levels; first hitting, its exact form without a grid."""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from mdm_jax import schedules
from mdm_jax.checks import Whole, checked
from mdm_jax.draws import open_uniform
from mdm_jax.samplers.filters import LogitFilter, compose, draw_tokens, draw_tokens_at
from mdm_jax.samplers.sampler import (
    Sampler,
    SamplerState,
    StepContext,
    canvas_only,
    evaluate_positions,
    is_last,
    no_mask_left,
    read_positions,
    row_streams,
)
from mdm_jax.types import Array

_MIN_POSITIONS = 8


def ancestral(token_filter: LogitFilter | None = None) -> Sampler:
    """Reveal each masked token with probability ``(m_t - m_s) / m_t`` per step from m_t to m_s.

    A step that reveals nothing in any row costs no forward pass. Positions are selected before
    tokens are drawn, so tail tokens keep their probability (Zheng et al. 2024). ``token_filter`` is
    e.g. ``compose(temperature(0.8), top_p(0.9))``.

    Bias: discretised; the error falls like 1/N in the number of steps. References: Austin et al.
    2021 (D3PM), Sahoo et al. 2024 (MDLM), Shi et al. 2024 (MD4).
    """
    token_filter = token_filter or compose()

    def step(context, denoise, state):
        reveal = positions_to_reveal(context, state.tokens)
        keys = row_streams(context.keys, "token")
        size = positions_per_read(context, state.tokens.shape[1])

        def fill(tokens: Array) -> Array:
            read = read_positions(denoise, tokens, context.logsnr)
            return fill_positions(keys, reveal, tokens, token_filter, read, size)

        tokens = jax.lax.cond(jnp.any(reveal), fill, lambda tokens: tokens, state.tokens)
        return SamplerState(tokens, ())

    return Sampler("ancestral", canvas_only, step, no_mask_left, bias="discretised")


@checked
def cached_ancestral(
    rows_per_pass: Annotated[int, Whole("[1, 1e6]", "rows", "of a forward pass")],
    token_filter: LogitFilter | None = None,
) -> Sampler:
    """:func:`ancestral` that runs the network only on rows in which the step reveals a token.

    Same tokens under the same key, up to rounding by batch size. Nothing is stored, unlike in
    MDLM's caching sampler, and networks may depend on the level. A row of L positions takes ``N (1
    - (1 - 1/N)^L)`` passes on average on N levels uniform in the masking rate. Small
    ``rows_per_pass`` waste less on the last pass of a step, large ones use the hardware better.
    Rows are packed, which moves them across devices if the batch is sharded.

    Bias: discretised. Reference: Sahoo et al. 2024 (MDLM), caching.
    """
    token_filter = token_filter or compose()

    def step(context, denoise, state):
        batch_size = state.tokens.shape[0]
        size = min(rows_per_pass, batch_size)
        num_read = positions_per_read(context, state.tokens.shape[1])
        reveal = positions_to_reveal(context, state.tokens)
        needed = jnp.any(reveal, axis=-1)
        # Rows to run come first; batch_size, which is not written, pads the last pass.
        order = jnp.argsort(~needed, stable=True)
        order = jnp.pad(order, (0, -batch_size % size), constant_values=batch_size)

        def run(index: Array, tokens: Array) -> Array:
            targets = jax.lax.dynamic_slice_in_dim(order, index * size, size)
            rows = jnp.minimum(targets, batch_size - 1)
            read = read_positions(denoise, tokens[rows], context.logsnr, rows)
            keys = row_streams(context.keys[rows], "token")
            filled = fill_positions(keys, reveal[rows], tokens[rows], token_filter, read, num_read)
            return tokens.at[targets].set(filled, mode="drop")

        passes = -(-jnp.sum(needed) // size)
        return SamplerState(jax.lax.fori_loop(0, passes, run, state.tokens), ())

    return Sampler("cached_ancestral", canvas_only, step, no_mask_left, bias="discretised")


def positions_to_reveal(context: StepContext, tokens: Array) -> Array:
    """[B, L] bool: masked positions that an ancestral step fills."""
    probability = reveal_probability(context.logsnr, context.next_logsnr)
    # Exactly 1 at the end of every valid grid; forced because a traced grid is not checked.
    probability = jnp.where(is_last(context), 1.0, probability)
    return (tokens == context.mask_id) & (position_noise(context.keys, tokens) < probability)


def positions_per_read(context: StepContext, length: int) -> int:
    """A number of positions that one step of one row seldom exceeds."""
    return max(_MIN_POSITIONS, 2 * length // context.num_steps)


def fill_positions(
    keys: Array,
    reveal: Array,
    tokens: Array,
    token_filter: LogitFilter,
    read: Callable[[Array], Array],
    size: int,
) -> Array:
    """Tokens [B, L] with one drawn at each of ``reveal`` [B, L], ``size`` positions at a time."""

    def draw(positions: Array) -> Array:
        return draw_tokens_at(keys, token_filter(read(positions)), positions)

    return evaluate_positions(reveal, size, draw, tokens)


def position_noise(keys: Array, tokens: Array) -> Array:
    """[B, L] uniforms that decide which positions change; each row's from its own key."""
    shape = tokens.shape[1:]
    return jax.vmap(lambda key: open_uniform(key, shape))(row_streams(keys, "reveal"))


def reveal_probability(logsnr: Array, next_logsnr: Array) -> Array:
    """``(m_t - m_s) / m_t`` for masking rates m = sigmoid(-logsnr), exact at infinite levels."""
    return -jnp.expm1(logsnr - next_logsnr) * jax.nn.sigmoid(next_logsnr)


def first_hitting(token_filter: LogitFilter | None = None) -> Sampler:
    """Exact sampling of the continuous-time reverse process: n passes for n masked tokens, no grid.

    At masking rate m the reveal levels of n masked tokens are independent and uniform on (0, m).
    The next is the largest, ``m U^(1/n)``, at a position uniform among the n; the network runs at
    that level. ``state.memory`` is each row's log masking rate [B] float32.

    Bias: exact, for the filtered model. Reference: Zheng et al. 2024 (time-agnostic masked models).
    """
    token_filter = token_filter or compose()

    def init(keys, canvas, mask_id):
        del keys, mask_id
        return SamplerState(canvas, jnp.zeros(canvas.shape[0], jnp.float32))

    def step(context, denoise, state):
        tokens = state.tokens
        masked = tokens == context.mask_id
        left = jnp.sum(masked, axis=-1)
        u = jax.vmap(lambda key: open_uniform(key, ()))(row_streams(context.keys, "clock"))
        log_rate = next_log_rate(u, state.memory, left)
        position = _uniform_position(row_streams(context.keys, "place"), masked, left)

        read = read_positions(denoise, tokens, schedules.logsnr_from_log_masking_rate(log_rate))
        logits = read(position[:, None])[:, 0]
        drawn = draw_tokens(row_streams(context.keys, "token"), token_filter(logits))
        reveal = masked & (jnp.arange(tokens.shape[1])[None] == position[:, None])
        return SamplerState(jnp.where(reveal, drawn[:, None], tokens), log_rate)

    return Sampler("first_hitting", init, step, no_mask_left, lambda length: length, "exact")


def next_log_rate(u: Array, log_rate: Array, masked_count: Array) -> Array:
    """log of ``m U^(1/n)``, the level of the next reveal; float32, all arguments of one shape."""
    return log_rate + jnp.log(u) / jnp.maximum(masked_count, 1)


def _uniform_position(keys: Array, masked: Array, masked_count: Array) -> Array:
    def rank(key: Array, count: Array) -> Array:
        return jax.random.randint(key, (), 0, jnp.maximum(count, 1))

    picked = jax.vmap(rank)(keys, masked_count)
    order = jnp.cumsum(masked, axis=-1) - 1
    return jnp.argmax(masked & (order == picked[:, None]), axis=-1)
