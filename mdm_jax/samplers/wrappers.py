"""Changing what a network says before a sampler hears it.

A :data:`~mdm_jax.samplers.filters.LogitFilter` sees one place's logits and nothing else. A wrapper
also sees the tokens of the row and which of them were given, in generation block by block also what
stands before the block (``context.before``), and goes around the whole network, so that it works in
every sampler.

Self-conditioned sampling: each step shows the network what it estimated in the last one.

Classifier-free guidance by the given tokens.

Generation without repeated n-grams, in any order of places.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mdm_jax.corruption.token_estimate import token_estimate
from mdm_jax.samplers.by_score import counted_logsnr
from mdm_jax.samplers.sampler import Denoise, Sampler, SamplerState, StepContext
from mdm_jax.types import Array

DenoiseWrapper = Callable[[StepContext, Denoise], Denoise]
"""``wrapper(context, denoise) -> denoise`` of the same signature, with further keyword arguments
handed on if the wrapper is to stand between the network and another; rows must not see each
other."""


def wrapped(sampler: Sampler, *wrappers: DenoiseWrapper) -> Sampler:
    """A sampler that hears the network through wrappers, the first of them next to the network.

    ``wrapped(ancestral(), prompt_guidance(2.0), no_repeat_ngrams(3))`` guides and then forbids. The
    bias label stays: it is relative to what the sampler hears.
    """

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        for wrapper in wrappers:
            denoise = wrapper(context, denoise)
        return sampler.step(context, denoise, state)

    return sampler._replace(step=step)


def all_rows(tokens: Array, rows: Array | None) -> Array:
    """The rows of the canvas that ``tokens`` [N, L] belong to, [N] int32."""
    return jnp.arange(tokens.shape[0]) if rows is None else rows


def self_conditioned(sampler: Sampler, num_tokens: int, vocab_size: int) -> Sampler:
    """``sampler`` for a network that was trained with ``objectives.self_conditioned``.

    The network's probabilities of the clean tokens at the start of a step, [B, L, vocab_size], are
    carried in memory, next to the sampler's own, and given to the network in the next step; zeros
    in the first. The pass that makes them is made in every step, at the level of the step or, for a
    sampler without a grid, at :func:`~mdm_jax.samplers.scores.counted_logsnr`. It is also what the
    sampler hears when it asks for these tokens at this level, as most do once per step; whatever
    else it asks for costs passes of its own.

    The model function is ``model_fn(inputs, logsnr, documents, estimate=...)``. In
    ``sample_blocks`` the estimate is that of the block, and zeros in its first step.

    Bias: biased. The estimate is one step old, while a bound is that of a network which sees one of
    the same noisy tokens (``objectives.two_pass``).

    Args:
        sampler: any, masked or uniform.
        num_tokens: number of real tokens, as in training.
        vocab_size: number of the network's logits.

    Reference: Chen et al. 2022 (Analog Bits).
    """

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        start = sampler.init(keys, canvas, mask_id)
        nothing = jnp.zeros((*canvas.shape, vocab_size), jnp.float32)
        return SamplerState(start.tokens, (start.memory, nothing))

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        memory, estimate = state.memory
        level = context.logsnr
        if sampler.num_steps is not None:
            level = counted_logsnr(state.tokens, context.free, context.mask_id)
        logits = denoise(state.tokens, level, estimate=estimate)

        def conditioned(
            tokens: Array, logsnr: Array, rows: Array | None = None, **further: Any
        ) -> Array:
            seen = estimate if rows is None else estimate[rows]

            def ask() -> Array:
                return denoise(tokens, logsnr, rows, estimate=seen, **further)

            if rows is not None or further or jnp.shape(logsnr) != level.shape:
                return ask()
            same = jnp.all(tokens == state.tokens) & jnp.all(logsnr == level)
            return jax.lax.cond(same, lambda: logits, ask)

        new = sampler.step(context, conditioned, SamplerState(state.tokens, memory))
        return SamplerState(new.tokens, (new.memory, token_estimate(logits, num_tokens)))

    def finished(state: SamplerState, mask_id: int) -> Array:
        return sampler.finished(SamplerState(state.tokens, state.memory[0]), mask_id)

    name = f"self-conditioned {sampler.name}"
    return sampler._replace(name=name, init=init, step=step, finished=finished, bias="biased")


def prompt_guidance(scale: float) -> DenoiseWrapper:
    """Pushes logits away from those that the network has without the prompt; see ``wrapped``.

    ``y = y_u + scale (y_c - y_u)``, where the network for y_u sees every given token of the canvas
    masked. Both come from one pass over a doubled batch, so the network needs no training for it
    beyond rows that are masked throughout. Tokens ruled out in either pass keep the conditional
    logit.

    In ``sample_blocks``, which needs ``guided=True`` for it, what is given in the blocks before is
    not masked but left out, as padding is: a block model never met a mask token there. This takes
    two passes, each over a memory of its own.

    Args:
        scale: guidance scale, 1 for none; LLaDA's ``w + 1``.

    Raises:
        ValueError: if the scale is not a positive, finite number.

    References: Ho and Salimans 2022; Nie et al. 2024 (arXiv 2410.18514), unsupervised guidance of
    masked models. For two networks, and for a part of the levels: ``samplers.guided``.
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"prompt_guidance needs a finite scale > 0 (1 for none), got {scale}")

    def wrapper(context: StepContext, denoise: Denoise) -> Denoise:
        def guided(tokens: Array, logsnr: Array, rows: Array | None = None) -> Array:
            each = all_rows(tokens, rows)
            blind = jnp.where(context.free[each], tokens, context.mask_id)
            if context.before is not None:
                target = denoise(tokens, logsnr, rows)
                base = denoise(blind, logsnr, rows, without_prompt=True)
            else:
                level = jnp.asarray(logsnr)
                level = level if level.ndim == 0 else jnp.concatenate([level, level])
                twice = jnp.concatenate([each, each])
                both = denoise(jnp.concatenate([tokens, blind]), level, twice)
                target, base = jnp.split(both, 2)
            possible = jnp.isfinite(target) & jnp.isfinite(base)
            return jnp.where(possible, base + scale * (target - base), target)

        return guided

    return wrapper


