"""First-hitting sampling: one token at a time at exact times, without a grid."""

import jax
import jax.numpy as jnp

from mdm_jax import schedules
from mdm_jax.draws import open_uniform
from mdm_jax.samplers.filters import LogitFilter, compose, draw_tokens
from mdm_jax.samplers.sampler import (
    Sampler,
    SamplerState,
    no_mask_left,
    read_positions,
    row_streams,
)
from mdm_jax.types import Array


def first_hitting(token_filter: LogitFilter | None = None) -> Sampler:
    """Exact sampling of the continuous-time reverse process: n passes for n masked tokens.

    At masking rate m the reveal levels of n masked tokens are independent and uniform on (0, m).
    The next one is the largest, ``m U^(1/n)``, at a position uniform among the n; the network is
    evaluated at that level. ``state.memory`` is each row's log masking rate [B] float32. No grid.

    Bias: exact, for the filtered model if there is a ``token_filter``.

    Reference: Zheng et al. 2024 (masked diffusion models as time-agnostic masked models).
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
    """log of ``m U^(1/n)``, the level of the next reveal; float32, all arguments of one shape.

    Its law has the distribution function ``(y / m)^n`` on (0, m) and mean ``m n / (n + 1)``.
    """
    return log_rate + jnp.log(u) / jnp.maximum(masked_count, 1)


def _uniform_position(keys: Array, masked: Array, masked_count: Array) -> Array:
    def rank(key: Array, count: Array) -> Array:
        return jax.random.randint(key, (), 0, jnp.maximum(count, 1))

    picked = jax.vmap(rank)(keys, masked_count)
    order = jnp.cumsum(masked, axis=-1) - 1
    return jnp.argmax(masked & (order == picked[:, None]), axis=-1)
