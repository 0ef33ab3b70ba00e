"""Advantages of answers within the group of their prompt, [P, G] of G answers to P prompts.

``weight`` [P, G] counts answers, 0 for those without a reward (or probabilities of all answers, for
exact values). Advantages of weight 0 are 0, and so are those of groups of equal rewards.
"""

import jax.numpy as jnp

from mdm_jax.types import Array


def centred(rewards: Array, weight: Array) -> Array:
    """Reward minus the group's mean: the policy gradient times ``1 - 1/G`` for an exact score.

    Surrogates need it for more than variance: without it their own drift, E[grad surrogate], goes
    into the expected gradient. Source: d1, SPG (their code as well).
    """
    used = weight > 0
    rewards = jnp.where(used, rewards, 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    mean = jnp.sum(weight * rewards, axis=-1, keepdims=True) / jnp.where(total > 0, total, 1.0)
    # Rounding of the mean would leave a gradient where all rewards are equal.
    return jnp.where(used & has_signal(rewards, weight)[..., None], rewards - mean, 0.0)


def leave_one_out(rewards: Array, weight: Array) -> Array:
    """Reward minus the mean of the others': the policy gradient itself; ``G/(G-1)`` centred.

    Source: Ahmadian et al. 2024 (RLOO); DiffuCoder and ESPO.
    """
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return centred(rewards, weight) * total / jnp.maximum(total - 1, 1.0)


def standardised(rewards: Array, weight: Array, ddof: int = 1) -> Array:
    """Centred rewards over the group's standard deviation of divisor ``G - ddof``.

    Rescales prompts: easy and hard ones, of little spread, weigh more (1.67 times the policy
    gradient at G = 6 and a third of right answers). Source: GRPO (Shao et al. 2024); JustGRPO and
    dLLM-RL divide, DiffuCoder and ESPO can.
    """
    deviation = centred(rewards, weight)
    total = jnp.sum(weight, axis=-1, keepdims=True) - ddof
    variance = jnp.sum(weight * jnp.square(deviation), axis=-1, keepdims=True)
    spread = jnp.sqrt(jnp.where(variance > 0, variance / jnp.maximum(total, 1.0), 1.0))
    return deviation / spread


def has_signal(rewards: Array, weight: Array) -> Array:
    """Groups [P] bool of which two answers have different rewards; others have no gradient."""
    used = weight > 0
    low = jnp.min(jnp.where(used, rewards, jnp.inf), axis=-1)
    return low < jnp.max(jnp.where(used, rewards, -jnp.inf), axis=-1)


ADVANTAGES = {"leave_one_out": leave_one_out, "centred": centred, "standardised": standardised}
"""By config name."""