_LOWEST = jnp.finfo(jnp.float32).min  # of the mask token, which is no way out either


def no_repeat_ngrams(n: int) -> DenoiseWrapper:
    """Rules out tokens that complete an n-gram which the row shows elsewhere; see ``wrapped``.

    A token at a masked place may complete an n-gram with visible ones to its left, its right or
    both; it is ruled out if another n visible tokens in a row, given or generated, then read the
    same. Where that would leave no token, all stay as they are. Samplers that fill one place at a
    time therefore never repeat an n-gram except in that case; tokens revealed in the same step do
    not see each other and may. In ``sample_blocks`` the row is what is written so far, up to the
    end of the block: tokens given in later blocks may repeat what was generated before them.

    Costs ``n^2 L^2`` comparisons per row and pass, ``n^2 (L' + n) L`` in blocks of L'.

    Args:
        n: length of the n-grams. 1 never uses a token twice.

    Raises:
        ValueError: unless n >= 1.
    """
    if n < 1:
        raise ValueError(f"no_repeat_ngrams needs n >= 1, got {n}")

    def wrapper(context: StepContext, denoise: Denoise) -> Denoise:
        def constrained(
            tokens: Array, logsnr: Array, rows: Array | None = None, **further: Any
        ) -> Array:
            logits = denoise(tokens, logsnr, rows, **further)
            before = context.before
            before = before if before is None or rows is None else before[rows]
            repeats = completes_repeat(tokens, n, context.mask_id, logits.shape[-1], before)
            left = jnp.any(~repeats & (logits > _LOWEST), axis=-1, keepdims=True)
            return jnp.where(repeats & left, -jnp.inf, logits)

        return constrained

    return wrapper


def completes_repeat(
    tokens: Array, n: int, mask_id: int, vocab_size: int, before: Array | None = None
) -> Array:
    """[B, L, K] bool: whether a token at a masked place would complete an n-gram seen elsewhere.

    Args:
        tokens: [B, L] int32.
        n: length of the n-grams.
        mask_id: the mask token.
        vocab_size: K.
        before: [B, P] int32, what stands before the tokens, with the mask token where nothing does;
            its masked places are not looked at.
    """
    past = 0 if before is None else before.shape[-1]
    rows = tokens if before is None else jnp.concatenate([before, tokens], axis=-1)
    if rows.shape[-1] < n:
        return jnp.zeros((*tokens.shape, vocab_size), bool)
    start = jnp.arange(rows.shape[-1] - n + 1)  # of every n-gram
    own = start[max(past - n + 1, 0) :]  # of those that reach the tokens
    shift = start[None, :] - own[:, None]

    def one_row(row: Array) -> Array:
        grams = row[start[:, None] + jnp.arange(n)[None]]  # [W, n], one per start
        seen = grams != mask_id
        mine, mine_seen = grams[own], seen[own]
        found = jnp.zeros((tokens.shape[-1], vocab_size), bool)
        for hole in range(n):
            # [own, W]: the n-gram of each start, with its hole filled, against all the others.
            place = own + hole - past
            same = (~mine_seen[:, hole] & (place >= 0))[:, None] & seen[:, hole][None]
            filler = grams[:, hole]
            for k in range(n):
                if k != hole:
                    plain = (mine[:, k][:, None] == grams[:, k][None]) & seen[:, k][None]
                    # The other n-gram covers the hole, too, and reads the filler there.
                    shared = mine[:, k][:, None] == filler[None]
                    same &= jnp.where(shift == hole - k, shared, plain) & mine_seen[:, k][:, None]
            where = jnp.broadcast_to(jnp.maximum(place, 0)[:, None], same.shape)
            found = found.at[where, jnp.broadcast_to(filler[None], same.shape)].max(same)
        return found

    return jax.vmap(one_row)(rows)
