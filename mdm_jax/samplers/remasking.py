"""ReMDM: ancestral steps that put some revealed tokens back under the mask, to be drawn again.

With survival probabilities a_t < a_s before and after a step and a remasking probability sigma,

    revealed:  masked again with probability  sigma
    masked:    revealed with probability      (a_s - (1 - sigma) a_t) / (1 - a_t)

so that, for every sigma up to ``min(1, (1 - a_s) / a_t)``, a place is masked with probability
``1 - a_s`` after the step, as without remasking. At the last level none can be remasked.

If the network were the exact posterior of some law, all of these would have that law as their
limit. A trained network's conditionals contradict each other, and remasking then leads to another
law than filling each place once: they are labelled biased for this reason.

Reference: Wang et al. 2025 (arXiv 2503.00307).

ReMDM's loop: fill most places, then redraw at one level for a while, then finish.

Ancestral steps, each followed by redrawing at the level that it reached.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.samplers.ancestral import place_noise, reveal_probability
from mdm_jax.samplers.filters import LogitFilter, check_random, compose, draw_tokens
from mdm_jax.samplers.sampler import (
    Denoise,
    Sampler,
    SamplerState,
    StepContext,
    never_finished,
    no_mask_left,
    row_streams,
)
from mdm_jax.types import Array


def remdm_cap(eta: float, token_filter: LogitFilter | None = None) -> Sampler:
    """Remasks every revealed token with probability ``min(eta, largest possible)`` per step.

    ``eta = 0`` is ancestral sampling. Bias: biased (see the module).

    Args:
        eta: in [0, 1].
        token_filter: as for ``ancestral``.

    Raises:
        ValueError: if eta is out of range.
    """
    check_probability("remdm_cap", eta)
    return _without_memory("remdm_cap", lambda largest: jnp.minimum(eta, largest), token_filter)


def remdm_rescale(eta: float, token_filter: LogitFilter | None = None) -> Sampler:
    """Remasks every revealed token with ``eta`` times the largest possible probability per step.

    ``eta = 0`` is ancestral sampling; ``eta = 1`` forgets as much as the levels allow. Bias: biased
    (see the module).

    Args:
        eta: in [0, 1].
        token_filter: as for ``ancestral``.

    Raises:
        ValueError: if eta is out of range.
    """
    check_probability("remdm_rescale", eta)
    return _without_memory("remdm_rescale", lambda largest: eta * largest, token_filter)


def remdm_confidence(token_filter: LogitFilter | None = None) -> Sampler:
    """Remasks by how unsure the network was: a share of the largest possible probability per place.

    The shares are ``softmax(-confidence)`` over a row's revealed places, where the confidence is
    the network's own probability of the token when it was revealed, kept in ``state.memory``
    [B, L]. Masked places have the share 0 and are revealed as without remasking, so that somewhat
    more places are masked than the levels say. Bias: biased.

    Args:
        token_filter: as for ``ancestral``.
    """
    choose = compose() if token_filter is None else token_filter

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        del keys, mask_id
        return SamplerState(canvas, jnp.zeros(canvas.shape, jnp.float32))

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        revealed = context.free & (state.tokens != context.mask_id)
        doubt = jax.nn.softmax(-state.memory, axis=-1, where=revealed)
        largest = largest_remasking(context.logsnr, context.next_logsnr)
        remask = jnp.where(revealed, largest * doubt, 0.0)
        reveal = reveal_probability(context.logsnr, context.next_logsnr)
        move = reveal_and_remask(context, denoise, choose, state.tokens, reveal, remask)
        memory = jnp.where(move.revealed, move.probability, state.memory)
        return SamplerState(move.tokens, memory)

    return Sampler("remdm_confidence", init, step, never_finished)


class Move(NamedTuple):
    """What :func:`reveal_and_remask` did.

    Attributes:
        tokens: [B, L] int32, afterwards.
        revealed: [B, L] bool, places that were filled.
        probability: [B, L] float32, the network's own probability of the tokens drawn there.
    """

    tokens: Array
    revealed: Array
    probability: Array


def reveal_and_remask(
    context: StepContext,
    denoise: Denoise,
    choose: LogitFilter,
    tokens: Array,
    reveal: Array,
    remask: Array,
) -> Move:
    """Reveals masked places and masks revealed ones, each place on its own.

    The network is asked at ``context.logsnr``, and only if some place is revealed. The last step
    reveals everything and remasks nothing, whatever the probabilities.

    Args:
        context: of the step.
        denoise: the network.
        choose: filter of its logits.
        tokens: [B, L], before.
        reveal: [] or [B, L], probability for a masked place.
        remask: [] or [B, L], probability for a revealed place that was not given.
    """
    last = context.index == context.num_steps - 1
    masked = tokens == context.mask_id
    noise = place_noise(context.keys, tokens)
    fill = masked & (last | (noise < reveal))
    clear = context.free & ~masked & ~last & (noise < remask)

    def run(tokens: Array) -> tuple[Array, Array]:
        logits = denoise(tokens, context.logsnr)
        drawn = draw_tokens(row_streams(context.keys, "token"), choose(logits))
        probs = jax.nn.softmax(logits, axis=-1)
        probability = jnp.take_along_axis(probs, drawn[..., None], axis=-1)[..., 0]
        return jnp.where(fill, drawn, tokens), probability

    def skip(tokens: Array) -> tuple[Array, Array]:
        return tokens, jnp.zeros(tokens.shape, jnp.float32)

    filled, probability = jax.lax.cond(jnp.any(fill), run, skip, tokens)
    return Move(jnp.where(clear, context.mask_id, filled), fill, probability)


def largest_remasking(logsnr: Array, next_logsnr: Array) -> Array:
    """``min(1, (1 - a_s) / a_t)``: the most that a step from level t to s can remask."""
    survival = jax.nn.sigmoid(logsnr)
    ratio = jax.nn.sigmoid(-next_logsnr) / jnp.where(survival > 0, survival, 1.0)
    # Nothing is revealed yet at survival 0, and nothing could be remasked.
    return jnp.where(survival > 0, jnp.minimum(ratio, 1.0), 1.0)


def reveal_with_remasking(logsnr: Array, next_logsnr: Array, remask: Array) -> Array:
    """``(a_s - (1 - sigma) a_t) / (1 - a_t)``, as much as keeps the share of masked places.

    Written as the probability without remasking plus ``sigma a_t / (1 - a_t)``, where the odds are
    those of the level itself.
    """
    odds = jnp.exp(jnp.minimum(logsnr, 80.0))  # finite, as 0 times infinity is not
    return reveal_probability(logsnr, next_logsnr) + remask * odds


def check_probability(name: str, eta: float) -> None:
    """Raises ValueError unless ``eta`` is in [0, 1]."""
    if not 0 <= eta <= 1:
        raise ValueError(f"{name} needs a remasking probability eta in [0, 1], got {eta}")


def _without_memory(
    name: str, remasking: Callable[[Array], Array], token_filter: LogitFilter | None
) -> Sampler:
    """ReMDM with one remasking probability for all places, a function of the largest possible."""
    choose = compose() if token_filter is None else token_filter

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        del keys, mask_id
        return SamplerState(canvas, ())

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        remask = remasking(largest_remasking(context.logsnr, context.next_logsnr))
        reveal = reveal_with_remasking(context.logsnr, context.next_logsnr, remask)
        move = reveal_and_remask(context, denoise, choose, state.tokens, reveal, remask)
        return SamplerState(move.tokens, ())

    return Sampler(name, init, step, never_finished)


_ROUNDING = 1e-6  # of times in float32


def remdm_loop(
    eta: float = 0.02,
    on: float = 0.55,
    off: float = 0.05,
    survival_on: float = 0.9,
    token_filter: LogitFilter | None = None,
) -> Sampler:
    """Ancestral to ``survival_on``, remasking at that level, then ancestral to the end.

    The grid's masking rates serve as times, which fall from 1 to 0. The survival probability rises
    linearly to ``survival_on`` at the time ``on``, stays there until ``off``, and rises to 1. Steps
    that lie within [off, on] remask each revealed token with probability ``eta`` and reveal as many
    in return; all others remask nothing. On the grid of uniform rates a share ``1 - on`` of the
    steps belongs to the first phase, ``on - off`` to the second and ``off`` to the third.

    Bias: biased (see :mod:`~mdm_jax.samplers.remdm`).

    Args:
        eta: probability of remasking per step, at most the largest possible at the level,
            ``min(1, (1 - survival_on) / survival_on)``.
        on: time at which remasking begins.
        off: time at which it ends.
        survival_on: share of places that are filled meanwhile.
        token_filter: as for ``ancestral``.

    Raises:
        ValueError: unless 0 < off < on < 1, 0 < survival_on < 1 and eta is in its range.

    Reference: Wang et al. 2025 (arXiv 2503.00307), whose settings are the defaults.
    """
    if not 0 < off < on < 1:
        raise ValueError(f"remdm_loop needs times 0 < off < on < 1, got on={on}, off={off}")
    if not 0 < survival_on < 1:
        raise ValueError(f"remdm_loop needs 0 < survival_on < 1, got {survival_on}")
    largest = min(1.0, (1 - survival_on) / survival_on)
    if not 0 <= eta <= largest:
        raise ValueError(
            f"remdm_loop needs eta in [0, {largest:.4g}], the most that survival_on={survival_on} "
            f"allows, got {eta}"
        )
    choose = compose() if token_filter is None else token_filter

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        del keys, mask_id
        return SamplerState(canvas, jnp.zeros(canvas.shape[0], bool))

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        time, next_time = jax.nn.sigmoid(-context.logsnr), jax.nn.sigmoid(-context.next_logsnr)
        frozen = (time <= on + _ROUNDING) & (next_time >= off - _ROUNDING)
        level = loop_logsnr(context.logsnr, on, off, survival_on)
        next_level = loop_logsnr(context.next_logsnr, on, off, survival_on)
        remask = jnp.where(frozen, eta, 0.0)
        reveal = reveal_with_remasking(level, jnp.where(frozen, level, next_level), remask)
        at_level = context._replace(logsnr=level, next_logsnr=next_level)
        move = reveal_and_remask(at_level, denoise, choose, state.tokens, reveal, remask)
        over = next_time <= off + _ROUNDING
        return SamplerState(move.tokens, jnp.broadcast_to(over, state.memory.shape))

    def finished(state: SamplerState, mask_id: int) -> Array:
        return state.memory & no_mask_left(state, mask_id)

    return Sampler("remdm_loop", init, step, finished)


def loop_logsnr(logsnr: Array, on: float, off: float, survival_on: float) -> Array:
    """Level of the loop at the time ``sigmoid(-logsnr)``; infinite at the two ends."""
    time, past = jax.nn.sigmoid(-logsnr), jax.nn.sigmoid(logsnr)
    # Each side from the end it vanishes at, so that neither is a difference of equal numbers.
    first = past * (survival_on / (1 - on))
    third = time * ((1 - survival_on) / off)
    survival = jnp.where(time > on, first, jnp.where(time < off, 1 - third, survival_on))
    rate = jnp.where(time > on, 1 - first, jnp.where(time < off, third, 1 - survival_on))
    return jnp.log(survival) - jnp.log(rate)


def predictor_corrector(
    corrector_steps: int = 1, eta: float = 0.1, token_filter: LogitFilter | None = None
) -> Sampler:
    """Each step of the grid is an ancestral one, then ``corrector_steps`` that stay at its level.

    A corrector step at the masking rate m masks each revealed place with the probability
    ``sigma = min(eta, m / (1 - m))`` and reveals each masked one with ``sigma (1 - m) / m``. The
    two flows are equal: a place that is masked with probability m, and otherwise holds a token of
    the law from which the network draws, keeps exactly this law. So a corrector step leaves the
    product of such places invariant if the network's distributions do not depend on the context,
    and the noised law of the data up to order sigma^2 if they are its exact conditionals.

    Costs up to ``1 + corrector_steps`` passes per step; the last step needs no correction. Bias:
    biased, for the reason given in :mod:`~mdm_jax.samplers.remdm`.

    Args:
        corrector_steps: number of corrections per level.
        eta: probability of remasking per correction, in (0, 1]; cut to what the level allows.
        token_filter: as for ``ancestral``.

    Raises:
        ValueError: if a setting is out of range; when sampling, if the filter leaves a single
            token, since a correction has to draw from the network's distribution.

    References: Campbell et al. 2022 (correctors of discrete diffusion); the step is that of ReMDM
    at a standing level.
    """
    if corrector_steps < 1:
        raise ValueError(
            f"predictor_corrector needs corrector_steps >= 1, got {corrector_steps}; without any "
            "it is ancestral()"
        )
    check_probability("predictor_corrector", eta)
    if eta == 0:
        raise ValueError("predictor_corrector with eta = 0 corrects nothing; use ancestral()")
    choose = compose() if token_filter is None else token_filter

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        del keys, mask_id
        return SamplerState(canvas, ())

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        reached = context.next_logsnr
        # At the last level nothing is masked and nothing is remasked.
        sigma = jnp.minimum(eta, largest_remasking(reached, reached))
        standing = jnp.where(jnp.isfinite(reached), reached, 0.0)
        balance = jnp.where(
            jnp.isfinite(reached), reveal_with_remasking(standing, standing, sigma), 0.0
        )

        def draw_from(logits: Array) -> Array:
            size = logits.shape[-1]
            check_random("predictor_corrector", choose, size, "ancestral(...) or remdm_cap(...)")
            return choose(logits)

        def move(index: Array, tokens: Array) -> Array:
            # One body for both kinds of step, so that the network is compiled once.
            predict = index == 0
            keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(context.keys)
            level = jnp.where(predict, context.logsnr, reached)
            forward = reveal_probability(context.logsnr, reached)
            return reveal_and_remask(
                context._replace(keys=keys, logsnr=level),
                denoise,
                draw_from,
                tokens,
                jnp.where(predict, forward, balance),
                jnp.where(predict, 0.0, sigma),
            ).tokens

        tokens = jax.lax.fori_loop(0, 1 + corrector_steps, move, state.tokens)
        return SamplerState(tokens, ())

    return Sampler("predictor_corrector", init, step, never_finished)
