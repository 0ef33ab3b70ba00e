"""Likelihood bounds by process, each by a fixed estimator with error bars.

With S_j the summed cross-entropy of the k_j of n tokens that view j masks (``estimators.py``,
whatever the training chain), every ``(n / k_j) S_j`` is an unbiased estimate of

    NELBO(x) = sum_{k=1}^{n} (1/k) E[S | k masked]   (nats)

and a row's estimate is the mean over its F views. These are negatively correlated, so the standard
error comes from R repetitions of the design. References: Ou et al. 2024 (RADD), Nie et al. 2025
(LLaDA) for the fixed-count form.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import schedules
from mdm_jax.corruption.process import sum_levels
from mdm_jax.draws import GRID_BITS, Draw, open_uniform
from mdm_jax.likelihood.estimators import (
    Likelihood,
    RowScores,
    ScoredRows,
    check_at_least_one,
    count_scores,
    logsnr_of_count,
    make_evaluate,
    pass_masks,
    row_keys,
)
from mdm_jax.models.cross_entropy import token_nats
from mdm_jax.models.masks import check_blocks
from mdm_jax.objectives.losses import uniform_nelbo
from mdm_jax.rng import stream
from mdm_jax.schedules import masked
from mdm_jax.types import Array


def make_likelihood(
    apply_fn: Callable[..., Array],
    mask_id: int,
    *,
    passes: int,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the masked bound; the forward pass is compiled once.

    Args:
        apply_fn: ``apply_fn(params, inputs, logsnr [B, 1], documents) -> logits [B, L, K]``, or a
            readout of them (``models.readout_apply``), so that a pass holds the logits of a chunk.
            The level for k of n masked tokens is that of the rate (k - 1/2) / n.
        mask_id: the mask token; it is excluded from the softmax.
        passes: F >= 1, forward passes per row and replicate. May exceed n.
        replicates: R >= 1, repetitions of the design; 8 or more for a usable standard error.
        level_bins: bins of the loss curve over the masking rate.

    Returns ``evaluate(params, key, batches, progress=None) -> Likelihood``. A row's random numbers
    depend on the key and its number in the stream, not on the batch size: models evaluated with one
    key get the same masks. ``progress(rows)`` is called after each batch (``tqdm.update``).
    ValueError for numbers below 1, batches of different shapes (fill the last with rows that have
    no eligible token), or no eligible token in all the data.
    """

    @jax.jit
    def score(params, key, batch, first_row, replicate, view):
        tokens, eligible = jnp.asarray(batch.tokens), jnp.asarray(batch.eligible)
        keys = row_keys(key, first_row, tokens.shape[0], replicate)
        mask, count = pass_masks(keys, eligible, view, passes)
        logsnr = logsnr_of_count(count, jnp.sum(eligible, axis=-1))
        inputs = jnp.where(mask, mask_id, tokens)
        outputs = apply_fn(params, inputs, logsnr[:, None], batch.documents)
        nats = token_nats(outputs, tokens, mask, mask_id)
        return count[:, None], jnp.sum(nats, axis=-1, keepdims=True)

    return make_evaluation(score, passes=passes, replicates=replicates, level_bins=level_bins)


def make_evaluation(
    score: Callable[..., tuple[Array, Array]],
    *,
    passes: int,
    replicates: int,
    level_bins: int,
    exact: bool = False,
) -> Callable[..., Likelihood]:
    """Evaluation by a count design in every segment of a row; errors as :func:`make_likelihood`.

    ``score(params, key, batch, first_row, replicate, view) -> (count [B, S], nats [B, S])`` gives,
    for S contiguous segments of a row, how many of a segment's n eligible tokens are masked and
    their summed cross-entropy; ``n / count`` times it estimates the segment's bound. With ``exact``
    it draws nothing, and one pass stands for all passes and replicates.
    """
    check_at_least_one(passes=passes, replicates=replicates, level_bins=level_bins)
    num_runs, num_passes = (1, 1) if exact else (replicates, passes)

    def design(rows: ScoredRows) -> tuple[int, int]:
        length = rows.eligible.shape[1]
        if num_passes * length >= 2**31:
            raise ValueError(f"passes * length must stay below 2**31, got {num_passes} * {length}")
        return num_runs, num_passes

    def collect(arrays: tuple[np.ndarray, ...], rows: ScoredRows) -> RowScores:
        count, loss = arrays[0].astype(np.int64), arrays[1].astype(np.float64)
        size = rows.eligible.reshape(*count.shape[-2:], -1).sum(-1)
        count = np.where(size > 0, count, 0)
        nats = (size / np.maximum(count, 1) * loss).sum(-1).mean(axis=1)
        nats = np.broadcast_to(nats, (replicates, nats.shape[1]))
        return count_scores(nats, rows, loss, count, level_bins)

    return make_evaluate(score, collect, design)


