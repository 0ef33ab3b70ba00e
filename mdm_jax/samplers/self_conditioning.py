"""Self-conditioned sampling: each step shows the network what it estimated in the last one."""

from typing import Any

import jax
import jax.numpy as jnp

from mdm_jax.corruption.token_estimate import token_estimate
from mdm_jax.samplers.sampler import Denoise, Sampler, SamplerState, StepContext
from mdm_jax.samplers.scores import counted_logsnr
from mdm_jax.typing import Array


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
