"""Models small enough to enumerate: the oracles of tests and notebooks.

:class:`Toy` has four positions, three tokens and mask token 3, with logits (cosine in radians)

    logit_i(v | z) = 0.3 cos(1 + i + 2 v)
                     + sum_{j != i visible} theta[(v - z_j) mod 3] / (1 + |i - j|) .

:func:`row_denoiser` is the ideal denoiser of a law on a few rows under uniform noise. With p_j the
probability of row x^j and 1 + e_l the likelihood ratio of the noisy token for being clean,

    P(x = x^j | z without z_i)  proportional to  p_j  prod_{l != i, z_l = x^j_l} (1 + e_l) .
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.types import Array, ArrayLike, Batch, ModelFn

LENGTH = 4
NUM_TOKENS = 3
MASK_ID = 3
THETA = (1.2, -0.4, 0.1)
ROWS = ((0, 0, 1, 0), (1, 1, 1, 2), (2, 2, 2, 2))
ROW_PROBABILITIES = (0.5, 0.3, 0.2)


class Toy(nn.Module):
    """``apply(params, inputs [N, 4], logsnr, documents) -> logits [N, 4, 3]`` of inputs alone."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, inputs: Array, logsnr: Array | None = None, documents: Array | None = None
    ) -> Array:
        del logsnr, documents
        theta = self.param("theta", lambda _: jnp.asarray(THETA, self.dtype))
        position, token = np.arange(LENGTH), np.arange(NUM_TOKENS)
        bias = 0.3 * np.cos(1.0 + position[:, None] + 2.0 * token[None, :])
        distance = np.abs(position[:, None] - position[None, :])
        reach = np.where(distance > 0, 1.0 / (1.0 + distance), 0.0)
        table = theta[(token[:, None] - token[None, :]) % NUM_TOKENS]
        visible = (inputs[..., None] == token.reshape(1, 1, -1)).astype(self.dtype)
        context = jnp.einsum("ij,njz,vz->niv", jnp.asarray(reach, self.dtype), visible, table)
        return jnp.asarray(bias, self.dtype)[None] + context


def toy_batch() -> Batch:
    """The three rows of the toy's data, all positions eligible; ROW_PROBABILITIES weighs them."""
    tokens = jnp.asarray(ROWS, jnp.int32)
    eligible = jnp.ones(tokens.shape, bool)
    units = jnp.full((len(ROWS),), LENGTH, jnp.int32)
    return Batch(tokens, eligible, eligible.astype(jnp.int32), units)


def toy_params(dtype: jnp.dtype = jnp.float32) -> dict:
    """Parameters of :class:`Toy`."""
    return {"params": {"theta": jnp.asarray(THETA, dtype)}}


def row_denoiser(
    rows: ArrayLike = ROWS,
    probabilities: ArrayLike = ROW_PROBABILITIES,
    num_tokens: int = NUM_TOKENS,
) -> ModelFn:
    """``model_fn(inputs [N, L], logsnr [N, S]) -> log P(x_i | z without z_i)`` [N, L, K].

    Of the dtype of the levels, which belong to S contiguous segments of equal length; impossible
    tokens have a large negative logit. ``rows`` [J, L] are distinct, with ``probabilities`` [J] and
    tokens below ``num_tokens``; ValueError otherwise.
    """
    rows, probabilities = np.asarray(rows), np.asarray(probabilities, np.float64)
    if rows.ndim != 2 or probabilities.shape != rows.shape[:1] or rows.max() >= num_tokens:
        raise ValueError(
            f"row_denoiser needs rows [J, L] of tokens below {num_tokens} and J probabilities, "
            f"got shapes {rows.shape} and {probabilities.shape}, tokens up to {rows.max()}"
        )
    clean = rows[..., None] == np.arange(num_tokens)

    def model_fn(inputs: Array, logsnr: Array, documents: Array | None = None) -> Array:
        del documents
        logsnr = jnp.repeat(logsnr, inputs.shape[-1] // logsnr.shape[-1], axis=-1)
        own = jax.nn.softplus(logsnr + math.log(num_tokens))[:, None]
        evidence = jnp.where(inputs[:, None] == rows[None], own, 0.0)  # [N, J, L]
        others = jnp.sum(evidence, axis=-1, keepdims=True) - evidence
        prior = jnp.log(jnp.asarray(probabilities, logsnr.dtype))
        shares = jax.nn.softmax(others + prior[None, :, None], axis=1)
        probs = jnp.einsum("njl,jlk->nlk", shares, jnp.asarray(clean, logsnr.dtype))
        return jnp.log(jnp.maximum(probs, jnp.finfo(logsnr.dtype).tiny))

    return model_fn
