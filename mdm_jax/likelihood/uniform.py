"""The bound of uniform-token diffusion on held-out data, by a fixed estimator.

F levels per row, one in each of F equal cells of the quantiles of one law, whatever the training
chain: that of the replacement rate ``m = v^3``, v uniform. At small rates the squared loss grows
like 1/m or somewhat faster, and a uniform rate would have infinite variance. A density near
``m^(-1/2)`` has the least variance; this one, ``m^(-2/3) / 3``, comes close, and its rare large
values are smaller, so that fewer replicates determine the error. Base noise is drawn anew for every
level: rotating it by 1/F, as ``variance.rotate`` does, gained little on the toy. The design is
repeated R times; the spread of the totals gives the Monte Carlo standard error.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import schedules
from mdm_jax.draws import GRID_BITS, Draw, open_uniform
from mdm_jax.likelihood.estimators import (
    RowScores,
    ScoredRows,
    check_at_least_one,
    make_evaluate,
    row_keys,
)
from mdm_jax.likelihood.result import Likelihood
from mdm_jax.objectives.uniform import uniform_nelbo
from mdm_jax.rng import stream
from mdm_jax.schedules import masked
from mdm_jax.types import Array


def make_uniform_likelihood(
    apply_fn: Callable[..., Array],
    num_tokens: int,
    *,
    passes: int,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the uniform-token bound; the forward pass is compiled once.

    Args:
        apply_fn: ``apply_fn(params, inputs, logsnr [B, 1], documents) -> logits [B, L, K]`` as of
            ``objectives.bound_rate`` (see ``corruption.leave_one_out``).
        num_tokens: K of ``corruption.uniform_tokens``.
        passes: F >= 1, forward passes per row and replicate.
        replicates: R >= 1, repetitions of the design; 8 or more for a usable standard error.
        level_bins: equal bins of the loss curve over the replacement rate.

    Returns:
        ``evaluate(params, key, batches, progress=None) -> Likelihood``, as of ``make_likelihood``.
        In its level curve rates are replacement rates, tokens all eligible ones, and the mean of a
        bin is that of the bound's integrand, nats per token, over the rates of the bin.

    Raises:
        ValueError: for fewer than two tokens, passes, replicates or level_bins below 1, batches of
            different shapes, or no eligible token in all the data.
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
