"""How sure a network is of a place, and which places that puts first.

The places the network is surest of first.

As many places per step as a bound on their dependence allows.

Blocks from left to right, each filled in a fixed number of steps: how LLaDA generates.

What its authors call remasking happens within a step: tokens are drawn at all masked places of the
block, some are kept and the others masked again. A token once kept stays.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from mdm_jax.draws import open_uniform
from mdm_jax.samplers.filters import LogitFilter, check_random, compose, draw_tokens
from mdm_jax.samplers.sampler import (
    Denoise,
    Sampler,
    SamplerState,
    StepContext,
    no_mask_left,
    row_streams,
)
from mdm_jax.types import Array

Score = Callable[[Array], Array]
"""``score(logits [..., K]) -> [...] float32``: the higher, the earlier a place is filled."""


def confidence(logits: Array) -> Array:
    """Probability of the most likely token (MaskGIT, Chang et al. 2022)."""
    return jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)


def margin(logits: Array) -> Array:
    """Probability of the most likely token minus that of the next (Kim et al. 2025)."""
    best = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)[0]
    return best[..., 0] - best[..., 1]


def negative_entropy(logits: Array) -> Array:
    """``sum_v p_v log p_v``, nats; at most 0."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)
    return jnp.sum(probs * jnp.where(probs > 0, log_probs, 0.0), axis=-1)


def best_places(score: Array, candidates: Array, count: Array) -> Array:
    """[B, L] bool: the ``count`` [B] candidates of the highest score, of equal ones the leftmost.

    All of them where there are fewer. ``score`` [B, L] float32, ``candidates`` [B, L] bool.
    """
    order = jnp.lexsort((-score, ~candidates), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return candidates & (rank < count[:, None])


def counted_logsnr(tokens: Array, free: Array, mask_id: int) -> Array:
    """[B] float32: the level to show to a network when k of n places to fill are still masked.

    Samplers that count have no level of their own. The masking rate is taken as ``(k - 1/2) / n``,
    the middle of the rates at which fixed-count training masks k of n.
    """
    masked = jnp.maximum(jnp.sum(tokens == mask_id, axis=-1), 1)
    total = jnp.sum(free, axis=-1)
    return jnp.log(jnp.maximum(total - masked, 0) + 0.5) - jnp.log(masked - 0.5)


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


Preference = Callable[[StepContext, Array, Array], Array]
"""``preference(context, logits [B, L, K], drawn [B, L]) -> [B, L]``: the highest are kept."""


def low_confidence_remasking(
    block_size: int, steps_per_block: int, token_filter: LogitFilter | None = None
) -> Sampler:
    """Keeps the drawn tokens that the network finds most likely. Takes no grid.

    A row's places to fill are cut, from left to right and whatever lies between them, into blocks
    of ``block_size``; the last may be shorter. A block of n places keeps ``floor(n / steps)``
    tokens per step, and one more in the first ``n mod steps`` steps. The likelihood of a token is
    that of the network's own distribution, also where a filter draws it from another.

    Bias: biased, towards likely tokens: the kept ones are the most likely of those drawn.

    Args:
        block_size: places per block; the length of the row for a single block.
        steps_per_block: forward passes per block; as many as places for one token at a time.
        token_filter: e.g. ``temperature(0.0)``.

    Raises:
        ValueError: if a number is below 1.

    Reference: Nie et al. 2025 (LLaDA, arXiv 2502.09992), low-confidence remasking.
    """

    def probability(context: StepContext, logits: Array, drawn: Array) -> Array:
        del context
        probs = jax.nn.softmax(logits, axis=-1)
        return jnp.take_along_axis(probs, drawn[..., None], axis=-1)[..., 0]

    return _in_blocks(
        "low_confidence_remasking", block_size, steps_per_block, token_filter, probability
    )


def random_remasking(
    block_size: int, steps_per_block: int, token_filter: LogitFilter | None = None
) -> Sampler:
    """Keeps drawn tokens at random; otherwise as :func:`low_confidence_remasking`.

    Bias: biased by the order of the blocks. In a single block it is discretised, and exact at one
    token per step.

    Args:
        block_size: as for :func:`low_confidence_remasking`, like the rest.
        steps_per_block: likewise.
        token_filter: likewise.

    Raises:
        ValueError: if a number is below 1.

    Reference: Nie et al. 2025 (LLaDA), random remasking.
    """

    def noise(context: StepContext, logits: Array, drawn: Array) -> Array:
        del logits
        shape = drawn.shape[1:]
        keys = row_streams(context.keys, "order")
        return jax.vmap(lambda key: open_uniform(key, shape))(keys)

    return _in_blocks("random_remasking", block_size, steps_per_block, token_filter, noise)


def kept_count(block_places: Array, step_in_block: Array, steps_per_block: int) -> Array:
    """How many of a block's n places a step fills: ``floor(n / steps)``, and one more early on."""
    extra = step_in_block < block_places % steps_per_block
    return block_places // steps_per_block + extra.astype(block_places.dtype)


def _in_blocks(
    name: str,
    block_size: int,
    steps_per_block: int,
    token_filter: LogitFilter | None,
    preference: Preference,
) -> Sampler:
    if block_size < 1 or steps_per_block < 1:
        raise ValueError(
            f"{name} needs block_size and steps_per_block of at least 1, got {block_size} and "
            f"{steps_per_block}"
        )
    choose = compose() if token_filter is None else token_filter

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        del keys, mask_id
        return SamplerState(canvas, ())

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        block, step_in_block = jnp.divmod(context.index, steps_per_block)
        number = (jnp.cumsum(context.free, axis=-1) - 1) // block_size
        current = context.free & (number == block)
        count = kept_count(jnp.sum(current, axis=-1), step_in_block, steps_per_block)

        def fill(tokens: Array) -> Array:
            logits = denoise(tokens, counted_logsnr(tokens, context.free, context.mask_id))
            drawn = draw_tokens(row_streams(context.keys, "token"), choose(logits))
            masked = current & (tokens == context.mask_id)
            keep = best_places(preference(context, logits, drawn), masked, count)
            return jnp.where(keep, drawn, tokens)

        tokens = jax.lax.cond(jnp.any(count > 0), fill, lambda tokens: tokens, state.tokens)
        return SamplerState(tokens, ())

    def num_steps(length: int) -> int:
        return -(-length // block_size) * steps_per_block

    return Sampler(name, init, step, no_mask_left, num_steps)
