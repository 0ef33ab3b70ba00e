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
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.samplers.ancestral import place_noise, reveal_probability
from mdm_jax.samplers.filters import LogitFilter, compose, draw_tokens
from mdm_jax.samplers.sampler import (
    Denoise,
    Sampler,
    SamplerState,
    StepContext,
    never_finished,
    row_streams,
)
from mdm_jax.typing import Array


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
