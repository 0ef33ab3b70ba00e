"""Networks that predict clean tokens from all noisy ones, read as the bound reads them."""

import jax
import jax.numpy as jnp

from mdm_jax.corruption.process import spread_levels
from mdm_jax.corruption.uniform_tokens import check_num_tokens, own_evidence
from mdm_jax.models.readout import as_logits
from mdm_jax.typing import Array, ModelFn


def leave_one_out(model_fn: ModelFn, num_tokens: int) -> ModelFn:
    """The network with what a token says about itself taken out of its own prediction.

    Under uniform noise there are two natural predictions at position i: the clean token given all
    noisy tokens, ``P(x_i | z)``, which cross-entropy over all positions learns, and the one that
    does not use z_i, ``P(x_i | z without z_i)``. By Bayes' rule

        P(x_i = v | z)  is proportional to  P(x_i = v | z without z_i) q(z_i | v) ,

    so the two differ by ``own_evidence`` on the logit of the token that is there. The bound and the
    samplers of uniform diffusion take the second one, because the reverse process of Schiff et al.
    2024 and Sahoo et al. 2025, q(z_s | z_t, x) with the network's probabilities in place of x, is
    exact for it. Wrap a network that is meant to predict the first.

    Args:
        model_fn: logits of ``P(x_i | z)``; inputs [N, L], logsnr [N, S]. Further keyword arguments,
            such as ``estimate``, are handed on.
        num_tokens: K of ``uniform_tokens``.
    """
    check_num_tokens("leave_one_out", num_tokens)

    def without_own_token(
        inputs: Array, logsnr: Array, documents: Array | None = None, **further: Array
    ) -> Array:
        logits = as_logits(model_fn(inputs, logsnr, documents, **further))
        evidence = spread_levels(own_evidence(logsnr, num_tokens), inputs.shape[-1])
        token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return logits - jnp.where(token == inputs[..., None], evidence[..., None], 0.0)

    return without_own_token
