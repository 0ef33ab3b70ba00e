"""Uniform-token diffusion: tokens are kept, or replaced by a token drawn uniformly.

At the rate ``m = sigmoid(-lambda)`` a token becomes one of the K tokens, possibly itself: ``q(z |
x) = (1 - m) [z = x] + m / K``. A bound over all levels has no reconstruction or prior term.
References: Austin et al. 2021 (D3PM), Schiff et al. 2024 (UDLM), Sahoo et al. 2025 (Duo).
"""

import math

import jax
import jax.numpy as jnp

from mdm_jax.corruption.process import Corrupted, Corruption, spread_levels
from mdm_jax.draws import GRID_BITS
from mdm_jax.models.cross_entropy import as_logits
from mdm_jax.types import Array, ArrayLike, ModelFn


def uniform_tokens(num_tokens: int) -> Corruption:
    """Replaces each eligible token at the rate m by a token uniform on {0..num_tokens - 1}.

    Base noise of event shape (L, 2): a token is replaced where the first is below m, by ``floor(K
    v)`` of the second, v (probability right to within 2**-23). All eligible elements are targets,
    replaced or not. No mask token, no weight.

    ``num_tokens``: K >= 2 real tokens, at most 2**GRID_BITS (ValueError). Special ids from K on are
    never drawn; they may stand at ineligible positions.
    """
    check_num_tokens("uniform_tokens", num_tokens)

    def corrupt(x, logsnr, noise, eligible, level_ids=None) -> Corrupted:
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"uniform_tokens needs integer tokens, got {x.dtype}")
        rate = spread_levels(jax.nn.sigmoid(-logsnr), x.shape[-1], level_ids)
        replace = eligible & (noise[..., 0] < rate)
        # Rounding can take K v up to K.
        drawn = jnp.minimum(jnp.floor(noise[..., 1] * num_tokens), num_tokens - 1).astype(x.dtype)
        inputs = jnp.where(replace, drawn, x)
        mask = jnp.broadcast_to(eligible, inputs.shape)
        return Corrupted(inputs, mask, jnp.zeros_like(logsnr))

    return Corruption("uniform_tokens", corrupt, lambda length: (length, 2), None)


def own_evidence(logsnr: ArrayLike, num_tokens: int) -> Array:
    """``log q(v | v) / q(v | w) = log(1 + K exp(lambda))`` for w != v, nats, elementwise."""
    return jax.nn.softplus(jnp.asarray(logsnr) + math.log(num_tokens))


def check_num_tokens(name: str, num_tokens: int) -> None:
    """Raises ValueError unless 2 <= num_tokens <= 2**GRID_BITS."""
    if not 2 <= num_tokens <= 2**GRID_BITS:
        raise ValueError(f"{name} needs 2 <= num_tokens <= 2**{GRID_BITS}, got {num_tokens}")


def leave_one_out(model_fn: ModelFn, num_tokens: int) -> ModelFn:
    """Converts a network of ``P(x_i | z)`` to one of ``P(x_i | z without z_i)``.

    Cross-entropy over all positions learns the former; the bound and the samplers of uniform
    diffusion take the latter, for which the reverse process of Schiff et al. 2024 and Sahoo et al.
    2025 is exact. By Bayes' rule

        P(x_i = v | z)  is proportional to  P(x_i = v | z without z_i) q(z_i | v) ,

    so :func:`own_evidence` is subtracted from the logit of z_i. ``model_fn``: inputs [N, L], logsnr
    [N, S]; further keyword arguments, such as ``estimate``, are passed on.
    """
    check_num_tokens("leave_one_out", num_tokens)

    def without_own_token(
        inputs: Array, logsnr: Array, documents: Array | None = None, **options: Array
    ) -> Array:
        logits = as_logits(model_fn(inputs, logsnr, documents, **options))
        evidence = spread_levels(own_evidence(logsnr, num_tokens), inputs.shape[-1])
        token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return logits - jnp.where(token == inputs[..., None], evidence[..., None], 0.0)

    return without_own_token


def token_estimate(logits: Array, num_tokens: int) -> Array:
    """Clean-token probabilities, 0 from ``num_tokens`` on; ValueError for fewer logits."""
    if logits.shape[-1] < num_tokens:
        raise ValueError(f"{logits.shape[-1]} logits are too few for {num_tokens} tokens")
    real = jax.lax.stop_gradient(logits[..., :num_tokens]).astype(jnp.float32)
    special = [(0, 0)] * (logits.ndim - 1) + [(0, logits.shape[-1] - num_tokens)]
    return jnp.pad(jax.nn.softmax(real, axis=-1), special)
