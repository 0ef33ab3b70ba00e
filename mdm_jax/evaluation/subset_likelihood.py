"""Log-likelihoods by denoising cross-entropy: what is exact, and what is a bound.

Let I be the visible part of n eligible tokens (the prompt is always visible). The time-free
identity of masked diffusion is

    -log p(x | prompt) = H_n E_I [ sum_{i not in I} -log p(x_i | x_I, prompt) ] ,

the size n - |I| = k having the probability 1 / (k H_n), I uniform given its size. Equivalently it
is the mean over all orders of revealing of the sum of ``-log p(next token | those before it)``.

* The identity is exact where all conditionals that occur are those of *one* joint law (an
  order-consistent model, such as the true data law): then every order has the same sum, by the
  chain rule, and p is that law.
* Any other network has no single p. The right-hand side is then the any-order bound (the NELBO of
  the network), and with P the law of exact one-by-one sampling in random order

      right-hand side >= -log P(x | prompt) ,

  with equality for a row if and only if all orders give it the same probability. The gap is that
  of ``exact_nelbo`` to ``any_order_log_likelihood``.

Either way the estimates here have the right-hand side as their expectation, by any design of
``subset_designs``; their Monte Carlo error is stated, and is zero for ``every_subset``. A
difference of two rows on common subsets (``paired_difference``) estimates a log-likelihood ratio.

Reference: Jeon et al. 2025, Information-Theoretic Discrete Diffusion (arXiv 2510.24088).
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.batches import Batch
from mdm_jax.evaluation.design import logsnr_of_count, row_keys
from mdm_jax.evaluation.likelihood_result import Likelihood
from mdm_jax.evaluation.scored_batches import (
    RowScores,
    ScoredRows,
    check_at_least_one,
    count_scores,
    pool,
    score_batches,
)
from mdm_jax.evaluation.subset_designs import SubsetDesign
from mdm_jax.objectives import token_nats
from mdm_jax.streams import stream
from mdm_jax.typing import Array, PyTree


def make_subset_likelihood(
    apply_fn: Callable[..., Array],
    mask_id: int,
    design: SubsetDesign,
    *,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the any-order bound by a subset design; the forward pass is compiled once.

    Args:
        apply_fn: ``apply_fn(params, inputs, logsnr [B, 1], documents) -> logits [B, L, K]``. The
            level shown for k of n masked tokens is that of the rate (k - 1/2) / n.
        mask_id: the mask token; it is excluded from the softmax.
        design: which subsets are masked. A batch takes the passes of its costliest row.
        replicates: R >= 1, independent repetitions of the design. A batch all of whose rows are
            fixed by the design is computed once, its replicates are equal.
        level_bins: bins of the loss curve over the masking rate.

    Returns:
        ``evaluate(params, key, batches, progress=None) -> Likelihood``, as ``make_likelihood``:
        all batches have one shape, and a row's subsets depend on the key and its number in the
        stream alone. ``passes`` of the result is that of the costliest batch.

    Raises:
        ValueError: for replicates or level_bins below 1, a row that the design refuses, batches of
            different shapes, or no eligible token in all the data.
    """
    check_at_least_one(replicates=replicates, level_bins=level_bins)

    @jax.jit
    def score(params, key, batch, first_row, replicate, view):
        keys = row_keys(key, first_row, batch.tokens.shape[0], replicate)
        mask, weight = design.draw(keys, batch.eligible, view)
        count = jnp.sum(mask, axis=-1)
        logsnr = logsnr_of_count(jnp.maximum(count, 1), jnp.sum(batch.eligible, axis=-1))
        inputs = jnp.where(mask, mask_id, batch.tokens)
        outputs = apply_fn(params, inputs, logsnr[:, None], batch.documents)
        nats = token_nats(outputs, batch.tokens, mask, mask_id)
        estimate = jnp.sum(weight * nats, axis=-1)
        return estimate, jnp.sum(nats, axis=-1), count

    def evaluate(
        params: PyTree,
        key: Array,
        batches: Iterable[Batch],
        progress: Callable[[int], None] | None = None,
    ) -> Likelihood:
        key = stream(key, "likelihood")

        def score_all(batch: Batch, first_row: int, rows: ScoredRows) -> list:
            sizes = {int(n) for n in rows.size}
            repeats = 1 if all(design.fixed(n) for n in sizes) else replicates
            views = max(design.passes(n) for n in sizes)
            return [
                [score(params, key, batch, first_row, r, j) for j in range(views)]
                for r in range(repeats)
            ]

        def collect(passed: list, rows: ScoredRows) -> RowScores:
            found = np.array(passed, np.float64)[..., rows.place]  # [R', F, 3, N]
            estimate, loss, count = np.moveaxis(found, 2, 0)
            nats = estimate.sum(axis=1)
            nats = np.broadcast_to(nats, (replicates, nats.shape[1]))
            count = count.astype(np.int64)[..., None]
            return count_scores(nats, rows, loss[..., None], count, level_bins)

        return pool(*score_batches(params, batches, score_all, collect, progress))

    return evaluate
