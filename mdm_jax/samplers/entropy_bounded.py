"""As many places per step as a bound on their dependence allows."""

import jax.numpy as jnp

from mdm_jax.samplers.filters import LogitFilter, check_random, compose, draw_tokens
from mdm_jax.samplers.sampler import (
    Denoise,
    Sampler,
    SamplerState,
    StepContext,
    no_mask_left,
    row_streams,
)
from mdm_jax.samplers.scores import counted_logsnr, negative_entropy
from mdm_jax.typing import Array


def entropy_bounded(gamma: float, token_filter: LogitFilter | None = None) -> Sampler:
    """Fills, in order of entropy, the longest run of places whose dependence is at most ``gamma``.

    Tokens drawn in one step ignore each other. What that costs, the divergence between their joint
    law and the product of its margins, is at most the sum of their entropies without the largest
    one. Each step and row takes the most places, lowest entropy first, that keep this sum within
    ``gamma``; always at least one. Entropies are those of the filtered distribution, from which
    tokens are drawn. Takes no grid and at most one step per place; a network that asks for a level
    sees :func:`~mdm_jax.samplers.scores.counted_logsnr`.

    Bias: biased, towards tokens that are easy to predict.

    Args:
        gamma: bound per step, nats. 0 fills one place per step, and with it all that are certain.
        token_filter: e.g. ``temperature(0.8)``.

    Raises:
        ValueError: if gamma is negative or not a number; when sampling, if the filter leaves a
            single token, which has no entropy: everything would be filled at once.

    Reference: Ben-Hamu et al. 2025 (EB-Sampler, arXiv 2505.24857).
    """
    if not gamma >= 0:
        raise ValueError(f"entropy_bounded needs gamma >= 0 nats, got {gamma}")
    choose = compose() if token_filter is None else token_filter

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        del keys, mask_id
        return SamplerState(canvas, ())

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        tokens = state.tokens
        masked = tokens == context.mask_id
        level = counted_logsnr(tokens, context.free, context.mask_id)
        heard = denoise(tokens, level)
        check_random("entropy_bounded", choose, heard.shape[-1], "by_score(negative_entropy, ...)")
        logits = choose(heard)
        reveal = bounded_places(-negative_entropy(logits), masked, gamma)
        drawn = draw_tokens(row_streams(context.keys, "token"), logits)
        return SamplerState(jnp.where(reveal, drawn, tokens), ())

    return Sampler("entropy_bounded", init, step, no_mask_left, lambda length: length)


def bounded_places(entropy: Array, candidates: Array, gamma: float) -> Array:
    """[B, L] bool: the longest run of candidates, lowest entropy first, within the bound.

    The entropies [B, L] of all but the last of the run sum to at most ``gamma``. Of equal entropies
    the leftmost comes first. Rows without candidates get none.
    """
    order = jnp.lexsort((entropy, ~candidates), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    ordered = jnp.take_along_axis(jnp.where(candidates, entropy, 0.0), order, axis=-1)
    before = jnp.cumsum(ordered, axis=-1) - ordered
    # A difference of sums: the first has nothing before it, whatever rounding says.
    within = (before <= gamma) | (jnp.arange(entropy.shape[-1]) == 0)[None]
    return candidates & jnp.take_along_axis(within, rank, axis=-1)
