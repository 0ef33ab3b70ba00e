"""Samplers that fill certain positions first: by score, bounded entropy, or in blocks (LLaDA)."""

from collections.abc import Callable, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp

from mdm_jax.checks import Real, Whole, checked
from mdm_jax.draws import open_uniform
from mdm_jax.samplers.filters import LogitFilter, check_random, compose, draw_filtered, draw_tokens
from mdm_jax.samplers.sampler import (
    Blocks,
    Sampler,
    SamplerState,
    StepContext,
    canvas_only,
    evaluate_positions,
    is_last,
    no_mask_left,
    read_positions,
    row_streams,
)
from mdm_jax.types import Array

Score = Callable[[Array], Array]
"""``score(logits [..., K]) -> [...] float32``: positions of high score are filled first."""

Preference = Callable[[StepContext, Array, Array, Array | None], Array]
"""``preference(context, logits [B, C, K], drawn [B, C], positions [B, C]) -> [B, C]``: the highest
are filled. Positions None: all, in order."""

Count = Callable[[StepContext, Array, Array, Array], Array]
"""``count(context, total [B], left [B, L] bool, step []) -> [B]``: tokens of a step of a block of
``total`` positions, where ``left`` of the row up to its end are masked."""


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


@checked
def by_score(
    score: Score = confidence,
    tokens_per_step: Annotated[
        int | Sequence[int], Whole("[1, 2e9]", "tokens", "of a step", several=True)
    ] = 1,
    token_filter: LogitFilter | None = None,
) -> Sampler:
    """Fill the masked positions of highest score in each row, a fixed number per step. No grid.

    Scores are of the unfiltered distribution; ties go to the left. Deterministic with
    ``temperature(0)``. The network runs at the level :func:`counted_logsnr`. ``score`` is
    ``confidence``, ``margin``, ``negative_entropy`` or your own; ``tokens_per_step`` a number or
    one per step, the last of which fills the rest, each >= 1 (ValueError).

    Bias: biased, towards tokens that are easy to predict. References: Chang et al. 2022 (MaskGIT),
    Kim et al. 2025 (margin).
    """
    constant = isinstance(tokens_per_step, int)
    counts = [tokens_per_step] if constant else [int(count) for count in tokens_per_step]
    if not counts:
        raise ValueError("by_score needs tokens_per_step of at least one step, got none")

    def select(context: StepContext, masked: Array) -> tuple[Array, Array]:
        left = jnp.sum(masked, axis=-1)
        if constant:
            return masked, jnp.full_like(left, tokens_per_step)
        count = jnp.asarray(counts, left.dtype)[context.index]
        return masked, jnp.where(is_last(context), left, count)

    def num_steps(length: int) -> int:
        return -(-length // tokens_per_step) if constant else len(counts)

    step = _fill_preferred(select, _scored(score), token_filter)
    return Sampler("by_score", canvas_only, step, no_mask_left, num_steps)


def by_score_along_grid(
    score: Score = confidence, token_filter: LogitFilter | None = None
) -> Sampler:
    """:func:`by_score` that leaves ``round(n m)`` of n positions masked at each level's rate m.

    MaskGIT on the cosine grid of linear masking. Unchanged steps cost no pass. Bias: biased.
    """

    def select(context: StepContext, masked: Array) -> tuple[Array, Array]:
        left, total = jnp.sum(masked, axis=-1), jnp.sum(context.free, axis=-1)
        keep = jnp.round(total * jax.nn.sigmoid(-context.next_logsnr)).astype(left.dtype)
        return masked, jnp.where(is_last(context), left, left - keep)

    step = _fill_preferred(select, _scored(score), token_filter, along_grid=True)
    return Sampler("by_score_along_grid", canvas_only, step, no_mask_left)


@checked
def entropy_bounded(
    gamma: Annotated[float, Real("[0, 1e6]", "nats", "bound on the entropies of a step")],
    token_filter: LogitFilter | None = None,
) -> Sampler:
    """Fill as many positions per step, by rising entropy, as a bound on dependence allows. No grid.

    The divergence between the joint law of independently drawn tokens and the true one is at most
    the sum of their entropies without the largest. Each step and row takes the most positions,
    lowest (filtered) entropy first, that keep this sum within ``gamma`` >= 0 nats, and at least
    one. At most one step per position; the network runs at the level :func:`counted_logsnr`. Raises
    ValueError for a negative or NaN gamma and, when sampling, for a filter that leaves a single
    token, whose entropy is 0: everything would be filled at once.

    Bias: biased, towards tokens that are easy to predict. Reference: Ben-Hamu et al. 2025
    (EB-Sampler, arXiv 2505.24857).
    """
    token_filter = token_filter or compose()

    def step(context, denoise, state):
        tokens = state.tokens
        logits = denoise(tokens, counted_logsnr(tokens, context.free, context.mask_id))
        alternative = "by_score(negative_entropy, ...)"
        check_random("entropy_bounded", token_filter, logits.shape[-1], alternative)
        logits = token_filter(logits)
        masked = tokens == context.mask_id
        reveal = bounded_positions(-negative_entropy(logits), masked, gamma)
        drawn = draw_tokens(row_streams(context.keys, "token"), logits)
        return SamplerState(jnp.where(reveal, drawn, tokens), ())

    return Sampler("entropy_bounded", canvas_only, step, no_mask_left, lambda length: length)


BlockSize = Annotated[int, Whole("[1, 2e9]", "tokens", "of a block, filled together")]
BlockSteps = Annotated[int, Whole("[1, 1e6]", "steps", "of a block")]


@checked
def low_confidence_remasking(
    block_size: BlockSize, steps_per_block: BlockSteps, token_filter: LogitFilter | None = None
) -> Sampler:
    """Draw all masked tokens of a block, keep the most likely, mask the others again. No grid.

    A row's positions to fill are split from left to right, whatever lies in between, into blocks of
    ``block_size`` (the last may be shorter). A block of n positions takes ``steps_per_block``
    passes and keeps ``floor(n / steps)`` tokens per step, one more in the first ``n mod steps``.
    Likelihoods are of the unfiltered distribution. Raises ValueError if a number is below 1.

    Bias: biased, towards likely tokens. Reference: Nie et al. 2025 (LLaDA, arXiv 2502.09992).
    """

    def preference(
        context: StepContext, logits: Array, drawn: Array, positions: Array | None
    ) -> Array:
        del context, positions
        return token_probability(logits, drawn)

    name = "low_confidence_remasking"
    return in_blocks(name, block_size, steps_per_block, preference, token_filter)


@checked
def random_remasking(
    block_size: BlockSize, steps_per_block: BlockSteps, token_filter: LogitFilter | None = None
) -> Sampler:
    """Keep drawn tokens at random; otherwise as :func:`low_confidence_remasking`.

    Bias: biased by block order; a single block discretised, exact at one token per step.
    """

    def noise(context: StepContext, logits: Array, drawn: Array, positions: Array | None) -> Array:
        del logits, drawn
        return order_noise(context, positions, open_uniform)

    return in_blocks("random_remasking", block_size, steps_per_block, noise, token_filter)


@checked
def confidence_parallel(
    block_size: BlockSize,
    threshold: Annotated[float, Real("[0, 1]", "probability", "filled above")] = 0.9,
    factor: Annotated[float, Real("[0, 1e3]", "", "in place of the threshold; 0: none")] = 0.0,
    token_filter: LogitFilter | None = None,
) -> Sampler:
    """Fill all positions of a block whose token is likely enough, at least one. No grid.

    Blocks and likelihoods are as of :func:`low_confidence_remasking`; a block takes at most a step
    per position. Likely enough: above ``threshold``, or with a ``factor`` f > 0 the n most likely
    of which the n-th has ``(n + 1)(1 - p_n) < f``; for f = 1 the most likely tokens of the n are
    then those of their joint law too.

    Bias: biased, towards likely tokens. Reference: Wu et al. 2025 (Fast-dLLM, arXiv 2505.22618).
    """

    def preference(
        context: StepContext, logits: Array, drawn: Array, positions: Array | None
    ) -> Array:
        del context, positions
        return token_probability(logits, drawn)

    def best(score: Array, candidates: Array, count: Array) -> Array:
        return confident_positions(score, candidates, count, threshold, factor)

    name = "confidence_parallel"
    return in_blocks(name, block_size, block_size, preference, token_filter, best=best)


def in_blocks(
    name: str,
    block_size: int,
    steps_per_block: int,
    preference: Preference,
    token_filter: LogitFilter | None,
    *,
    parts: Callable[[Array, Array], tuple[Array, Array]] | None = None,
    count: Count | None = None,
    best: Callable[[Array, Array, Array], Array] | None = None,
    excludes_mask: bool = True,
) -> Sampler:
    """The samplers above by their parts, for those that differ in some of them.

    ``parts(free [B, L], block [1 or B, 1]) -> (of_block, candidates)`` [B, L] are the positions
    of a block, and those that may be filled in it where they are masked; None: ``block_size`` free
    positions in order, and earlier ones, which are left only where the mask token itself was drawn.
    ``count`` None: :func:`kept_count`. ``best(score [B, L], candidates [B, L], count [B]) ->
    [B, L]`` is as :func:`best_positions`, the default.
    """

    def in_order(free: Array, block: Array) -> tuple[Array, Array]:
        number = (jnp.cumsum(free, axis=-1) - 1) // block_size
        return free & (number == block), free & (number <= block)

    def plan(context: StepContext, masked: Array) -> tuple[Array, Array, Array]:
        block, step_in_block = jnp.divmod(context.index, steps_per_block)
        of_block, candidates = (parts or in_order)(context.free, jnp.reshape(block, (-1, 1)))
        total, candidates = jnp.sum(of_block, axis=-1), candidates & masked
        if count is None:
            return of_block, candidates, kept_count(total, step_in_block, steps_per_block)
        return of_block, candidates, count(context, total, candidates, step_in_block)

    def select(context: StepContext, masked: Array) -> tuple[Array, Array]:
        return plan(context, masked)[1:]

    def num_steps(length: int) -> int:
        return -(-length // block_size) * steps_per_block

    def of(context: StepContext, tokens: Array) -> tuple[Array, Array]:
        of_block, candidates, wanted = plan(context, tokens == context.mask_id)
        return of_block, (wanted > 0) & jnp.any(candidates, axis=-1)

    step = _fill_preferred(select, preference, token_filter, best=best, size=block_size)
    options = {"excludes_mask": excludes_mask, "blocks": Blocks(block_size, of)}
    return Sampler(name, canvas_only, step, no_mask_left, num_steps, **options)


def best_positions(score: Array, candidates: Array, count: Array) -> Array:
    """[B, L] bool: the ``count`` [B] candidates of highest score all if fewer, ties left."""
    return candidates & (_rank(score, candidates) < count[:, None])


def confident_positions(
    score: Array, candidates: Array, count: Array, threshold: float | None, factor: float = 0.0
) -> Array:
    """[B, L] bool: the candidates that are likely enough, or the ``count`` best if these are more.

    Scores are probabilities; see :func:`confidence_parallel`.
    """
    if factor:  # n + 1 is the rank counted from 2; the inequality holds up to some rank
        enough = candidates & ((_rank(score, candidates) + 2) * (1 - score) < factor)
    else:
        enough = candidates & (score > threshold)
    best = best_positions(score, candidates, count)
    return jnp.where((jnp.sum(enough, axis=-1) >= count)[:, None], enough, best)


def _rank(score: Array, candidates: Array) -> Array:
    """[B, L]: 0 for the candidate of highest score, ties from the left; others come last."""
    return jnp.argsort(jnp.lexsort((-score, ~candidates), axis=-1), axis=-1)


def bounded_positions(entropy: Array, candidates: Array, gamma: float) -> Array:
    """[B, L] bool: most candidates by rising entropy, all but the last summing to <= gamma."""
    before = running_sums(entropy, candidates) - entropy
    # The first always fits; its sum is a difference, which rounding may make positive.
    first = best_positions(-entropy, candidates, jnp.ones(entropy.shape[:-1], int))
    return candidates & (first | (before <= gamma))


def running_sums(values: Array, candidates: Array) -> Array:
    """[B, L] sums of a candidate's value and all that are smaller, of ties those on the left."""
    order = jnp.lexsort((values, ~candidates), axis=-1)
    ordered = jnp.take_along_axis(jnp.where(candidates, values, 0.0), order, axis=-1)
    return jnp.take_along_axis(jnp.cumsum(ordered, axis=-1), jnp.argsort(order, axis=-1), axis=-1)


def counted_logsnr(tokens: Array, free: Array, mask_id: int) -> Array:
    """[B] float32 noise level of samplers without a grid, for k masked of n positions to fill.

    Masking rate ``(k - 1/2) / n``: the middle of those at which fixed counts mask k of n.
    """
    masked = jnp.maximum(jnp.sum(tokens == mask_id, axis=-1), 1)
    total = jnp.sum(free, axis=-1)
    return jnp.log(jnp.maximum(total - masked, 0) + 0.5) - jnp.log(masked - 0.5)


def kept_count(block_positions: Array, step_in_block: Array, steps_per_block: int) -> Array:
    """Tokens kept in a step of a block of n positions: ``floor(n / steps)``, one more early on."""
    extra = step_in_block < block_positions % steps_per_block
    return block_positions // steps_per_block + extra.astype(block_positions.dtype)


def token_probability(logits: Array, tokens: Array) -> Array:
    """``softmax(logits)`` [..., K] at the tokens [...]."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    total = jnp.sum(jnp.exp(logits - top), axis=-1)
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return jnp.exp(own - top)[..., 0] / total


def order_noise(
    context: StepContext, positions: Array | None, draw: Callable[[Array, tuple[int]], Array]
) -> Array:
    """``draw(key, (L,))`` of each row's stream "order", at the positions [B, C] or all, [B, L]."""
    shape = context.free.shape[1:]
    noise = jax.vmap(lambda key: draw(key, shape))(row_streams(context.keys, "order"))
    return noise if positions is None else jnp.take_along_axis(noise, positions, axis=1)


def _scored(score: Score) -> Preference:
    return lambda context, logits, drawn, positions: score(logits)  # noqa: ARG005


def _fill_preferred(
    select: Callable[[StepContext, Array], tuple[Array, Array]],
    preference: Preference,
    token_filter: LogitFilter | None,
    *,
    along_grid: bool = False,
    best: Callable[[Array, Array, Array], Array] | None = None,
    size: int | None = None,
):
    """Step that fills the best of ``select(context, masked) -> (candidates [B, L], count [B])``.

    Logits are computed for ``size`` candidates of a row at a time; None: for all positions at once.
    """
    token_filter = token_filter or compose()

    def step(context, denoise, state):
        candidates, count = select(context, state.tokens == context.mask_id)

        def fill(tokens: Array) -> Array:
            counted = counted_logsnr(tokens, context.free, context.mask_id)
            read = read_positions(denoise, tokens, context.logsnr if along_grid else counted)
            keys = row_streams(context.keys, "token")

            def evaluate(positions: Array | None) -> tuple[Array, Array]:
                logits = read(positions)
                drawn = draw_filtered(keys, logits, token_filter, positions)
                return drawn, preference(context, logits, drawn, positions)

            if size is None or size >= tokens.shape[1]:
                drawn, score = evaluate(None)
            else:
                empty = (tokens, jnp.zeros(tokens.shape, jnp.float32))
                drawn, score = evaluate_positions(candidates, size, evaluate, empty)
            reveal = (best or best_positions)(score, candidates, count)
            return jnp.where(reveal, drawn, tokens)

        needed = jnp.any((count > 0) & jnp.any(candidates, axis=-1))
        tokens = jax.lax.cond(needed, fill, lambda tokens: tokens, state.tokens)
        return SamplerState(tokens, ())

    return step
