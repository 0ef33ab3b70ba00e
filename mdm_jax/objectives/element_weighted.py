"""The masked bound's integrand with a weight on every element, labelled biased."""

import jax.numpy as jnp

from mdm_jax import schedules
from mdm_jax.batches import Batch
from mdm_jax.corruption import Corruption, cross_entropy, spread_levels, sum_levels
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.objectives.objective import Objective, call_model
from mdm_jax.schedules import Law
from mdm_jax.typing import ModelFn

_UNIFORM_RATE = schedules.logistic()


def element_weighted_nelbo(
    corruption: Corruption, law: Law | None = None, num_levels: int = 1
) -> Objective:
    """``E_m sum_{i masked} w_i ce_i`` for a process that gives element weights w_i, nats.

    For ``corruption.bernoulli_shifted_rate``: w_i = 1 / q_i. It is *not* the bound, because the
    context of each target is masked at other rates than the bound asks for; hence the label
    "biased". Per-example ``raw`` holds the weighted losses, so that ``weight`` is the law's alone.

    Args:
        corruption: a process whose ``corrupt`` returns ``element_log_weight``.
        law: law over logSNR, standard logistic (uniform masking rate) if not given.
        num_levels: S, independent noise levels per row.
    """
    chosen = _UNIFORM_RATE if law is None else law

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        views, levels = draw.u.shape[0], draw.u.shape[-1]
        tokens, eligible = jnp.asarray(batch.tokens)[None], jnp.asarray(batch.eligible)[None]
        logsnr = chosen.icdf(draw.u)
        corrupted = corruption.corrupt(tokens, logsnr, draw.noise, eligible)
        logits = call_model(model_fn, corrupted.inputs, logsnr, batch.documents, views)
        targets = jnp.broadcast_to(tokens, corrupted.inputs.shape)
        nats = cross_entropy(logits, targets, corruption.mask_id)
        nats = nats * jnp.exp(corrupted.element_log_weight)
        log_weight = _UNIFORM_RATE.log_pdf(logsnr) - chosen.log_pdf(logsnr)
        scored = sum_levels(eligible.astype(jnp.float32), levels)
        return LossStats(
            raw=sum_levels(jnp.where(corrupted.target_mask, nats, 0.0), levels),
            weight=jnp.exp(log_weight),
            scored=jnp.broadcast_to(scored, draw.u.shape),
            targets=sum_levels(corrupted.target_mask.astype(jnp.int32), levels),
        )

    def spec(batch_size: int, length: int) -> DrawSpec:
        spread_levels(jnp.zeros((num_levels,)), length)  # raises where S does not divide L
        return DrawSpec(batch_size, num_levels, corruption.event_shape(length))

    return Objective("element_weighted_nelbo", chosen, corruption, spec, loss, "biased")
