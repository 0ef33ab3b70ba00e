"""Predictor-corrector sampling of uniform-token diffusion, at one forward pass per step."""

import jax.numpy as jnp

from mdm_jax.samplers.ancestral import place_noise
from mdm_jax.samplers.filters import LogitFilter, compose, draw_tokens
from mdm_jax.samplers.sampler import Denoise, Sampler, SamplerState, StepContext, row_streams
from mdm_jax.samplers.uniform_ancestral import (
    is_last,
    never_finished,
    next_level,
    noisy_logits,
    reverse_logits,
    uniform_start,
)


def uniform_corrected(
    num_tokens: int, prediction: float = 0.9, token_filter: LogitFilter | None = None
) -> Sampler:
    """Mixes the reverse step with one that forgets the current token, place by place.

        z_s ~ prediction q(z_s | z_t, c) + (1 - prediction) q(z_s | c)

    with c the network's probabilities of clean tokens. The second part noises a fresh prediction to
    the next level, so that a token can be revised late, when the reverse process by itself would
    keep it; it needs no forward pass of its own. For an ideal network each part preserves the law
    of a single noisy token given the others. The last step, to clean tokens, is a reverse step.

    Bias: biased. Tokens that forget in the same step do so without regard to each other, and their
    number does not vanish as the grid is refined. The sampler is meant for networks whose earlier
    tokens are wrong; an ideal one gains nothing by it.

    Args:
        num_tokens: K of ``corruption.uniform_tokens``.
        prediction: share of the reverse step, in [0, 1]; 1 is ``uniform_ancestral``.
        token_filter: acts on c.

    Raises:
        ValueError: for fewer than two tokens, a marker that is one of them, or a share outside
            [0, 1].

    References: Deschenaux et al. 2026 (Duo, chapter II: Psi-samplers), read from its abstract and
    project page: a superposition of reverse posterior and forward process. Their schedules of the
    share over the levels are not reproduced.
    """
    if not 0 <= prediction <= 1:
        raise ValueError(f"uniform_corrected needs a prediction share in [0, 1], got {prediction}")
    choose = compose() if token_filter is None else token_filter

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        level = next_level(context)
        predict = (place_noise(context.keys, state.tokens) < prediction) | is_last(context)
        logits = choose(denoise(state.tokens, context.logsnr)[..., :num_tokens])
        law = jnp.where(
            predict[..., None],
            reverse_logits(logits, state.tokens, context.logsnr, level),
            noisy_logits(logits, level),
        )
        return SamplerState(draw_tokens(row_streams(context.keys, "token"), law), ())

    init = uniform_start("uniform_corrected", num_tokens)
    return Sampler("uniform_corrected", init, step, never_finished)
