"""Cross-entropy of tokens, whether a network returns logits or a readout."""

import jax
import jax.numpy as jnp

from mdm_jax.corruption import cross_entropy, exclude_token
from mdm_jax.models.position_losses import PositionLoss, position_losses
from mdm_jax.models.readout import Readout
from mdm_jax.typing import Array


def token_nats(
    outputs: Array | Readout, targets: Array, where: Array, mask_id: int | None
) -> Array:
    """Cross-entropy of the clean tokens in ``where``, nats, float32 [N, L]; zero elsewhere.

    The one way from a network to the losses of tokens. Of a readout no logits are computed outside
    ``where``, and never more than a chunk of them at a time; the result is the same.

    Args:
        outputs: logits [N, L, K] of any float dtype, or a readout of them.
        targets: [N, L] clean token ids.
        where: [N, L] bool, positions that carry a loss.
        mask_id: the mask token, whose logit is taken out of the softmax, or None.
    """
    if isinstance(outputs, Readout):
        return position_losses(_cross_entropy(mask_id), outputs, where, targets)
    return jnp.where(where, cross_entropy(outputs, targets, mask_id), 0.0)


def _cross_entropy(mask_id: int | None) -> PositionLoss:
    def value(logits: Array, targets: Array) -> tuple[Array, Array]:
        logits = exclude_token(logits, mask_id)
        total = jax.nn.logsumexp(logits, axis=-1)
        return total - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], total

    def slope(logits: Array, total: Array, targets: Array) -> Array:
        probs = jnp.exp(exclude_token(logits, mask_id) - total[..., None])
        token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return probs - (token == targets[..., None])

    return PositionLoss(value, slope)
