"""Denoiser wrappers, which modify logits before the sampler uses them, and wrapped samplers.

Unlike a :data:`~mdm_jax.samplers.filters.LogitFilter`, which gets the logits of one position, a
wrapper gets the row's tokens, which of them were given and, in blocks, the tokens before
(``context.before``). It works with every sampler.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Real, Whole, checked
from mdm_jax.corruption.uniform import token_estimate
from mdm_jax.samplers.by_score import counted_logsnr
from mdm_jax.samplers.sampler import Denoise, Sampler, SamplerState, Show, StepContext
from mdm_jax.types import Array

DenoiseWrapper = Callable[[StepContext, Denoise], Denoise]
"""``wrapper(context, denoise) -> denoise`` of the same signature, rows independent; it must pass
further keyword arguments on to stand between the network and another wrapper."""


def wrapped(sampler: Sampler, *wrappers: DenoiseWrapper) -> Sampler:
    """A sampler behind denoiser wrappers, the first of them next to the network.

    E.g. ``wrapped(ancestral(), prompt_guidance(2.0), no_repeat_ngrams(3))``; the bias label stays.
    """

    def step(context, denoise, state):
        for wrapper in wrappers:
            denoise = wrapper(context, denoise)
        return sampler.step(context, denoise, state)

    return sampler._replace(step=step)


def self_conditioned(sampler: Sampler, num_tokens: int, vocab_size: int) -> Sampler:
    """``sampler`` for a network trained with ``objectives.self_conditioned``.

    Memory carries the network's probabilities of the clean tokens at the start of a step, [B, L,
    vocab_size]; the next step passes them on as ``model_fn(..., estimate=...)``, zeros in the first
    step (of a block). They take one pass per step, at its level or, without a grid, at
    ``counted_logsnr``; the sampler reuses it for these tokens at this level, as most samplers do
    once per step. Other calls cost passes of their own. ``num_tokens``: real tokens, as in
    training; ``vocab_size``: number of logits.

    Bias: biased; the estimate is one step old, while the bound's is of the same noisy tokens
    (``objectives.two_pass``). Reference: Chen et al. 2022 (Analog Bits).
    """

    def init(keys, canvas, mask_id):
        start = sampler.init(keys, canvas, mask_id)
        nothing = jnp.zeros((*canvas.shape, vocab_size), jnp.float32)
        return SamplerState(start.tokens, (start.memory, nothing))

    def step(context, denoise, state):
        memory, estimate = state.memory
        level = context.logsnr
        if sampler.num_steps is not None:
            level = counted_logsnr(state.tokens, context.free, context.mask_id)
        logits = denoise(state.tokens, level, estimate=estimate)

        def conditioned(
            tokens: Array, logsnr: Array, rows: Array | None = None, **further: Any
        ) -> Array:
            own = estimate if rows is None else estimate[rows]

            def run() -> Array:
                return denoise(tokens, logsnr, rows, estimate=own, **further)

            if rows is not None or further or jnp.shape(logsnr) != level.shape:
                return run()
            same = jnp.all(tokens == state.tokens) & jnp.all(logsnr == level)
            return jax.lax.cond(same, lambda: logits, run)

        new = sampler.step(context, conditioned, SamplerState(state.tokens, memory))
        return SamplerState(new.tokens, (new.memory, token_estimate(logits, num_tokens)))

    def finished(state, mask_id):
        return sampler.finished(SamplerState(state.tokens, state.memory[0]), mask_id)

    name = f"self-conditioned {sampler.name}"
    return sampler._replace(name=name, init=init, step=step, finished=finished, bias="biased")


@checked
def prompt_guidance(
    scale: Annotated[float, Real("(0, 1e3]", "", "of guidance by given tokens; 1: none")],
    keep: Annotated[Sequence[int], Whole("[0, 2e9]", "tokens", "never masked", several=True)] = (),
) -> DenoiseWrapper:
    """Classifier-free guidance by the given tokens; see ``wrapped``.

    ``y = y_u + scale (y_c - y_u)``, with y_u the logits when every given token of the canvas is
    masked; one pass over a doubled batch. ``scale`` is 1 for none (LLaDA's ``w + 1``), positive and
    finite (ValueError). Needs no training beyond fully masked rows. Tokens excluded in either pass
    keep the conditional logit. Tokens in ``keep`` are never masked. In ``sample_blocks``, with
    ``guided=True``, given tokens of earlier blocks are padding instead (a block model never sees a
    mask there), at two passes, each over its own cache; there ``keep`` is a ValueError.

    References: Ho and Salimans 2022; Nie et al. 2024 (arXiv 2410.18514), unsupervised guidance of
    masked models. For two networks or a part of the levels: ``gaussian.samplers.guided``.
    """

    def wrapper(context: StepContext, denoise: Denoise) -> Denoise:
        def guided(tokens: Array, logsnr: Array, rows: Array | None = None) -> Array:
            numbers = jnp.arange(tokens.shape[0]) if rows is None else rows
            seen = context.free[numbers] | jnp.isin(tokens, jnp.asarray(keep, tokens.dtype))
            blind = jnp.where(seen, tokens, context.mask_id)
            if context.before is not None:
                if len(keep):
                    raise ValueError("prompt_guidance takes no keep in blocks, where caches differ")
                target = denoise(tokens, logsnr, rows)
                base = denoise(blind, logsnr, rows, without_prompt=True)
            else:
                level = jnp.asarray(logsnr)
                level = level if level.ndim == 0 else jnp.concatenate([level, level])
                twice = jnp.concatenate([numbers, numbers])
                both = denoise(jnp.concatenate([tokens, blind]), level, twice)
                target, base = jnp.split(both, 2)
            possible = jnp.isfinite(target) & jnp.isfinite(base)
            return jnp.where(possible, base + scale * (target - base), target)

        return guided

    return wrapper


def no_repeat_ngrams(n: int) -> DenoiseWrapper:
    """Exclude tokens that complete an n-gram which occurs elsewhere in the row; see ``wrapped``.

    A token at a masked position is excluded if, with visible tokens to its left, its right or both,
    it forms an n-gram equal to another visible one; if no token is left, none is excluded. Samplers
    that fill one position at a time never repeat an n-gram otherwise; tokens revealed in one step
    may. In ``sample_blocks`` the row ends with the current block. n >= 1 (ValueError); 1 never uses
    a token twice. Costs ``n^2 L^2`` comparisons per row and pass, ``n^2 (L' + n) L`` in blocks of
    L'.
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
            # The mask token's logit is the lowest float32 and does not count as a token left.
            possible = logits > jnp.finfo(jnp.float32).min
            left = jnp.any(~repeats & possible, axis=-1, keepdims=True)
            return jnp.where(repeats & left, -jnp.inf, logits)

        return constrained

    return wrapper


def completes_repeat(
    tokens: Array, n: int, mask_id: int, vocab_size: int, before: Array | None = None
) -> Array:
    """[B, L, K] bool: tokens that would complete an n-gram seen elsewhere, at masked positions."""
    past = 0 if before is None else before.shape[-1]
    rows = tokens if before is None else jnp.concatenate([before, tokens], axis=-1)
    if rows.shape[-1] < n:
        return jnp.zeros((*tokens.shape, vocab_size), bool)
    start = jnp.arange(rows.shape[-1] - n + 1)  # of every n-gram
    own = start[max(past - n + 1, 0) :]  # of those that reach the tokens
    shift = start[None, :] - own[:, None]

    def one_row(row: Array) -> Array:
        grams = row[start[:, None] + jnp.arange(n)[None]]  # [W, n], one per start
        visible = grams != mask_id
        own_grams, own_visible = grams[own], visible[own]
        repeats = jnp.zeros((tokens.shape[-1], vocab_size), bool)
        for hole in range(n):
            # [own, W]: the n-gram of each start, with its hole filled, against all the others.
            position = own + hole - past
            same = (~own_visible[:, hole] & (position >= 0))[:, None] & visible[:, hole][None]
            filler = grams[:, hole]
            for k in range(n):
                if k != hole:
                    plain = (own_grams[:, k, None] == grams[:, k][None]) & visible[:, k][None]
                    # An n-gram that covers the hole, too, has the filler there.
                    shared = own_grams[:, k, None] == filler[None]
                    same &= jnp.where(shift == hole - k, shared, plain) & own_visible[:, k, None]
            index = jnp.broadcast_to(jnp.maximum(position, 0)[:, None], same.shape)
            repeats = repeats.at[index, jnp.broadcast_to(filler[None], same.shape)].max(same)
        return repeats

    return jax.vmap(one_row)(rows)


def counted(sampler: Sampler) -> Sampler:
    """The sampler, whose ``memory`` is (its own, [B] int32: steps until a row was finished).

    A step of a sampler in blocks that fills no position does not count. Steps are forward passes,
    but that ancestral samplers skip the pass of steps that change no row, and correctors take more.
    """

    def own(state: SamplerState) -> SamplerState:
        return state._replace(memory=state.memory[0])

    def init(keys, canvas, mask_id):
        state = sampler.init(keys, canvas, mask_id)
        return state._replace(memory=(state.memory, jnp.zeros(len(canvas), jnp.int32)))

    def step(context, denoise, state):
        if sampler.blocks is None:
            runs = ~sampler.finished(own(state), context.mask_id)
        else:
            runs = sampler.blocks.of(context, state.tokens)[1]
        new = sampler.step(context, denoise, own(state))
        return new._replace(memory=(new.memory, state.memory[1] + runs))

    def finished(state, mask_id):
        return sampler.finished(own(state), mask_id)

    return sampler._replace(init=init, step=step, finished=finished)


def stopping_at(sampler: Sampler, stop_id: int) -> Sampler:
    """The sampler, but a row ends at this token where everything before it is filled.

    What is to be filled behind it becomes that token, unread. Given tokens end no row.
    """

    def step(context, denoise, state):
        new = sampler.step(context, denoise, state)
        masked = new.tokens == context.mask_id
        ends = context.free & (new.tokens == stop_id) & (jnp.cumsum(masked, axis=-1) == 0)
        behind = context.free & (jnp.cumsum(ends, axis=-1) > 0)
        return new._replace(tokens=jnp.where(behind, stop_id, new.tokens))

    return sampler._replace(step=step)


def shown(sampler: Sampler, show: Show, ordered: bool = True) -> Sampler:
    """The sampler, calling ``show(tokens [B, L] int32)`` on the host after every step.

    In generation block by block the tokens are those of the whole row, the mask token behind the
    block. ``ordered``: calls come in the order of the steps; for one device only.
    """

    def step(context, denoise, state):
        new = sampler.step(context, denoise, state)
        # As the loop leaves them: given tokens and finished rows stay.
        fixed = ~context.free | sampler.finished(state, context.mask_id)[:, None]
        tokens = jnp.where(fixed, state.tokens, new.tokens)
        if context.before is not None:  # as many masks in front as positions behind
            row = jnp.concatenate([context.before, tokens], axis=1)
            tokens = jnp.roll(row, context.start - context.before.shape[1], axis=1)
        jax.debug.callback(on_host, tokens, ordered=ordered)
        return new

    def on_host(tokens: Array) -> None:
        show(np.array(tokens))

    return sampler._replace(step=step)
