"""The autoregressive loss, for baselines."""

import jax.numpy as jnp

from mdm_jax.corruption.process import Corrupted, Corruption
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.models.cross_entropy import Readout, token_nats
from mdm_jax.objectives.objective import UNIFORM_RATE, Objective, call_model
from mdm_jax.types import Array, Batch, ModelFn


def next_token(mask_id: int) -> Objective:
    """Negative log-likelihood of the eligible tokens, each given all tokens before it, nats.

    There is no noise. A law and a process are there for the train step, monitors and chains; the
    quantile is drawn and not read. An exact warp can only add noise and a truncated one scales the
    loss, so train with an empty chain.

    Stats have shape [V, B, 1]; prompt and padding carry no loss. The network is
    ``model_fn(tokens [N, L], logsnr, documents) -> logits [N, L, K]``, at position i a function of
    the tokens before i only, such as ``models.causal_apply(model, mask_id)``.

    Args:
        mask_id: the mask token, taken out of the softmax as in the bounds that this is compared to.

    Raises:
        ValueError: for a negative mask_id.
    """
    if mask_id < 0:
        raise ValueError(f"next_token: mask_id must be a token id, got {mask_id}")

    def token_loss(outputs: Array | Readout, targets: Array, where: Array) -> Array:
        return token_nats(outputs, targets, where, mask_id)

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        shape = (draw.u.shape[0], *batch.tokens.shape)
        tokens = jnp.broadcast_to(jnp.asarray(batch.tokens)[None], shape)
        eligible, logsnr = jnp.asarray(batch.eligible), UNIFORM_RATE.icdf(draw.u)
        known = (tokens, eligible)
        nats = call_model(model_fn, tokens, logsnr, batch.documents, token_loss, known)
        count = jnp.broadcast_to(jnp.sum(eligible, axis=-1)[None, :, None], draw.u.shape)
        return LossStats(
            raw=jnp.sum(nats, axis=-1, keepdims=True),
            weight=jnp.ones(draw.u.shape, jnp.float32),
            scored=count.astype(jnp.float32),
            targets=count.astype(jnp.int32),
        )

    def spec(batch_size: int, _length: int) -> DrawSpec:
        return DrawSpec(batch_size, 1, process.event_shape(1))

    process = Corruption("no_noise", _clean, lambda _: (1,), mask_id)
    return Objective("next_token", UNIFORM_RATE, process, spec, loss, "exact")


def _clean(
    x: Array, logsnr: Array, _noise: Array, eligible: Array, _level_ids: Array | None = None
) -> Corrupted:
    shape = jnp.broadcast_shapes(x.shape, eligible.shape, (*logsnr.shape[:-1], x.shape[-1]))
    inputs, targets = jnp.broadcast_to(x, shape), jnp.broadcast_to(eligible, shape)
    return Corrupted(inputs, targets, jnp.zeros_like(logsnr))
