"""The bound of uniform-token diffusion of held-out data, by a fixed estimator.

The estimator knows nothing of the training chain: F levels per row, one in each of F equal cells of
the quantiles of one law, that of the replacement rate ``m = v^3``, v uniform. At small rates the
squared loss grows like 1/m or somewhat faster, and a uniform rate would have infinite variance. The
least variance is that of a density near ``m^(-1/2)``; this one, ``m^(-2/3) / 3``, comes close, and
its rare large values are smaller, so that fewer replicates tell the error. Base noise is drawn anew
for every level: turning it by 1/F of the circle, as ``variance.rotate`` does, gained nothing worth
having on the toy.

The whole design is repeated R times with fresh randomness; the spread of the totals gives the Monte
Carlo standard error.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import schedules
from mdm_jax.draws import GRID_BITS, Draw, open_uniform
from mdm_jax.likelihood.estimators import (
    RowScores,
    ScoredRows,
    check_at_least_one,
    pool,
    score_batches,
)
from mdm_jax.likelihood.result import Likelihood
from mdm_jax.objectives.uniform import uniform_nelbo
from mdm_jax.rng import stream
from mdm_jax.schedules import masked
from mdm_jax.types import Array, Batch, PyTree


def make_uniform_likelihood(
    apply_fn: Callable[..., Array],
    num_tokens: int,
    *,
    passes: int,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the bound; the forward pass is compiled once.

    Args:
        apply_fn: ``apply_fn(params, inputs, logsnr [B, 1], documents) -> logits [B, L, K]`` as
            ``objectives.bound_rate`` takes them (see ``corruption.leave_one_out``).
        num_tokens: K of ``corruption.uniform_tokens``.
        passes: F >= 1, forward passes per row and replicate.
        replicates: R >= 1, repetitions of the design; 8 or more for a usable standard error.
        level_bins: equal bins of the loss curve over the replacement rate.

    Returns:
        ``evaluate(params, key, batches, progress=None) -> Likelihood``. In its level curve the
        rates are replacement rates, the tokens all scored ones, and the mean of a bin is that of
        the bound's integrand, nats per token, over the rates of the bin. All batches have one shape
        (fill the last with rows that have no eligible token). The randomness of a row depends on
        the key and its number in the stream, not on the batch size: two models evaluated with one
        key see the same noisy rows. ``progress(rows)`` is called after each batch.

    Raises:
        ValueError: for fewer than two tokens, passes, replicates or level_bins below 1, batches of
            different shapes, or no eligible token in all the data.
    """
    check_at_least_one(passes=passes, replicates=replicates, level_bins=level_bins)
    law = schedules.law_of(masked.power(3.0))
    objective = uniform_nelbo(num_tokens, law)

    @jax.jit
    def score(params, key, batch, first_row, replicate, j):
        rows, length = batch.tokens.shape
        numbers = first_row + jnp.arange(rows)
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), replicate))(
            numbers
        )
        u, noise = jax.vmap(lambda row_key: pass_numbers(row_key, j, passes, length))(keys)
        u = u[None, :, None]
        draw = Draw(u, jnp.zeros_like(u), noise[None])
        stats = objective.loss(lambda *a: apply_fn(params, *a), batch, draw)
        rate = jax.nn.sigmoid(-law.icdf(u))
        return tuple(a[0, :, 0] for a in (rate, stats.weight, stats.raw))

    def evaluate(
        params: PyTree,
        key: Array,
        batches: Iterable[Batch],
        progress: Callable[[int], None] | None = None,
    ) -> Likelihood:
        key = stream(key, "uniform_likelihood")

        def score_all(batch: Batch, first_row: int, _rows: ScoredRows) -> list:
            return [
                [score(params, key, batch, first_row, r, j) for j in range(passes)]
                for r in range(replicates)
            ]

        def collect(passed: list, rows: ScoredRows) -> RowScores:
            found = np.array(passed, np.float64)[..., rows.place]  # [R, F, 3, N]
            rate, weight, raw = np.moveaxis(found, 2, 0)
            # Bin b holds b/bins < m <= (b+1)/bins.
            level = np.clip(np.ceil(rate * level_bins).astype(int) - 1, 0, level_bins - 1)
            size = np.broadcast_to(rows.size, rate.shape)
            nats, mass, targets = (
                np.bincount(level.ravel(), values.ravel(), minlength=level_bins)
                for values in (weight * raw, weight * size, size)
            )
            row_nats = (weight * raw).mean(axis=1)
            return RowScores(row_nats, rows, nats, mass, targets, passes)

        return pool(*score_batches(params, batches, score_all, collect, progress))

    return evaluate


def pass_numbers(row_key: Array, j: Array, passes: int, length: int) -> tuple[Array, Array]:
    """Quantile [], uniform in [j / F, (j + 1) / F), and base noise [length, 2] of pass j."""
    key = jax.random.fold_in(row_key, j)
    cell = (j + open_uniform(stream(key, "level"), ())) / passes
    smallest = 2.0 ** -(GRID_BITS + 1)  # where the ends of the grid are
    u = jnp.clip(cell, smallest, 1 - smallest)
    return u, open_uniform(stream(key, "noise"), (length, 2))
