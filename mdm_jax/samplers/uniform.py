"""Samplers of uniform-token diffusion along a grid: ancestral, and ancestral with re-noising."""

import math
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from mdm_jax.checks import Real, checked
from mdm_jax.corruption.uniform import check_num_tokens
from mdm_jax.samplers.ancestral import position_noise
from mdm_jax.samplers.filters import LogitFilter, compose, draw_tokens
from mdm_jax.samplers.sampler import (
    Sampler,
    SamplerState,
    StepContext,
    is_last,
    never_finished,
    row_streams,
)
from mdm_jax.types import Array

GreedyTail = Annotated[bool, "the last step takes the likeliest tokens"]


def uniform_ancestral(
    num_tokens: int, token_filter: LogitFilter | None = None, greedy_tail: GreedyTail = False
) -> Sampler:
    """Draw every position of every step from ``q(z_s | z_t, x)`` with the network's c for x.

    Starts from uniform tokens at the free positions, which the canvas marks by an id that is no
    real token. All may change in every step, drawn independently. c is that of
    ``objectives.losses.bound_rate``, ``num_tokens`` the K of ``corruption.uniform_tokens``;
    ``token_filter`` acts on c. ``greedy_tail`` takes the most likely token of ``q(x | z_t, c)`` in
    the last step (Duo takes that of c itself, in one more pass at a rate of 1e-5). Raises
    ValueError for fewer than two tokens, or a marker that is one of them.

    Bias: discretised; with a greedy tail biased. References: Austin et al. 2021 (D3PM), Schiff et
    al. 2024 (UDLM), Sahoo et al. 2025 (Duo; ancestral steps, with or without a greedy tail).
    """
    token_filter = token_filter or compose()

    def step(context, denoise, state):
        logits = token_filter(denoise(state.tokens, context.logsnr)[..., :num_tokens])
        law = reverse_logits(logits, state.tokens, context.logsnr, next_level(context))
        drawn = draw_tokens(row_streams(context.keys, "token"), law)
        if greedy_tail:
            likeliest = jnp.argmax(law, axis=-1).astype(drawn.dtype)
            drawn = jnp.where(is_last(context), likeliest, drawn)
        return SamplerState(drawn, ())

    init = uniform_start("uniform_ancestral", num_tokens)
    bias = "biased" if greedy_tail else "discretised"
    return Sampler("uniform_ancestral", init, step, never_finished, bias=bias)


@checked
def uniform_corrected(
    num_tokens: int,
    prediction: Annotated[float, Real("[0, 1]", "of positions", "by the reverse step")] = 0.9,
    token_filter: LogitFilter | None = None,
) -> Sampler:
    """Mix, position by position, the reverse step with one that draws the noise anew.

        z_s ~ prediction q(z_s | z_t, c) + (1 - prediction) sum_x q(z_s | x) q(x | z_t, c)

    with the network's probabilities c of clean tokens given the other positions. The second part
    draws a clean token and noises it to the next level, at no extra pass. For an ideal network each
    part preserves the law of a single noisy token given the others; at the last step they coincide.
    Arguments as of :func:`uniform_ancestral`, with ``prediction`` in [0, 1] (ValueError); 1 is
    ``uniform_ancestral``. This is Duo's psi-sampler with a constant share (their kappa) along any
    grid, without level-dependent shares, piecewise rules, constant-level stretch and greedy last
    step.

    Bias: biased; tokens re-noised in one step are independent, and their number does not vanish as
    the grid is refined. Repairs early errors of imperfect networks; an ideal one gains nothing.
    Reference: Deschenaux et al. 2026 (arXiv 2602.21185, Duo, chapter II) and its public code.
    """
    token_filter = token_filter or compose()

    def step(context, denoise, state):
        level = next_level(context)
        predict = position_noise(context.keys, state.tokens) < prediction
        logits = token_filter(denoise(state.tokens, context.logsnr)[..., :num_tokens])
        clean = reverse_logits(logits, state.tokens, context.logsnr, jnp.inf)
        law = jnp.where(
            predict[..., None],
            reverse_logits(logits, state.tokens, context.logsnr, level),
            noisy_logits(clean, level),
        )
        return SamplerState(draw_tokens(row_streams(context.keys, "token"), law), ())

    init = uniform_start("uniform_corrected", num_tokens)
    return Sampler("uniform_corrected", init, step, never_finished)


def reverse_logits(logits: Array, tokens: Array, logsnr: Array, next_logsnr: Array) -> Array:
    """log ``q(z_s | z_t, x)`` with probabilities c for x, up to a constant, [..., L, K].

    By Bayes' rule: :func:`noisy_logits` at level s plus :func:`step_evidence` for z_t (none for ids
    >= K); level t may be -inf, s +inf.
    """
    token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    evidence = step_evidence(logsnr, next_logsnr, logits.shape[-1])
    stay = jnp.where(token == tokens[..., None], evidence, 0.0)
    return noisy_logits(logits, next_logsnr) + stay


def noisy_logits(logits: Array, logsnr: Array) -> Array:
    """log of ``sigmoid(lambda) c + sigmoid(-lambda) / K``, the noisy token's law, [..., L, K]."""
    uniform = jax.nn.log_sigmoid(-logsnr) - math.log(logits.shape[-1])
    return jnp.logaddexp(jax.nn.log_sigmoid(logsnr) + jax.nn.log_softmax(logits, axis=-1), uniform)


def step_evidence(logsnr: Array, next_logsnr: Array, num_tokens: int) -> Array:
    """``log q(z_t = v | z_s = v) / q(z_t = v | z_s = w)`` for w != v, nats; exact at both ends.

    ``log(1 + K b / (1 - b))`` with the step's survival probability ``b = alpha_t / alpha_s``.
    """
    log_odds = logsnr - jax.nn.log_sigmoid(next_logsnr) - jnp.log(-jnp.expm1(logsnr - next_logsnr))
    return jax.nn.softplus(log_odds + math.log(num_tokens))


def uniform_start(name: str, num_tokens: int) -> Callable[[Array, Array, int], SamplerState]:
    """``init`` of a sampler that starts from uniform tokens at the marked positions."""
    check_num_tokens(name, num_tokens)

    def init(keys, canvas, mask_id):
        if mask_id < num_tokens:
            raise ValueError(
                f"{name}: positions to generate are marked by an id that is no real token, so "
                f"mask_id must be at least num_tokens = {num_tokens}, got {mask_id}"
            )
        shape = canvas.shape[1:]
        start = jax.vmap(lambda key: jax.random.randint(key, shape, 0, num_tokens))(keys)
        return SamplerState(jnp.where(canvas == mask_id, start, canvas), ())

    return init


def next_level(context: StepContext) -> Array:
    """The level after the step; +inf after the last one, also on a grid that was not checked."""
    return jnp.where(is_last(context), jnp.inf, context.next_logsnr)
