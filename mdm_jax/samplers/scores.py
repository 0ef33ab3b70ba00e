"""How sure a network is of a place, and which places that puts first."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdm_jax.typing import Array

Score = Callable[[Array], Array]
"""``score(logits [..., K]) -> [...] float32``: the higher, the earlier a place is filled."""


def confidence(logits: Array) -> Array:
    """Probability of the most likely token (MaskGIT, Chang et al. 2022)."""
    return jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)


def margin(logits: Array) -> Array:
    """Probability of the most likely token minus that of the next (Kim et al. 2025)."""
    best = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)[0]
    return best[..., 0] - best[..., 1]


def negative_entropy(logits: Array) -> Array:
    """``sum_v p_v log p_v``, nats; at most 0."""
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    probs = jnp.exp(log_probs)
    return jnp.sum(probs * jnp.where(probs > 0, log_probs, 0.0), axis=-1)


def best_places(score: Array, candidates: Array, count: Array) -> Array:
    """[B, L] bool: the ``count`` [B] candidates of the highest score, of equal ones the leftmost.

    All of them where there are fewer. ``score`` [B, L] float32, ``candidates`` [B, L] bool.
    """
    order = jnp.lexsort((-score, ~candidates), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return candidates & (rank < count[:, None])


def counted_logsnr(tokens: Array, free: Array, mask_id: int) -> Array:
    """[B] float32: the level to show to a network when k of n places to fill are still masked.

    Samplers that count have no level of their own. The masking rate is taken as ``(k - 1/2) / n``,
    the middle of the rates at which fixed-count training masks k of n.
    """
    masked = jnp.maximum(jnp.sum(tokens == mask_id, axis=-1), 1)
    total = jnp.sum(free, axis=-1)
    return jnp.log(jnp.maximum(total - masked, 0) + 0.5) - jnp.log(masked - 0.5)
