"""The loss of CDCD: cross-entropy of tokens given their noisy embeddings."""

from typing import Annotated

import jax
import jax.numpy as jnp

from mdm_jax.checks import Real, checked
from mdm_jax.corruption.process import Corrupted, Corruption
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.gaussian.categorical.embedding import NoisyTokens
from mdm_jax.gaussian.objective import normal_noise
from mdm_jax.gaussian.paths import Path
from mdm_jax.models.cross_entropy import token_nats
from mdm_jax.objectives.objective import (
    Objective,
    flatten_views,
    repeat_views,
    unflatten_views,
)
from mdm_jax.objectives.wrappers import estimate_coin
from mdm_jax.schedules.laws import Law
from mdm_jax.types import Array, Batch, ModelFn


@checked
def cdcd_loss(
    law: Law,
    path: Path,
    size: int,
    mask_id: int,
    *,
    given: Annotated[float, Real("[0, 1]", "of rows", "that begin with part of them known")] = 0.5,
    self_conditioning: bool = True,
) -> Objective:
    """Mean cross-entropy of tokens given their noisy embeddings, nats, of weight 1 at any level.

        loss = E_{lambda ~ law} [ -log p(token | alpha e + sigma eps, lambda) ]

    No bound on the likelihood, so "biased": ``embedding_estimator`` gives one. Its optimum at
    each level is the posterior over tokens, whose mean embedding is the denoiser (score
    interpolation), whatever the law; a warp such as ``variance.cdcd_warp`` changes the law alone.

    Of the rows a share ``given`` has a part of its eligible tokens known, clean and unscored:
    everything outside an interval, of random ends, that reaches the row's end in half of them.
    With ``self_conditioning`` half of the rows take two passes (``NoisyTokens.twice``). The
    network is ``model_fn(inputs: NoisyTokens, logsnr [N, 1], documents) -> readout or logits``,
    of embeddings of ``size`` D. Stats are [V, B, 1]. The base noise of a row is [L, D + 1]: D
    numbers for each token's eps, and one column for the choices. Dieleman et al. 2022 (CDCD).
    """
    process = Corruption(f"embedding_{path.name}", _no_corruption, lambda n: (n, size + 1), mask_id)

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        views, length = draw.u.shape[0], batch.tokens.shape[-1]
        tokens = repeat_views(jnp.asarray(batch.tokens), views)
        eligible = repeat_views(jnp.asarray(batch.eligible), views)
        documents = repeat_views(jnp.asarray(batch.documents), views)
        noise = flatten_views(draw.noise)
        eps = normal_noise(noise[..., :size])
        scored = eligible & ~_known(noise[:, :, size], length, given)
        logsnr = flatten_views(law.icdf(draw.u))
        twice = flatten_views(estimate_coin(draw.noise)) if self_conditioning else None
        sigma = path.sigma(logsnr)[..., None]
        inputs = NoisyTokens(tokens, sigma * eps, ~scored, twice=twice)
        nats = token_nats(model_fn(inputs, logsnr, documents), tokens, scored, mask_id)
        squares = jnp.square(jnp.expm1(-jax.lax.stop_gradient(nats)))  # as of masked_nelbo
        count = jnp.sum(scored, axis=-1, keepdims=True)
        total, squares, count = (
            unflatten_views(a, views)
            for a in (nats.sum(-1, keepdims=True), squares.sum(-1, keepdims=True), count)
        )
        return LossStats(
            raw=total,
            weight=jnp.ones(draw.u.shape, jnp.float32),
            eligible=count.astype(jnp.float32),
            targets=count.astype(jnp.int32),
            gradient_norms=squares,
        )

    def spec(batch_size: int, length: int) -> DrawSpec:
        return DrawSpec(batch_size, 1, process.event_shape(length))

    return Objective(
        "cdcd_loss", law, process, spec, loss, "biased", log_level_weight=jnp.zeros_like
    )


def _known(choices: Array, length: int, share: float) -> Array:
    """[N, L] bool, positions given by design, from uniform numbers [N, L]; at least one is not."""
    if not share:
        return jnp.zeros(choices.shape, bool)
    # Few rows are shorter than four tokens: these repeat their numbers.
    some, first, last, to_end = (choices[:, i % length, None] for i in range(4))
    start = jnp.floor(first * length)
    stop = start + 1 + jnp.floor(last * (length - start))
    stop = jnp.where(to_end < 0.5, length, stop)
    position = jnp.arange(length)[None]
    return (some < share) & ((position < start) | (position >= stop))


def _no_corruption(*_: Array) -> Corrupted:
    raise NotImplementedError("cdcd_loss: the network embeds tokens and adds the noise")
