"""Ancestral sampling of uniform-token diffusion along any grid of noise levels.

Predictor-corrector sampling of uniform-token diffusion, at one forward pass per step.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdm_jax.corruption.uniform import check_num_tokens
from mdm_jax.samplers.ancestral import place_noise
from mdm_jax.samplers.filters import LogitFilter, compose, draw_tokens
from mdm_jax.samplers.sampler import (
    Denoise,
    Sampler,
    SamplerState,
    StepContext,
    never_finished,
    row_streams,
)
from mdm_jax.types import Array


def uniform_ancestral(
    num_tokens: int, token_filter: LogitFilter | None = None, greedy_tail: bool = False
) -> Sampler:
    """Draws every place of every step from ``q(z_s | z_t, x)`` with the network's c for x.

    Sampling starts from uniform tokens at the free places, which are marked in the canvas by an id
    that is no real token. All of them may change in every step, and are drawn independently of each
    other: the law approaches the model's as the grid is refined. The network's output is that of
    ``objectives.bound_rate``.

    Bias: discretised; with a greedy tail biased.

    Args:
        num_tokens: K of ``corruption.uniform_tokens``.
        token_filter: e.g. ``compose(temperature(0.8), top_p(0.9))``, acts on c.
        greedy_tail: whether the last step, to clean tokens, takes each place's most likely one
            under ``q(x | z_t, c)``, the token that is there being evidence. Duo takes that of the
            network's output c itself, in one more pass at a rate of 1e-5.

    Raises:
        ValueError: for fewer than two tokens, or a marker that is one of them.

    References: Austin et al. 2021 (D3PM, uniform transitions), Schiff et al. 2024 (UDLM), Sahoo et
    al. 2025 (Duo; ancestral steps, with a greedy tail or without).
    """
    choose = compose() if token_filter is None else token_filter

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        logits = choose(denoise(state.tokens, context.logsnr)[..., :num_tokens])
        law = reverse_logits(logits, state.tokens, context.logsnr, next_level(context))
        drawn = draw_tokens(row_streams(context.keys, "token"), law)
        if greedy_tail:
            likeliest = jnp.argmax(law, axis=-1).astype(drawn.dtype)
            drawn = jnp.where(is_last(context), likeliest, drawn)
        return SamplerState(drawn, ())

    init = uniform_start("uniform_ancestral", num_tokens)
    bias = "biased" if greedy_tail else "discretised"
    return Sampler("uniform_ancestral", init, step, never_finished, bias=bias)


def reverse_logits(logits: Array, tokens: Array, logsnr: Array, next_logsnr: Array) -> Array:
    """log ``q(z_s | z_t, x)`` with probabilities c in place of x, up to a constant, [..., L, K].

    By Bayes' rule it is :func:`noisy_logits` of the cleaner level plus, for the token that is
    there, :func:`step_evidence`.

    Args:
        logits: [..., L, K] of c.
        tokens: [..., L] of z_t; a token that is none of the K is no evidence for any.
        logsnr: [] level t, may be -inf.
        next_logsnr: [] cleaner level s, may be +inf.
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
    """``log q(z_t = v | z_s = v) / q(z_t = v | z_s = w)`` for w != v, nats.

    With ``b = alpha_t / alpha_s``, the chance of surviving the step, it is
    ``log(1 + K b / (1 - b))``. Written without differences of probabilities and right at
    lambda_t = -inf and lambda_s = +inf.
    """
    log_odds = logsnr - jax.nn.log_sigmoid(next_logsnr) - jnp.log(-jnp.expm1(logsnr - next_logsnr))
    return jax.nn.softplus(log_odds + math.log(num_tokens))


def uniform_start(name: str, num_tokens: int) -> Callable[[Array, Array, int], SamplerState]:
    """``init`` of a sampler that starts from uniform tokens at the marked places."""
    check_num_tokens(name, num_tokens)

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        if mask_id < num_tokens:
            raise ValueError(
                f"{name}: places to generate are marked by an id that is no real token, so mask_id "
                f"must be at least num_tokens = {num_tokens}, got {mask_id}"
            )
        shape = canvas.shape[1:]
        start = jax.vmap(lambda key: jax.random.randint(key, shape, 0, num_tokens))(keys)
        return SamplerState(jnp.where(canvas == mask_id, start, canvas), ())

    return init


def is_last(context: StepContext) -> Array:
    """Whether this is the last step, [] bool."""
    return context.index == context.num_steps - 1


def next_level(context: StepContext) -> Array:
    """The level after the step; +inf after the last one, also on a grid that was not checked."""
    return jnp.where(is_last(context), jnp.inf, context.next_logsnr)


def uniform_corrected(
    num_tokens: int, prediction: float = 0.9, token_filter: LogitFilter | None = None
) -> Sampler:
    """Mixes the reverse step with one that draws the noise anew, place by place.

        z_s ~ prediction q(z_s | z_t, c) + (1 - prediction) sum_x q(z_s | x) q(x | z_t, c)

    with c the network's probabilities of clean tokens given the other places. The second part
    draws a clean token as the last step of ``uniform_ancestral`` would, and noises it to the next
    level: a token that was replaced may come back and one that survived may be replaced, where the
    reverse process only ever takes noise away. It needs no forward pass of its own. For an ideal
    network each part preserves the law of a single noisy token given the others. At the last step
    the two are one.

    This is the psi-sampler of Duo's second paper with a constant share (kappa, there) along any
    grid. What their release has beyond it is not here: shares that follow the level in ReMDM's
    manner, up to three stretches of the grid with a rule each, a stretch of constant level, and the
    greedy last step. The sampler of Duo's first paper is ``uniform_ancestral``.

    Bias: biased. Tokens that are noised anew in the same step are so without regard to each other,
    and their number does not vanish as the grid is refined. The sampler is meant for networks whose
    earlier tokens are wrong; an ideal one gains nothing by it.

    Args:
        num_tokens: K of ``corruption.uniform_tokens``.
        prediction: share of the reverse step, in [0, 1]; 1 is ``uniform_ancestral``.
        token_filter: acts on c.

    Raises:
        ValueError: for fewer than two tokens, a marker that is one of them, or a share outside
            [0, 1].

    References: Deschenaux et al. 2026 (arXiv 2602.21185, Duo, chapter II) and its public code.
    """
    if not 0 <= prediction <= 1:
        raise ValueError(f"uniform_corrected needs a prediction share in [0, 1], got {prediction}")
    choose = compose() if token_filter is None else token_filter

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        level = next_level(context)
        predict = place_noise(context.keys, state.tokens) < prediction
        logits = choose(denoise(state.tokens, context.logsnr)[..., :num_tokens])
        clean = reverse_logits(logits, state.tokens, context.logsnr, jnp.inf)
        law = jnp.where(
            predict[..., None],
            reverse_logits(logits, state.tokens, context.logsnr, level),
            noisy_logits(clean, level),
        )
        return SamplerState(draw_tokens(row_streams(context.keys, "token"), law), ())

    init = uniform_start("uniform_corrected", num_tokens)
    return Sampler("uniform_corrected", init, step, never_finished)
