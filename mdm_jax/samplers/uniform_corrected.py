"""Predictor-corrector sampling of uniform-token diffusion, at one forward pass per step."""

import jax.numpy as jnp

from mdm_jax.samplers.ancestral import place_noise
from mdm_jax.samplers.filters import LogitFilter, compose, draw_tokens
from mdm_jax.samplers.sampler import (
    Denoise,
    Sampler,
    SamplerState,
    StepContext,
    never_finished,
    row_streams,
)
from mdm_jax.samplers.uniform_ancestral import (
    next_level,
    noisy_logits,
    reverse_logits,
    uniform_start,
)


def uniform_corrected(
    num_tokens: int, prediction: float = 0.9, token_filter: LogitFilter | None = None
) -> Sampler:
    """Mixes the reverse step with one that draws the noise anew, place by place.

        z_s ~ prediction q(z_s | z_t, c) + (1 - prediction) sum_x q(z_s | x) q(x | z_t, c)

    with c the network's probabilities of clean tokens given the other places. The second part
    draws a clean token as the last step of ``uniform_ancestral`` would, and noises it to the next
    level: a token that was replaced may come back and one that survived may be replaced, where the
    reverse process only ever takes noise away. It needs no forward pass of its own. For an ideal
    network each part preserves the law of a single noisy token given the others. At the last step
    the two are one.

    This is the psi-sampler of Duo's second paper with a constant share (kappa, there) along any
    grid. What their release has beyond it is not here: shares that follow the level in ReMDM's
    manner, up to three stretches of the grid with a rule each, a stretch of constant level, and the
    greedy last step. The sampler of Duo's first paper is ``uniform_ancestral``.

    Bias: biased. Tokens that are noised anew in the same step are so without regard to each other,
    and their number does not vanish as the grid is refined. The sampler is meant for networks whose
    earlier tokens are wrong; an ideal one gains nothing by it.

    Args:
        num_tokens: K of ``corruption.uniform_tokens``.
        prediction: share of the reverse step, in [0, 1]; 1 is ``uniform_ancestral``.
        token_filter: acts on c.

    Raises:
        ValueError: for fewer than two tokens, a marker that is one of them, or a share outside
            [0, 1].

    References: Deschenaux et al. 2026 (arXiv 2602.21185, Duo, chapter II) and its public code.
    """
    if not 0 <= prediction <= 1:
        raise ValueError(f"uniform_corrected needs a prediction share in [0, 1], got {prediction}")
    choose = compose() if token_filter is None else token_filter

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        level = next_level(context)
        predict = place_noise(context.keys, state.tokens) < prediction
        logits = choose(denoise(state.tokens, context.logsnr)[..., :num_tokens])
        clean = reverse_logits(logits, state.tokens, context.logsnr, jnp.inf)
        law = jnp.where(
            predict[..., None],
            reverse_logits(logits, state.tokens, context.logsnr, level),
            noisy_logits(clean, level),
        )
        return SamplerState(draw_tokens(row_streams(context.keys, "token"), law), ())

    init = uniform_start("uniform_corrected", num_tokens)
    return Sampler("uniform_corrected", init, step, never_finished)
