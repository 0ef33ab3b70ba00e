"""What self-conditioning shows a network: its own probabilities of the clean tokens."""

import jax
import jax.numpy as jnp

from mdm_jax.types import Array


def token_estimate(logits: Array, num_tokens: int) -> Array:
    """Probabilities [..., K] float32 of the tokens below ``num_tokens``; exactly zero above.

    No gradient flows through them.

    Args:
        logits: [..., K] with K >= num_tokens; those of special tokens do not matter.
        num_tokens: number of real tokens.

    Raises:
        ValueError: for fewer logits than tokens.
    """
    if logits.shape[-1] < num_tokens:
        raise ValueError(f"{logits.shape[-1]} logits cannot tell {num_tokens} tokens apart")
    real = jax.lax.stop_gradient(logits[..., :num_tokens]).astype(jnp.float32)
    special = [(0, 0)] * (logits.ndim - 1) + [(0, logits.shape[-1] - num_tokens)]
    return jnp.pad(jax.nn.softmax(real, axis=-1), special)
