"""First-hitting sampling: one token at a time at exact times, without a grid."""

import jax
import jax.numpy as jnp

from mdm_jax import schedules
from mdm_jax.draws import open_uniform
from mdm_jax.samplers.filters import LogitFilter, compose, draw_tokens
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


def first_hitting(token_filter: LogitFilter | None = None) -> Sampler:
    """Samples the continuous-time reverse process exactly: n forward passes for n masked tokens.

    Given n masked tokens at masking rate m, their reveal levels are independent and uniform on
    (0, m). The next one is the largest, ``m U^(1/n)``, at a place uniform among the n; the network
    is evaluated at that level. Every row has its own clock, kept in ``state.memory`` as the log of
    its masking rate [B] float32. Takes no grid. Bias: exact.

    Args:
        token_filter: e.g. ``temperature(0.8)``; with one, the sample is of the filtered model.

    References: Zheng et al. 2024 (masked diffusion models as time-agnostic masked models).
    """
    choose = compose() if token_filter is None else token_filter

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        del keys, mask_id
        return SamplerState(canvas, jnp.zeros(canvas.shape[0], jnp.float32))

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        tokens = state.tokens
        masked = tokens == context.mask_id
        left = jnp.sum(masked, axis=-1)
        u = jax.vmap(lambda key: open_uniform(key, ()))(row_streams(context.keys, "clock"))
        log_rate = next_log_rate(u, state.memory, left)
        place = _uniform_place(row_streams(context.keys, "place"), masked, left)

        read = read_places(denoise, tokens, schedules.logsnr_from_log_masking_rate(log_rate))
        here = read(place[:, None])[:, 0]
        drawn = draw_tokens(row_streams(context.keys, "token"), choose(here))
        reveal = masked & (jnp.arange(tokens.shape[1])[None] == place[:, None])
        return SamplerState(jnp.where(reveal, drawn[:, None], tokens), log_rate)

    return Sampler("first_hitting", init, step, no_mask_left, lambda length: length, "exact")


def next_log_rate(u: Array, log_rate: Array, masked_count: Array) -> Array:
    """log of ``m U^(1/n)``, the level of the next reveal; float32, all arguments of one shape.

    Its law has the distribution function ``(y / m)^n`` on (0, m) and the mean ``m n / (n + 1)``.
    """
    return log_rate + jnp.log(u) / jnp.maximum(masked_count, 1)


def _uniform_place(keys: Array, masked: Array, masked_count: Array) -> Array:
    def rank(key: Array, count: Array) -> Array:
        return jax.random.randint(key, (), 0, jnp.maximum(count, 1))

    chosen = jax.vmap(rank)(keys, masked_count)
    order = jnp.cumsum(masked, axis=-1) - 1
    return jnp.argmax(masked & (order == chosen[:, None]), axis=-1)
