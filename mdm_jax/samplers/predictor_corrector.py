"""Ancestral steps, each followed by redrawing at the level that it reached."""

import jax
import jax.numpy as jnp

from mdm_jax.samplers.ancestral import reveal_probability
from mdm_jax.samplers.filters import LogitFilter, check_random, compose
from mdm_jax.samplers.remdm import (
    check_probability,
    largest_remasking,
    reveal_and_remask,
    reveal_with_remasking,
)
from mdm_jax.samplers.sampler import (
    Denoise,
    Sampler,
    SamplerState,
    StepContext,
    never_finished,
)
from mdm_jax.typing import Array


def predictor_corrector(
    corrector_steps: int = 1, eta: float = 0.1, token_filter: LogitFilter | None = None
) -> Sampler:
    """Each step of the grid is an ancestral one, then ``corrector_steps`` that stay at its level.

    A corrector step at the masking rate m masks each revealed place with the probability
    ``sigma = min(eta, m / (1 - m))`` and reveals each masked one with ``sigma (1 - m) / m``. The
    two flows are equal: a place that is masked with probability m, and otherwise holds a token of
    the law from which the network draws, keeps exactly this law. So a corrector step leaves the
    product of such places invariant if the network's distributions do not depend on the context,
    and the noised law of the data up to order sigma^2 if they are its exact conditionals.

    Costs up to ``1 + corrector_steps`` passes per step; the last step needs no correction. Bias:
    biased, for the reason given in :mod:`~mdm_jax.samplers.remdm`.

    Args:
        corrector_steps: number of corrections per level.
        eta: probability of remasking per correction, in (0, 1]; cut to what the level allows.
        token_filter: as for ``ancestral``.

    Raises:
        ValueError: if a setting is out of range; when sampling, if the filter leaves a single
            token, since a correction has to draw from the network's distribution.

    References: Campbell et al. 2022 (correctors of discrete diffusion); the step is that of ReMDM
    at a standing level.
    """
    if corrector_steps < 1:
        raise ValueError(
            f"predictor_corrector needs corrector_steps >= 1, got {corrector_steps}; without any "
            "it is ancestral()"
        )
    check_probability("predictor_corrector", eta)
    if eta == 0:
        raise ValueError("predictor_corrector with eta = 0 corrects nothing; use ancestral()")
    choose = compose() if token_filter is None else token_filter

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        del keys, mask_id
        return SamplerState(canvas, ())

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        reached = context.next_logsnr
        # At the last level nothing is masked and nothing is remasked.
        sigma = jnp.minimum(eta, largest_remasking(reached, reached))
        standing = jnp.where(jnp.isfinite(reached), reached, 0.0)
        balance = jnp.where(
            jnp.isfinite(reached), reveal_with_remasking(standing, standing, sigma), 0.0
        )

        def draw_from(logits: Array) -> Array:
            size = logits.shape[-1]
            check_random("predictor_corrector", choose, size, "ancestral(...) or remdm_cap(...)")
            return choose(logits)

        def move(index: Array, tokens: Array) -> Array:
            # One body for both kinds of step, so that the network is compiled once.
            predict = index == 0
            keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(context.keys)
            level = jnp.where(predict, context.logsnr, reached)
            forward = reveal_probability(context.logsnr, reached)
            return reveal_and_remask(
                context._replace(keys=keys, logsnr=level),
                denoise,
                draw_from,
                tokens,
                jnp.where(predict, forward, balance),
                jnp.where(predict, 0.0, sigma),
            ).tokens

        tokens = jax.lax.fori_loop(0, 1 + corrector_steps, move, state.tokens)
        return SamplerState(tokens, ())

    return Sampler("predictor_corrector", init, step, never_finished)
