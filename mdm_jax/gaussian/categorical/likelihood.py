"""The Gaussian bound on the likelihood of tokens and of rows of tables, by their vectors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import check_finite, check_interval
from mdm_jax.gaussian.categorical.embedding import EmbeddingTransformer, NoisyTokens, posterior_mean
from mdm_jax.gaussian.categorical.mixed import NoisyCells, TableTransformer, cell_losses
from mdm_jax.gaussian.likelihood import normal_decoder, prior_divergence
from mdm_jax.gaussian.paths import Path
from mdm_jax.likelihood.estimators import (
    Estimator,
    ScoredRows,
    check_at_least_one,
    replicate_keys,
)
from mdm_jax.models.cross_entropy import Projection, Readout, token_nats
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree

Denoise = Callable[..., tuple[Array, Array, Array]]
"""``denoise(params, batch, eps [B, L, D], sigma-scaled, logsnr [B, 1]) -> (estimate, clean [B, L,
D], loss [B, L])``, the loss for display."""


def embedding_estimator(
    model: EmbeddingTransformer,
    apply_fn: Callable[..., Readout],
    *,
    low: float,
    high: float,
    passes: int,
) -> Estimator:
    """Estimator of a bound on -log p(tokens) by a diffusion model of embeddings, nats.

        NELBO = E[-log p(tokens | z_high)] + 1/2 int_low^high exp(lambda) E|e - e_hat|^2 dlambda
                + KL(q(z_low | tokens) || N(0, alpha^2 + sigma^2)) ,

    with e_hat the mean embedding under the network's probabilities (score interpolation), and
    p(token | z_high) in proportion to the Gaussian density of z around its embedding, each token
    by itself. It is the bound of VDM (Kingma et al. 2021, eq. 11 to 17) on the discrete data, as in
    Plaid (Gulrajani and Hashimoto 2023): comparable with masked bounds and autoregressive
    likelihoods. The cross-entropy that CDCD minimises is no bound; it is returned by level.

    F = ``passes`` levels per row, one in each of F equal cells of [low, high]; the bound of models
    with self-conditioning is of two passes. Ineligible elements are clean and given. ValueError for
    passes below 1 or levels not finite with low < high.
    """

    def denoise(params: PyTree, batch: Batch, noise: Array, logsnr: Array):
        tokens, scored = jnp.asarray(batch.tokens), jnp.asarray(batch.eligible)
        twice = jnp.full(tokens.shape[:1], model.config.self_conditioning)
        table = model.apply(params, method="embeddings")
        inputs = NoisyTokens(tokens, noise, ~scored, twice=twice)
        outputs = apply_fn(params, inputs, logsnr, batch.documents)
        nats = token_nats(outputs, tokens, scored, model.mask_id)
        return posterior_mean(outputs, table), table[tokens], nats

    def decode(params: PyTree, batch: Batch, z: Array) -> Array:
        table = model.apply(params, method="embeddings")
        logits = Readout(jnp.exp(high) * z, table, Projection(True, jnp.float32))
        return token_nats(logits, jnp.asarray(batch.tokens), batch.eligible, model.mask_id)

    return _vector_estimator(
        denoise, decode, model.noising, model.size, low, high, passes, "each token by itself"
    )


def table_estimator(model: TableTransformer, *, low: float, high: float, passes: int) -> Estimator:
    """As :func:`embedding_estimator`, of rows of tables, at a common level of all columns.

    Numbers count by their density in standard deviations, which has no lower bound; their decoder
    is N(z_high, exp(-high)). Where columns have warps of their own, a common level is none that the
    network was trained on: the bound holds and is loose. By level the mean of ``cell_losses``.
    """
    cells, gaussian = model.cells, normal_decoder()

    def denoise(params: PyTree, batch: Batch, noise: Array, logsnr: Array):
        codes = jnp.asarray(batch.tokens)
        noise = noise * cells.active(model.size)[None]
        predicted = model.apply(params, NoisyCells(codes, noise), logsnr)
        clean = model.apply(params, codes, method="clean")
        return predicted.mean, clean, cell_losses(cells, predicted, clean, codes)

    def decode(params: PyTree, batch: Batch, z: Array) -> Array:
        codes = jnp.asarray(batch.tokens)
        clean = model.apply(params, codes, method="clean")
        numbers = -gaussian(clean[..., 0], z[..., 0], high)
        if not sum(cells.sizes):
            return numbers
        logits = jnp.exp(high) * z @ model.apply(params, method="embeddings").T
        own = jnp.where(cells.own()[None], logits, jnp.finfo(jnp.float32).min)
        log_probs = jax.nn.log_softmax(own, axis=-1)
        nats = -jnp.take_along_axis(log_probs, cells.index(codes)[..., None], axis=-1)[..., 0]
        return jnp.where(cells.is_numeric[None], numbers, nats)

    return _vector_estimator(
        denoise, decode, model.noising, model.size, low, high, passes, "each cell by itself"
    )


def _vector_estimator(
    denoise: Denoise,
    decode: Callable[[PyTree, Batch, Array], Array],
    path: Path,
    size: int,
    low: float,
    high: float,
    passes: int,
    decoder: str,
) -> Estimator:
    """The bound of elements that are vectors; ``decode(params, batch, z_high / alpha) -> nats``.

    ``size`` is D. Components that carry no data are zero in ``clean`` and in the estimate, and add
    their prior term alone, exp(low) / 2 and less.
    """
    check_at_least_one(passes=passes)
    check_interval("gaussian bound", low, high)
    check_finite("gaussian bound", low=low, high=high)

    @jax.jit
    def score(params, keys, batch, replicate, view):
        scored, view = jnp.asarray(batch.eligible), jnp.broadcast_to(view, keys.shape)
        keys = jax.vmap(jax.random.fold_in)(replicate_keys(keys, replicate), view)
        offset = jax.vmap(lambda key: jax.random.uniform(stream(key, "level")))(keys)
        share = (view + offset) / passes
        logsnr = (low + (high - low) * share)[:, None]
        shape = (*scored.shape[1:], size)

        def normal(name: str) -> Array:
            return jax.vmap(lambda key: jax.random.normal(stream(key, name), shape))(keys)

        noise = path.sigma(logsnr)[..., None] * normal("noise")
        estimate, clean, loss = denoise(params, batch, noise, logsnr)
        square = jnp.sum(jnp.square(estimate - clean), axis=-1)
        diffusion = 0.5 * (high - low) * jnp.exp(logsnr) * square / passes
        # Once a row: of the first view.
        ends = decode(params, batch, clean + jnp.exp(-0.5 * high) * normal("decoder"))
        ends += jnp.sum(prior_divergence(clean, low), axis=-1)
        nats = diffusion + jnp.where(view[:, None] == 0, ends, 0.0)
        nats, loss = (jnp.sum(jnp.where(scored, a, 0.0), axis=-1) for a in (nats, loss))
        return nats, share, loss

    def by_level(arrays: list[np.ndarray], rows: ScoredRows, bins: int):
        share, loss = (a.astype(np.float64) for a in arrays)
        # Bins go from clean to noisy, as those of masking rates.
        level = np.clip(((1 - share) * bins).astype(int), 0, bins - 1)
        size = np.broadcast_to(rows.size, share.shape)
        return tuple(
            np.bincount(level.ravel(), values.ravel(), minlength=bins)
            for values in (loss, size, size)
        )

    return Estimator(
        score,
        lambda eligible: np.full(len(eligible), passes),
        lambda eligible: ~eligible.any(-1),
        by_level,
        f"Gaussian bound, logSNR {low:g} to {high:g} stratified over passes, decoder of {decoder}",
    )
