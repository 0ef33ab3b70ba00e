"""The bound of a block diffusion model on held-out data, by a fixed estimator.

The count design of ``estimators.py`` in every block, independent between blocks: with S_bj the
summed cross-entropy of the k_bj of n_b tokens that view j masks in block b,
``sum_b (n_b / k_bj) S_bj`` is an unbiased estimate of the bound. One pass scores all blocks.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdm_jax.corruption.process import sum_levels
from mdm_jax.likelihood.estimators import logsnr_of_count, pass_masks, row_keys
from mdm_jax.likelihood.masked import make_evaluation
from mdm_jax.likelihood.result import Likelihood
from mdm_jax.models.cross_entropy import token_nats
from mdm_jax.models.masks import check_blocks
from mdm_jax.types import Array


def make_block_likelihood(
    apply_fn: Callable[..., Array],
    mask_id: int,
    block_size: int,
    *,
    passes: int,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the block bound; the forward pass is compiled once.

    With blocks of one token the bound is the autoregressive log-likelihood: every pass is the same,
    one is run, and its Monte Carlo error is zero.

    Args:
        apply_fn: ``apply_fn(params, inputs [B, 2L], logsnr [B, S], documents [B, L]) -> logits
            [B, L, K]``, such as ``models.block_apply(model, block_size)``. The level for k of n
            masked tokens of a block is that of the rate (k - 1/2) / n.
        mask_id: the mask token; it is excluded from the softmax.
        block_size: L'.
        passes: F >= 1, forward passes per row and replicate. May exceed L'.
        replicates, level_bins: as of ``make_likelihood``.

    Returns:
        ``evaluate(params, key, batches, progress=None) -> Likelihood``, as of ``make_likelihood``.

    Raises:
        ValueError: as ``make_likelihood``, and if L' does not divide the length of the rows.
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
