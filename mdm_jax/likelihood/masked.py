"""The masked diffusion bound of held-out data, by a fixed estimator with error bars.

The estimator is the count design of ``estimators.py``, whatever the training chain. With S_j the
summed cross-entropy of the k_j of n tokens that view j masks, every ``(n / k_j) S_j`` is an
unbiased estimate of

    NELBO(x) = sum_{k=1}^{n} (1/k) E[S | k masked]   (nats)

and a row's estimate is the mean over its F views. The views are negatively correlated, so their
spread is no error of the mean: the whole design is repeated R times, and the spread of the R totals
gives the standard error.

References: Ou et al. 2024 (RADD) and Nie et al. 2025 (LLaDA) for the fixed-count form of the bound.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.likelihood.estimators import (
    RowScores,
    ScoredRows,
    check_at_least_one,
    count_scores,
    logsnr_of_count,
    make_evaluate,
    pass_masks,
    row_keys,
)
from mdm_jax.likelihood.result import Likelihood
from mdm_jax.models.cross_entropy import token_nats
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
        apply_fn: ``apply_fn(params, inputs, logsnr [B, 1], documents) -> logits [B, L, K]``, or
            a readout of them (``models.readout_apply``). The level for k of n masked tokens is that
            of the rate (k - 1/2) / n.
        mask_id: the mask token; it is excluded from the softmax.
        passes: F >= 1, forward passes per row and replicate. May exceed n.
        replicates: R >= 1, repetitions of the design; 8 or more for a usable standard error.
        level_bins: bins of the loss curve over the masking rate.

    Returns:
        ``evaluate(params, key, batches, progress=None) -> Likelihood``. All batches have one shape
        (fill the last with rows that have no eligible token). A row's random numbers depend on the
        key and its number in the stream, not on the batch size: two models evaluated with one key
        get the same masks. ``progress(rows)`` is called after each batch (``tqdm.update``). A
        forward pass holds the logits of one batch, of a readout those of a chunk.

    Raises:
        ValueError: for passes, replicates or level_bins below 1, batches of different shapes, or no
            eligible token in all the data.
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
    """Evaluation by a count design in every segment of a row.

    Args:
        score: ``score(params, key, batch, first_row, replicate, view) -> (count [B, S], nats
            [B, S])`` for S contiguous segments of every row: how many of a segment's n eligible
            tokens are masked, and their summed cross-entropy; ``n / count`` times it estimates the
            segment's bound.
        passes, replicates, level_bins: as in :func:`make_likelihood`.
        exact: the pass draws nothing: one stands for all passes and replicates, which are equal.

    Returns:
        ``evaluate``, as of :func:`make_likelihood`.

    Raises:
        ValueError: likewise.
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
