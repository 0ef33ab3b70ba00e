"""ReMDM: ancestral steps that mask some revealed tokens again (Wang et al. 2025, arXiv 2503.00307).

A step from survival a_t to a_s remasks revealed tokens with probability sigma and reveals masked
ones with ``(a_s - (1 - sigma) a_t) / (1 - a_t)``. For sigma up to ``min(1, (1 - a_s) / a_t)`` a
position is then masked with probability ``1 - a_s``, as without remasking. Nothing is remasked at
the last level, nor with eta = 0 (ancestral sampling). Bias: all biased, since a trained network's
conditionals contradict each other and remasking leads to another law than filling once.
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from mdm_jax.checks import Real, Whole, checked
from mdm_jax.samplers.ancestral import position_noise, reveal_probability
from mdm_jax.samplers.by_score import token_probability
from mdm_jax.samplers.filters import LogitFilter, check_random, compose, draw_filtered
from mdm_jax.samplers.sampler import (
    Denoise,
    Sampler,
    SamplerState,
    StepContext,
    canvas_only,
    is_last,
    never_finished,
    no_mask_left,
    row_streams,
)
from mdm_jax.types import Array

_ROUNDING = 1e-6  # of times in float32


Eta = Annotated[float, Real("[0, 1]", "probability", "of remasking, in a step")]
LoopTime = Annotated[float, Real("(0, 1)", "time", "from 1, noise, to 0; off < on")]


@checked
def remdm_cap(eta: Eta, token_filter: LogitFilter | None = None) -> Sampler:
    """Remask revealed tokens with ``min(eta, largest possible)``, eta in [0, 1], per step."""
    return _uniform_remasking("remdm_cap", lambda largest: jnp.minimum(eta, largest), token_filter)


@checked
def remdm_rescale(eta: Eta, token_filter: LogitFilter | None = None) -> Sampler:
    """Remask revealed tokens with ``eta`` in [0, 1] times the largest probability per step."""
    return _uniform_remasking("remdm_rescale", lambda largest: eta * largest, token_filter)


def remdm_confidence(token_filter: LogitFilter | None = None) -> Sampler:
    """Remask uncertain tokens: each with its own share of the largest possible probability.

    Shares are ``softmax(-confidence)`` over a row's revealed positions; confidence is the network's
    unfiltered probability of the token when revealed (``state.memory`` [B, L]). Masked positions
    are revealed as without remasking, so somewhat more are masked than the levels imply. Bias:
    biased.
    """
    token_filter = token_filter or compose()

    def init(keys, canvas, mask_id):
        del keys, mask_id
        return SamplerState(canvas, jnp.zeros(canvas.shape, jnp.float32))

    def step(context, denoise, state):
        revealed = context.free & (state.tokens != context.mask_id)
        shares = jax.nn.softmax(-state.memory, axis=-1, where=revealed)
        largest = largest_remasking(context.logsnr, context.next_logsnr)
        remask = jnp.where(revealed, largest * shares, 0.0)
        reveal = reveal_probability(context.logsnr, context.next_logsnr)
        tokens, filled, probability = reveal_and_remask(
            context, denoise, token_filter, state.tokens, reveal, remask
        )
        return SamplerState(tokens, jnp.where(filled, probability, state.memory))

    return Sampler("remdm_confidence", init, step, never_finished)


@checked
def remdm_loop(
    eta: Eta = 0.02,
    on: LoopTime = 0.55,
    off: LoopTime = 0.05,
    survival_on: Annotated[float, Real("(0, 1)", "probability", "of survival in the loop")] = 0.9,
    token_filter: LogitFilter | None = None,
) -> Sampler:
    """Ancestral to ``survival_on``, remasking at that level, then ancestral to the end.

    The grid's masking rates serve as times from 1 to 0. The survival probability rises linearly to
    ``survival_on`` at time ``on``, stays until ``off`` and rises to 1. Steps within [off, on]
    remask each revealed token with probability ``eta`` and reveal as many; others remask nothing.
    Raises ValueError unless 0 < off < on < 1, 0 < survival_on < 1 and eta is in [0, ``min(1, (1 -
    survival_on) / survival_on)``].

    Bias: biased. Reference: Wang et al. 2025, whose settings are the defaults.
    """
    if not off < on:
        raise ValueError(f"remdm_loop needs times 0 < off < on < 1, got on={on}, off={off}")
    largest = min(1.0, (1 - survival_on) / survival_on)
    if not eta <= largest:
        raise ValueError(
            f"remdm_loop needs eta in [0, {largest:.4g}], the most that survival_on={survival_on} "
            f"allows, got {eta}"
        )
    token_filter = token_filter or compose()

    def init(keys, canvas, mask_id):
        del keys, mask_id
        return SamplerState(canvas, jnp.zeros(canvas.shape[0], bool))

    def step(context, denoise, state):
        time, next_time = jax.nn.sigmoid(-context.logsnr), jax.nn.sigmoid(-context.next_logsnr)
        constant = (time <= on + _ROUNDING) & (next_time >= off - _ROUNDING)
        level = loop_logsnr(context.logsnr, on, off, survival_on)
        next_level = loop_logsnr(context.next_logsnr, on, off, survival_on)
        remask = jnp.where(constant, eta, 0.0)
        reveal = reveal_with_remasking(level, jnp.where(constant, level, next_level), remask)
        at_level = context._replace(logsnr=level, next_logsnr=next_level)
        tokens, _, _ = reveal_and_remask(
            at_level, denoise, token_filter, state.tokens, reveal, remask
        )
        over = next_time <= off + _ROUNDING
        return SamplerState(tokens, jnp.broadcast_to(over, state.memory.shape))

    def finished(state, mask_id):
        return state.memory & no_mask_left(state, mask_id)

    return Sampler("remdm_loop", init, step, finished)


@checked
def predictor_corrector(
    corrector_steps: Annotated[int, Whole("[1, 1e4]", "steps", "after each; none: ancestral")] = 1,
    eta: Annotated[float, Real("(0, 1]", "probability", "of remasking; 0: ancestral")] = 0.1,
    token_filter: LogitFilter | None = None,
) -> Sampler:
    """Ancestral steps, each followed by ``corrector_steps`` at the level that it reached.

    A corrector step at masking rate m masks each revealed position with probability ``sigma =
    min(eta, m / (1 - m))`` and reveals each masked one with ``sigma (1 - m) / m``. Positions masked
    with probability m, and otherwise of the network's law, stay so exactly if that law ignores the
    context; the noised data law does up to order sigma^2 if the conditionals are exact. Costs up to
    ``1 + corrector_steps`` passes per step; the last step is not corrected. Raises ValueError
    unless corrector_steps >= 1 and eta is in (0, 1]; when sampling, if the filter leaves a single
    token.

    Bias: biased. Reference: Campbell et al. 2022 (correctors); the step is ReMDM's at a constant
    level.
    """
    token_filter = token_filter or compose()

    def checked_filter(logits: Array) -> Array:
        instead = "ancestral(...) or remdm_cap(...)"
        check_random("predictor_corrector", token_filter, logits.shape[-1], instead)
        return token_filter(logits)

    def step(context, denoise, state):
        reached = context.next_logsnr
        # At the last level nothing is masked and nothing is remasked.
        sigma = jnp.minimum(eta, largest_remasking(reached, reached))
        level = jnp.where(jnp.isfinite(reached), reached, 0.0)
        balance = reveal_with_remasking(level, level, sigma)
        balance = jnp.where(jnp.isfinite(reached), balance, 0.0)

        def move(index: Array, tokens: Array) -> Array:
            # One body for both kinds of step, so that the network is compiled once.
            predict = index == 0
            keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(context.keys)
            forward = reveal_probability(context.logsnr, reached)
            return reveal_and_remask(
                context._replace(keys=keys, logsnr=jnp.where(predict, context.logsnr, reached)),
                denoise,
                checked_filter,
                tokens,
                reveal=jnp.where(predict, forward, balance),
                remask=jnp.where(predict, 0.0, sigma),
            )[0]

        tokens = jax.lax.fori_loop(0, 1 + corrector_steps, move, state.tokens)
        return SamplerState(tokens, ())

    return Sampler("predictor_corrector", canvas_only, step, never_finished)


def reveal_and_remask(
    context: StepContext,
    denoise: Denoise,
    token_filter: LogitFilter,
    tokens: Array,
    reveal: Array,
    remask: Array,
) -> tuple[Array, Array, Array]:
    """Reveal masked positions and mask revealed ones, independently, by probabilities [] or [B, L].

    The network runs at ``context.logsnr``, and only if some position is revealed. The last step
    reveals everything and remasks nothing. Returns tokens [B, L] int32, filled positions [B, L]
    bool, and the network's unfiltered probability [B, L] of the tokens drawn.
    """
    last = is_last(context)
    masked = tokens == context.mask_id
    noise = position_noise(context.keys, tokens)
    fill = masked & (last | (noise < reveal))
    clear = context.free & ~masked & ~last & (noise < remask)

    def run(tokens: Array) -> tuple[Array, Array]:
        logits = denoise(tokens, context.logsnr)
        drawn = draw_filtered(row_streams(context.keys, "token"), logits, token_filter)
        return jnp.where(fill, drawn, tokens), token_probability(logits, drawn)

    def skip(tokens: Array) -> tuple[Array, Array]:
        return tokens, jnp.zeros(tokens.shape, jnp.float32)

    filled, probability = jax.lax.cond(jnp.any(fill), run, skip, tokens)
    return jnp.where(clear, context.mask_id, filled), fill, probability


def largest_remasking(logsnr: Array, next_logsnr: Array) -> Array:
    """``min(1, (1 - a_s) / a_t)``, the largest remasking probability of a step; 1 at a_t = 0."""
    survival = jax.nn.sigmoid(logsnr)
    ratio = jax.nn.sigmoid(-next_logsnr) / jnp.where(survival > 0, survival, 1.0)
    return jnp.where(survival > 0, jnp.minimum(ratio, 1.0), 1.0)


def reveal_with_remasking(logsnr: Array, next_logsnr: Array, remask: Array) -> Array:
    """``(a_s - (1 - sigma) a_t) / (1 - a_t)``, which keeps the share of masked positions."""
    odds = jnp.exp(jnp.minimum(logsnr, 80.0))  # finite, as 0 times infinity is not
    return reveal_probability(logsnr, next_logsnr) + remask * odds


def loop_logsnr(logsnr: Array, on: float, off: float, survival_on: float) -> Array:
    """Level of ``remdm_loop`` at the time ``sigmoid(-logsnr)``; infinite at the two ends."""
    time, past = jax.nn.sigmoid(-logsnr), jax.nn.sigmoid(logsnr)
    # Each side from the end where it vanishes, so that neither is a difference of equal numbers.
    first = past * (survival_on / (1 - on))
    third = time * ((1 - survival_on) / off)
    survival = jnp.where(time > on, first, jnp.where(time < off, 1 - third, survival_on))
    rate = jnp.where(time > on, 1 - first, jnp.where(time < off, third, 1 - survival_on))
    return jnp.log(survival) - jnp.log(rate)


def _uniform_remasking(
    name: str, remasking: Callable[[Array], Array], token_filter: LogitFilter | None
) -> Sampler:
    """ReMDM with one remasking probability for all positions, ``remasking(largest possible)``."""
    token_filter = token_filter or compose()

    def step(context, denoise, state):
        remask = remasking(largest_remasking(context.logsnr, context.next_logsnr))
        reveal = reveal_with_remasking(context.logsnr, context.next_logsnr, remask)
        tokens, _, _ = reveal_and_remask(
            context, denoise, token_filter, state.tokens, reveal, remask
        )
        return SamplerState(tokens, ())

    return Sampler(name, canvas_only, step, never_finished)
