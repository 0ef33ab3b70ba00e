"""The ideal denoiser of a law on a few rows under uniform noise: the ground truth of tests.

With p_j the probability of row x^j, and 1 + e the likelihood ratio of a noisy token for the clean
one being the same (e = K exp(lambda)), the noisy row z has

    P(x = x^j | z without z_i)  proportional to  p_j  prod_{l != i, z_l = x^j_l} (1 + e_l) ,

and the clean token at i the law that this gives it.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.models import toy
from mdm_jax.typing import Array, ArrayLike, ModelFn


def row_denoiser(
    rows: ArrayLike = toy.ROWS,
    probabilities: ArrayLike = toy.ROW_PROBABILITIES,
    num_tokens: int = toy.NUM_TOKENS,
) -> ModelFn:
    """``model_fn(inputs [N, L], logsnr [N, S]) -> log P(x_i | z without z_i)`` [N, L, K].

    Of the dtype of the levels. Impossible tokens have a large negative logit. S levels are those of
    contiguous segments of equal length.

    Args:
        rows: [J, L] tokens, all different; the toy's by default.
        probabilities: [J].
        num_tokens: K.

    Raises:
        ValueError: unless there is one probability per row and every token is below K.
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
