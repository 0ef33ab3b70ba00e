"""Uniform-token diffusion: tokens are kept, or replaced by a token drawn uniformly.

At logSNR lambda a token survives with probability ``sigmoid(lambda)``; otherwise, at the rate
``m = sigmoid(-lambda)``, it becomes one of the K tokens, all equally likely, itself included:

    q(z | x) = (1 - m) [z = x] + m / K .

At m = 0 nothing is replaced and at m = 1 nothing is left of x, so a bound over all levels has
neither a reconstruction nor a prior term.

References: Austin et al. 2021 (D3PM, uniform transitions), Schiff et al. 2024 (UDLM), Sahoo et al.
2025 (Duo); DiffusionGemma is trained on this corruption too.

Networks that predict clean tokens from all noisy ones, read as the bound reads them.
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

    Two base noises per element, event shape (L, 2): the first one replaces where it falls below m,
    the second one says by what, token ``floor(K v)``. So reflected noise (``variance.mirror``)
    replaces disjoint sets up to m = 1/2, and by tokens from the other end of the vocabulary. On the
    grid of ``draws.open_uniform`` every token has its probability to within 2**-23.

    All eligible elements are targets, replaced or not: the network is not told which is which.
    There is no mask token and no weight.

    Args:
        num_tokens: K >= 2, the real tokens. Special ids from K on, such as the mask token of this
            package's tokenizers, are never drawn; they may stand in places that are not eligible.

    Raises:
        ValueError: for fewer than two tokens or more than the grid can tell apart.
    """
    check_num_tokens("uniform_tokens", num_tokens)

    def corrupt(
        x: Array,
        logsnr: Array,
        noise: Array,
        eligible: Array,
        level_ids: Array | None = None,
    ) -> Corrupted:
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
    """``log q(v | v) / q(v | w) = log(1 + K exp(lambda))`` for w != v, nats, elementwise.

    What a noisy token says for the clean token being the same one, against any other.
    """
    return jax.nn.softplus(jnp.asarray(logsnr) + math.log(num_tokens))


def check_num_tokens(name: str, num_tokens: int) -> None:
    """Raises ValueError unless 2 <= num_tokens <= 2**GRID_BITS."""
    if not 2 <= num_tokens <= 2**GRID_BITS:
        raise ValueError(f"{name} needs 2 <= num_tokens <= 2**{GRID_BITS}, got {num_tokens}")


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