def make_block_likelihood(
    apply_fn: Callable[..., Array],
    mask_id: int,
    block_size: int,
    *,
    passes: int,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the block bound; all else as :func:`make_likelihood`.

    With blocks of one token the bound is the autoregressive log-likelihood: one pass is run, and
    its Monte Carlo error is zero. ``apply_fn(params, inputs [B, 2L], logsnr [B, S], documents [B,
    L]) -> logits [B, L, K]`` is ``models.block_apply(model, block_size)``; levels, and ``passes``,
    are per block. ValueError also if L' does not divide the length of the rows.
    """

    @jax.jit
    def score(params, key, batch, first_row, replicate, view):
        tokens, eligible = batch.tokens, batch.eligible
        num_rows, length = tokens.shape
        num_blocks = check_blocks(length, block_size)
        by_block = eligible.reshape(-1, block_size)
        if block_size == 1:
            mask, count = by_block, jnp.ones(len(by_block), jnp.int32)
        else:
            keys = row_keys(key, first_row, num_rows, replicate)
            block_keys = jax.vmap(lambda key: jax.random.split(key, num_blocks))(keys)
            mask, count = pass_masks(block_keys.reshape(-1), by_block, view, passes)
        logsnr = logsnr_of_count(count, jnp.sum(by_block, axis=-1)).reshape(num_rows, num_blocks)
        mask = mask.reshape(tokens.shape)
        inputs = jnp.concatenate([jnp.where(mask, mask_id, tokens), tokens], axis=-1)
        outputs = apply_fn(params, inputs, logsnr, batch.documents)
        nats = token_nats(outputs, tokens, mask, mask_id)
        return count.reshape(logsnr.shape), sum_levels(nats, num_blocks)

    return make_evaluation(
        score,
        passes=passes,
        replicates=replicates,
        level_bins=level_bins,
        exact=block_size == 1,
    )


def make_uniform_likelihood(
    apply_fn: Callable[..., Array],
    num_tokens: int,
    *,
    passes: int,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the uniform-token bound; all else as :func:`make_likelihood`.

    ``apply_fn(params, inputs, logsnr [B, 1], documents) -> logits [B, L, K]`` is as of
    ``objectives.losses.bound_rate`` (see ``corruption.leave_one_out``), ``num_tokens`` >= 2 the K
    of ``corruption.uniform_tokens``. In the level curve rates are replacement rates, tokens all
    eligible ones, and a bin's mean is that of the bound's integrand, nats per token.
    """
    check_at_least_one(passes=passes, replicates=replicates, level_bins=level_bins)
    law = schedules.law_of(masked.power(3.0))
    objective = uniform_nelbo(num_tokens, law)

    @jax.jit
    def score(params, key, batch, first_row, replicate, view):
        num_rows, length = batch.tokens.shape
        keys = row_keys(key, first_row, num_rows, replicate)
        u, noise = jax.vmap(lambda row_key: pass_numbers(row_key, view, passes, length))(keys)
        u = u[None, :, None]
        draw = Draw(u, jnp.zeros_like(u), noise[None])
        stats = objective.loss(lambda *inputs: apply_fn(params, *inputs), batch, draw)
        rate = jax.nn.sigmoid(-law.icdf(u))
        return tuple(a[0, :, 0] for a in (rate, stats.weight, stats.raw))

    def collect(arrays: tuple[np.ndarray, ...], rows: ScoredRows) -> RowScores:
        rate, weight, raw = (a.astype(np.float64) for a in arrays)
        # Bin b holds b/bins < m <= (b+1)/bins.
        level = np.clip(np.ceil(rate * level_bins).astype(int) - 1, 0, level_bins - 1)
        size = np.broadcast_to(rows.size, rate.shape)
        nats, mass, targets = (
            np.bincount(level.ravel(), values.ravel(), minlength=level_bins)
            for values in (weight * raw, weight * size, size)
        )
        return RowScores((weight * raw).mean(axis=1), rows, nats, mass, targets, passes)

    return make_evaluate(score, collect, lambda _: (replicates, passes), "uniform_likelihood")


def pass_numbers(row_key: Array, view: Array, passes: int, length: int) -> tuple[Array, Array]:
    """Quantile [], uniform in [j / F, (j + 1) / F), and base noise [length, 2] of view j."""
    key = jax.random.fold_in(row_key, view)
    cell = (view + open_uniform(stream(key, "level"), ())) / passes
    smallest = 2.0 ** -(GRID_BITS + 1)  # the ends of the grid
    u = jnp.clip(cell, smallest, 1 - smallest)
    return u, open_uniform(stream(key, "noise"), (length, 2))


def make_next_token_likelihood(
    apply_fn: Callable[..., Array], mask_id: int, *, replicates: int = 2
) -> Callable[..., Likelihood]:
    """Exact evaluation of ``-log p(eligible tokens | prompt)``, as :func:`make_likelihood`.

    ``apply_fn(params, tokens, None, documents) -> logits [B, L, K]`` is
    ``models.causal_apply(model, mask_id)`` or similar. The level curve has one bin (every token is
    predicted masked), the key may be None. ``replicates`` are copies: two or more give the true
    standard error, zero; a paired comparison with an estimate of R replicates needs R.
    """

    @jax.jit
    def score(params, key, batch, first_row, replicate, view):
        del key, first_row, replicate, view
        outputs = apply_fn(params, batch.tokens, None, batch.documents)
        nats = token_nats(outputs, batch.tokens, batch.eligible, mask_id)
        count = jnp.sum(batch.eligible, axis=-1, keepdims=True)
        return count, jnp.sum(nats, axis=-1, keepdims=True)

    return make_evaluation(score, passes=1, replicates=replicates, level_bins=1, exact=True)
