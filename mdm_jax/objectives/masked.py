"""Cross-entropy of tokens, whether a network returns logits or a readout.

The masked diffusion bound.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import schedules
from mdm_jax.corruption.masked import cross_entropy, exclude_token
from mdm_jax.corruption.process import Corruption, spread_levels, sum_levels
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.models.cross_entropy import PositionLoss, Readout, position_losses
from mdm_jax.objectives.objective import Objective, bias_of_levels, score_tokens
from mdm_jax.schedules.laws import Law
from mdm_jax.types import Array, Batch, ModelFn, worst_bias


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


_UNIFORM_RATE = schedules.logistic()


def masked_nelbo(corruption: Corruption, law: Law | None = None, num_levels: int = 1) -> Objective:
    """Negative evidence lower bound of a masked diffusion model, nats.

    With S the sum of the cross-entropies of the masked tokens and g(m) = E[S / m],

        NELBO = int g(m) dm = E_{lambda ~ law} [ logistic(lambda) / law(lambda) * w S ],

    where w is the corruption's own weight (1/m, n/k, ...; a weight per element goes into S). The
    law changes the variance of the estimate, never its mean, as long as it covers the real line; a
    law of bounded support leaves the bound's part outside out, and the objective is then labelled
    "truncated". A process that is labelled "truncated" or "biased" makes the objective so.

    Per-example stats have shape [V, B, S]. Rows without eligible elements contribute zero to
    numerator and denominator; prompt and padding positions carry neither loss nor gradient.

    Args:
        corruption: a masked process such as ``corruption.fixed_count(mask_id)``.
        law: law over logSNR, standard logistic (uniform masking rate) if not given.
        num_levels: S, independent noise levels per row, for contiguous segments of equal length.
            1 is the bound; with more a segment's context is drawn at the levels of the other
            segments, the expectation bounds nothing and the objective is labelled "biased"
            (:func:`~mdm_jax.objectives.block_nelbo` has a level per block and a bound).

    Raises:
        ValueError: if the process has no mask token, or weights for other rates than those of the
            law, or ``num_levels`` is not positive; from ``spec``, if it does not divide L.

    References: Shi et al. 2024 (MD4), Sahoo et al. 2024 (MDLM); the masking-rate form is theirs
    after substituting the schedule away.
    """
    if corruption.mask_id is None:
        raise ValueError(f"masked_nelbo needs a process with a mask token, not {corruption.name!r}")
    chosen = _UNIFORM_RATE if law is None else law
    _check_rates(corruption, chosen)
    of_levels = bias_of_levels("masked_nelbo", num_levels)

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        levels = draw.u.shape[-1]
        tokens, eligible = jnp.asarray(batch.tokens)[None], jnp.asarray(batch.eligible)[None]
        logsnr = chosen.icdf(draw.u)
        corrupted = corruption.corrupt(tokens, logsnr, draw.noise, eligible)
        nats = score_tokens(
            *(model_fn, corrupted.inputs, logsnr, batch.documents, score),
            *(tokens, corrupted.target_mask),
        )
        # Of logits: (1 - p)^2 <= |p - one_hot|^2 <= 2 (1 - p)^2, p the right token's probability.
        slopes = jnp.square(jnp.expm1(-jax.lax.stop_gradient(nats)))
        if corrupted.element_log_weight is not None:
            factor = jnp.exp(corrupted.element_log_weight)
            nats, slopes = (
                jnp.where(corrupted.target_mask, a, 0.0)
                for a in (nats * factor, slopes * jnp.square(factor))
            )
        log_weight = corrupted.log_weight + _UNIFORM_RATE.log_pdf(logsnr) - chosen.log_pdf(logsnr)
        scored = sum_levels(eligible.astype(jnp.float32), levels)
        return LossStats(
            raw=sum_levels(nats, levels),
            weight=jnp.exp(log_weight),
            scored=jnp.broadcast_to(scored, draw.u.shape),
            targets=sum_levels(corrupted.target_mask.astype(jnp.int32), levels),
            slopes=sum_levels(slopes, levels),
        )

    def score(outputs: Array | Readout, targets: Array, where: Array) -> Array:
        return token_nats(outputs, targets, where, corruption.mask_id)

    def spec(batch_size: int, length: int) -> DrawSpec:
        spread_levels(jnp.zeros((num_levels,)), length)  # raises where S does not divide L
        return DrawSpec(batch_size, num_levels, corruption.event_shape(length))

    low, high = chosen.support
    whole = bool(low == -jnp.inf and high == jnp.inf)
    bias = worst_bias("exact" if whole else "truncated", corruption.bias, of_levels)
    return Objective("masked_nelbo", chosen, corruption, spec, loss, bias)


def _check_rates(corruption: Corruption, law: Law) -> None:
    if corruption.rates is None:
        return
    highest, lowest = (float(jax.nn.sigmoid(-jnp.asarray(end))) for end in law.support)
    if not np.allclose([lowest, highest], corruption.rates, rtol=1e-5, atol=1e-7):
        low, high = corruption.rates
        raise ValueError(
            f"the weights of {corruption.name} are made for masking rates from {low:g} to {high:g} "
            f"and the law covers {lowest:g} to {highest:g}; take a law of the same rates, "
            f"schedules.masked.clipped({low:g}, {high:g}), which configs call law.name='clipped', "
            "or a process for any rates"
        )
