"""Masking rates that depend on the token: rare tokens are masked more often.

Raising the rate of some positions from m to q_i > m makes their targets more frequent, and hides
them more often as context. Dividing each loss by its own q_i repairs the former only; the ratio of
the whole mask's probabilities repairs both. The per-token form is our reading of a training script
in the repository of arXiv 2511.18159 (ISAD).
"""

import jax
import jax.numpy as jnp

from mdm_jax.corruption.process import Corrupted, Corruption, spread_levels, sum_levels
from mdm_jax.types import Array, ArrayLike


def bernoulli_shifted_rate(mask_id: int, rare: ArrayLike, delta: float = 0.2) -> Corruption:
    """Masks rare tokens at ``min(m + delta, 1)``, others at m, with weight 1/q_i on each loss.

    "biased": the expectation is ``sum_i E[ce_i | other positions masked at q]``;
    :func:`bernoulli_shifted_logit` is the exact variant.

    Args:
        mask_id: the mask token.
        rare: [K] bool, tokens that are masked more often.
        delta: what is added to their rate, in [0, 1].

    Raises:
        ValueError: if ``rare`` is not a vector or ``delta`` is out of range.
    """
    rare = _check_rare("bernoulli_shifted_rate", rare)
    if not 0 <= delta <= 1:
        raise ValueError(f"bernoulli_shifted_rate needs 0 <= delta <= 1, got {delta}")

    def corrupt(x, logsnr, noise, eligible, level_ids=None) -> Corrupted:
        rate = spread_levels(jax.nn.sigmoid(-logsnr), x.shape[-1], level_ids)
        shifted = jnp.where(rare[x], jnp.minimum(rate + delta, 1.0), rate)
        mask = eligible & (noise < shifted)
        own = -jnp.log(jnp.broadcast_to(shifted, mask.shape))
        return Corrupted(jnp.where(mask, mask_id, x), mask, jnp.zeros_like(logsnr), own)

    return Corruption(
        "bernoulli_shifted_rate", corrupt, lambda length: (length,), mask_id, "biased"
    )


def bernoulli_shifted_logit(
    mask_id: int, rare: ArrayLike, shift: float, max_shifted: int | None = None
) -> Corruption:
    """Masks rare tokens at ``sigmoid(logit(m) + shift)``, weighted by the whole mask's ratio.

    With M_i = 1 for a masked element the weight is

        1/m  prod_i (m / q_i)^M_i ((1 - m) / (1 - q_i))^(1 - M_i) .

    Exact for every model, and of infinite variance under the same laws as ``corruption.bernoulli``.
    The product degenerates as the number of shifted positions grows; cap it.

    Args:
        mask_id: the mask token.
        rare: [K] bool, tokens that are masked more often (or less, for a negative shift).
        shift: added to the logit of their rate.
        max_shifted: largest number of shifted positions of each level, the first ones.

    Raises:
        ValueError: if ``rare`` is not a vector, the shift is not finite or the cap is negative.
    """
    rare = _check_rare("bernoulli_shifted_logit", rare)
    if not jnp.isfinite(shift):
        raise ValueError(f"bernoulli_shifted_logit needs a finite shift, got {shift}")
    if max_shifted is not None and max_shifted < 0:
        raise ValueError(f"max_shifted must not be negative, got {max_shifted}")

    def corrupt(x, logsnr, noise, eligible, level_ids=None) -> Corrupted:
        levels, length = logsnr.shape[-1], x.shape[-1]
        shifted = rare[x] & eligible
        if max_shifted is not None:
            shifted &= _count_before(shifted, levels, level_ids) < max_shifted
        logit = spread_levels(-logsnr, length, level_ids)
        moved = logit + jnp.where(shifted, shift, 0.0)
        mask = eligible & (noise < jax.nn.sigmoid(moved))
        # Computed from logits: q and m are both near 1 at one end, near 0 at the other.
        masked = jax.nn.log_sigmoid(logit) - jax.nn.log_sigmoid(moved)
        visible = jax.nn.log_sigmoid(-logit) - jax.nn.log_sigmoid(-moved)
        ratio = jnp.where(shifted, jnp.where(mask, masked, visible), 0.0)
        total = sum_levels(jnp.broadcast_to(ratio, mask.shape), levels, level_ids)
        log_weight = total - jax.nn.log_sigmoid(-logsnr)
        return Corrupted(jnp.where(mask, mask_id, x), mask, log_weight)

    return Corruption("bernoulli_shifted_logit", corrupt, lambda length: (length,), mask_id)


def _count_before(flags: Array, levels: int, level_ids: Array | None) -> Array:
    """Number of set flags before each element in its level, [..., L] int32."""
    if level_ids is None:
        sections = flags.reshape(*flags.shape[:-1], levels, -1).astype(jnp.int32)
        return (jnp.cumsum(sections, axis=-1) - sections).reshape(flags.shape)
    one_hot = jax.nn.one_hot(level_ids, levels, dtype=jnp.int32) * flags[..., None]
    before = jnp.cumsum(one_hot, axis=-2) - one_hot
    ids = jnp.broadcast_to(level_ids, flags.shape)
    return jnp.take_along_axis(before, ids[..., None], axis=-1)[..., 0]


def _check_rare(name: str, rare: ArrayLike) -> Array:
    rare = jnp.asarray(rare)
    if rare.ndim != 1 or rare.dtype != jnp.bool_:
        raise ValueError(f"{name} needs rare as a bool vector [K], got {rare.dtype} {rare.shape}")
    return rare
