"""ReMDM's loop: fill most places, then redraw at one level for a while, then finish."""

import jax
import jax.numpy as jnp

from mdm_jax.samplers.filters import LogitFilter, compose
from mdm_jax.samplers.remdm import reveal_and_remask, reveal_with_remasking
from mdm_jax.samplers.sampler import (
    Denoise,
    Sampler,
    SamplerState,
    StepContext,
    no_mask_left,
)
from mdm_jax.typing import Array

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
