"""The places the network is surest of first."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mdm_jax.samplers.filters import LogitFilter, compose, draw_tokens
from mdm_jax.samplers.sampler import (
    Denoise,
    Sampler,
    SamplerState,
    StepContext,
    no_mask_left,
    row_streams,
)
from mdm_jax.samplers.scores import Score, best_places, confidence, counted_logsnr
from mdm_jax.typing import Array


def by_score(
    score: Score = confidence,
    tokens_per_step: int | Sequence[int] = 1,
    token_filter: LogitFilter | None = None,
) -> Sampler:
    """Fills the highest-scored masked places of each row, a given number per step. Takes no grid.

    Scores are those of the network's own distribution, whatever the filter makes of the tokens; of
    equal ones the leftmost place comes first. With ``temperature(0)`` nothing is random. A network
    that asks for a level sees :func:`~mdm_jax.samplers.scores.counted_logsnr`.

    Bias: biased, towards tokens that are easy to predict.

    Args:
        score: ``confidence``, ``margin``, ``negative_entropy`` or one's own.
        tokens_per_step: places per step, or the number for each step in turn; the last step then
            fills whatever is left.
        token_filter: e.g. ``temperature(0.0)`` for the most likely tokens.

    Raises:
        ValueError: if a number of tokens is below 1, or there is none.

    References: Chang et al. 2022 (MaskGIT), Kim et al. 2025 (margin).
    """
    whole = isinstance(tokens_per_step, int)
    counts = [tokens_per_step] if whole else [int(count) for count in tokens_per_step]
    if not counts or min(counts) < 1:
        raise ValueError(
            f"by_score needs tokens_per_step of at least 1 in every step, got {tokens_per_step}"
        )

    def count(context: StepContext, masked: Array) -> Array:
        if whole:
            return jnp.full_like(masked, tokens_per_step)
        last = context.index == context.num_steps - 1
        return jnp.where(last, masked, jnp.asarray(counts, masked.dtype)[context.index])

    def num_steps(length: int) -> int:
        return -(-length // tokens_per_step) if whole else len(counts)

    def level(context: StepContext, tokens: Array) -> Array:
        return counted_logsnr(tokens, context.free, context.mask_id)

    step = _step(count, level, score, token_filter)
    return Sampler("by_score", _init, step, no_mask_left, num_steps)


def by_score_along_grid(
    score: Score = confidence, token_filter: LogitFilter | None = None
) -> Sampler:
    """:func:`by_score` that leaves ``n m`` of n places masked at the masking rate m of each level.

    To the nearest whole number; where that is no change, the step costs nothing. Along the cosine
    grid over linear masking this is MaskGIT's schedule. Bias: biased, like ``by_score``.

    Args:
        score: as for :func:`by_score`.
        token_filter: likewise.
    """

    def count(context: StepContext, masked: Array) -> Array:
        total = jnp.sum(context.free, axis=-1)
        keep = jnp.round(total * jax.nn.sigmoid(-context.next_logsnr)).astype(masked.dtype)
        return jnp.where(context.index == context.num_steps - 1, masked, masked - keep)

    step = _step(count, lambda context, _: context.logsnr, score, token_filter)
    return Sampler("by_score_along_grid", _init, step, no_mask_left)


def _init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
    del keys, mask_id
    return SamplerState(canvas, ())


def _step(
    count: Callable[[StepContext, Array], Array],
    level: Callable[[StepContext, Array], Array],
    score: Score,
    token_filter: LogitFilter | None,
) -> Callable[[StepContext, Denoise, SamplerState], SamplerState]:
    """A step that fills ``count(context, masked [B])`` [B] places of each row."""
    choose = compose() if token_filter is None else token_filter

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        masked = state.tokens == context.mask_id
        wanted = count(context, jnp.sum(masked, axis=-1))

        def fill(tokens: Array) -> Array:
            logits = denoise(tokens, level(context, tokens))
            reveal = best_places(score(logits), masked, wanted)
            drawn = draw_tokens(row_streams(context.keys, "token"), choose(logits))
            return jnp.where(reveal, drawn, tokens)

        some = jnp.any((wanted > 0) & jnp.any(masked, axis=-1))
        tokens = jax.lax.cond(some, fill, lambda tokens: tokens, state.tokens)
        return SamplerState(tokens, ())

    return step
