"""The autoregressive loss, for baselines."""

import jax.numpy as jnp

from mdm_jax import schedules
from mdm_jax.corruption.process import Corrupted, Corruption
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.models.cross_entropy import Readout
from mdm_jax.objectives.masked import token_nats
from mdm_jax.objectives.objective import Objective, score_tokens
from mdm_jax.types import Array, Batch, ModelFn


def next_token(mask_id: int) -> Objective:
    """Negative log-likelihood of the eligible tokens, each given all tokens before it, nats.

    There is no noise: every eligible token is a target, with the weight 1, and the only variance is
    that of the data. The objective has a law and a process all the same, so that train step,
    monitors and variance chains run as they do elsewhere. The quantile is drawn and not read; an
    exact warp keeps the mean and can only add noise, a truncated one scales the loss. So train with
    an empty chain. Level profiles are flat.

    Per-example stats have shape [V, B, 1]. Prompt and padding carry no loss. The network is
    ``model_fn(tokens [N, L], logsnr, documents) -> logits [N, L, K]`` and must itself let place i
    see tokens before i only, such as ``models.causal_apply(model, mask_id)``.

    Args:
        mask_id: the mask token. Its logit is taken out of the softmax, as in the bounds that this
            loss is compared with: a clean token is never the mask.

    Raises:
        ValueError: for a negative mask_id.
    """
    if mask_id < 0:
        raise ValueError(f"next_token: mask_id must be a token id, got {mask_id}")

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        views = draw.u.shape[0]
        shape = (views, *batch.tokens.shape)
        tokens = jnp.broadcast_to(jnp.asarray(batch.tokens)[None], shape)
        eligible = jnp.asarray(batch.eligible)
        logsnr = law.icdf(draw.u)
        nats = score_tokens(model_fn, tokens, logsnr, batch.documents, score, tokens, eligible)
        count = jnp.broadcast_to(jnp.sum(eligible, axis=-1)[None, :, None], draw.u.shape)
        return LossStats(
            raw=jnp.sum(nats, axis=-1, keepdims=True),
            weight=jnp.ones(draw.u.shape, jnp.float32),
            scored=count.astype(jnp.float32),
            targets=count.astype(jnp.int32),
        )

    def score(outputs: Array | Readout, targets: Array, where: Array) -> Array:
        return token_nats(outputs, targets, where, mask_id)

    def spec(batch_size: int, length: int) -> DrawSpec:
        del length
        return DrawSpec(batch_size, 1, process.event_shape(1))

    law = schedules.logistic()
    process = Corruption("no_noise", _every_token_a_target, lambda _: (1,), mask_id)
    return Objective("next_token", law, process, spec, loss, "exact")


def _every_token_a_target(
    x: Array, logsnr: Array, noise: Array, eligible: Array, level_ids: Array | None = None
) -> Corrupted:
    """Every eligible token is a target; what each place may see is the network's affair."""
    del noise, level_ids
    shape = jnp.broadcast_shapes(x.shape, eligible.shape, (*logsnr.shape[:-1], x.shape[-1]))
    inputs, targets = jnp.broadcast_to(x, shape), jnp.broadcast_to(eligible, shape)
    return Corrupted(inputs, targets, jnp.zeros_like(logsnr))
