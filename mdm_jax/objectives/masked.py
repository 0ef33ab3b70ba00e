"""The masked diffusion bound."""

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.corruption.process import Corruption, spread_levels, sum_levels
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.models.cross_entropy import Readout, token_nats
from mdm_jax.objectives.objective import (
    UNIFORM_RATE,
    Objective,
    bias_of_law,
    bias_of_levels,
    call_model,
)
from mdm_jax.schedules.laws import Law
from mdm_jax.types import Array, Batch, ModelFn, worst_bias


def masked_nelbo(corruption: Corruption, law: Law | None = None, num_levels: int = 1) -> Objective:
    """Negative evidence lower bound of a masked diffusion model, nats.

    With S the sum of the cross-entropies of the masked tokens and g(m) = E[S / m],

        NELBO = int g(m) dm = E_{lambda ~ law} [ logistic(lambda) / law(lambda) * w S ],

    where w is the corruption's own weight (1/m, n/k, ...; a weight per element goes into S). The
    law changes the estimate's variance, not its mean, if it covers the real line.

    Stats have shape [V, B, S]; prompt and padding carry neither loss nor gradient.

    Args:
        corruption: a masked process such as ``corruption.fixed_count(mask_id)``; its bias label
            carries over.
        law: law over logSNR, standard logistic (uniform masking rate) by default; one of bounded
            support makes the objective "truncated".
        num_levels: S, independent noise levels per row, for contiguous segments of equal length.
            More than 1 bounds nothing ("biased"); :func:`~mdm_jax.objectives.block_nelbo` does.

    Raises:
        ValueError: if the process has no mask token, or weights for other rates than those of the
            law, or ``num_levels`` is not positive; from ``spec``, if it does not divide L.

    References: Shi et al. 2024 (MD4), Sahoo et al. 2024 (MDLM), after substituting the schedule.
    """
    if corruption.mask_id is None:
        raise ValueError(f"masked_nelbo needs a process with a mask token, not {corruption.name!r}")
    law = UNIFORM_RATE if law is None else law
    _check_rates(corruption, law)
    bias = worst_bias(bias_of_law(law), corruption.bias, bias_of_levels("masked_nelbo", num_levels))

    def token_loss(outputs: Array | Readout, targets: Array, where: Array) -> Array:
        return token_nats(outputs, targets, where, corruption.mask_id)

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        levels = draw.u.shape[-1]
        tokens, eligible = jnp.asarray(batch.tokens)[None], jnp.asarray(batch.eligible)[None]
        logsnr = law.icdf(draw.u)
        corrupted = corruption.corrupt(tokens, logsnr, draw.noise, eligible)
        known = (tokens, corrupted.target_mask)
        nats = call_model(model_fn, corrupted.inputs, logsnr, batch.documents, token_loss, known)
        # At the logits: (1 - p)^2 <= |p - one_hot|^2 <= 2 (1 - p)^2, p the right token's
        # probability.
        squares = jnp.square(jnp.expm1(-jax.lax.stop_gradient(nats)))
        if corrupted.element_log_weight is not None:
            factor = jnp.exp(corrupted.element_log_weight)
            nats = jnp.where(corrupted.target_mask, nats * factor, 0.0)
            squares = jnp.where(corrupted.target_mask, squares * jnp.square(factor), 0.0)
        log_weight = corrupted.log_weight + UNIFORM_RATE.log_pdf(logsnr) - law.log_pdf(logsnr)
        count = sum_levels(eligible.astype(jnp.float32), levels)
        return LossStats(
            raw=sum_levels(nats, levels),
            weight=jnp.exp(log_weight),
            scored=jnp.broadcast_to(count, draw.u.shape),
            targets=sum_levels(corrupted.target_mask.astype(jnp.int32), levels),
            slopes=sum_levels(squares, levels),
        )

    def spec(batch_size: int, length: int) -> DrawSpec:
        spread_levels(jnp.zeros((num_levels,)), length)  # raises where S does not divide L
        return DrawSpec(batch_size, num_levels, corruption.event_shape(length))

    return Objective("masked_nelbo", law, corruption, spec, loss, bias)


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
