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
from mdm_jax.batches import Batch
from mdm_jax.draws import GRID_BITS, Draw, open_uniform
from mdm_jax.evaluation.likelihood import LevelCurve, Likelihood
from mdm_jax.objectives.uniform_nelbo import uniform_nelbo
from mdm_jax.streams import stream
from mdm_jax.typing import Array, PyTree


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
    for name, value in (("passes", passes), ("replicates", replicates), ("level_bins", level_bins)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    law = schedules.law_of(schedules.masked.power(3.0))
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
        shape, seen, values, tokens, units, index = None, 0, [], [], [], []
        for batch in batches:
            shape = _check_shape(batch, shape)
            count = np.asarray(batch.eligible).sum(-1)
            scored = np.flatnonzero(count)
            if scored.size:
                batch = jax.tree.map(jnp.asarray, batch)
                found = [
                    [score(params, key, batch, seen, r, j) for j in range(passes)]
                    for r in range(replicates)
                ]
                values.append(np.asarray(found, np.float64)[..., scored])  # [R, F, 3, rows]
                tokens.append(count[scored])
                units.append(np.asarray(batch.units, np.int64)[scored])
                index.append(seen + scored)
            seen += shape[0]
            if progress is not None:
                progress(shape[0])
        if not values:
            raise ValueError(f"nothing to score: none of {seen} rows has an eligible token")
        rate, weight, raw = np.moveaxis(np.concatenate(values, axis=-1), 2, 0)
        row_tokens = np.concatenate(tokens).astype(np.int64)
        return Likelihood(
            replicate_row_nats=(weight * raw).mean(axis=1),
            row_tokens=row_tokens,
            row_units=np.concatenate(units),
            row_index=np.concatenate(index),
            rows_seen=seen,
            passes=passes,
            levels=_level_curve(rate, weight, raw, row_tokens, level_bins),
        )

    return evaluate


def pass_numbers(row_key: Array, j: Array, passes: int, length: int) -> tuple[Array, Array]:
    """Quantile [], uniform in [j / F, (j + 1) / F), and base noise [length, 2] of pass j."""
    key = jax.random.fold_in(row_key, j)
    cell = (j + open_uniform(stream(key, "level"), ())) / passes
    smallest = 2.0 ** -(GRID_BITS + 1)  # where the ends of the grid are
    u = jnp.clip(cell, smallest, 1 - smallest)
    return u, open_uniform(stream(key, "noise"), (length, 2))


def _level_curve(rate, weight, raw, row_tokens, bins: int) -> LevelCurve:
    # Bin b holds b/bins < m <= (b+1)/bins.
    level = np.clip(np.ceil(rate * bins).astype(int) - 1, 0, bins - 1).ravel()
    size = np.broadcast_to(row_tokens, rate.shape)
    nats = np.bincount(level, (weight * raw).ravel(), minlength=bins)
    mass = np.bincount(level, (weight * size).ravel(), minlength=bins)
    mean = np.divide(nats, mass, out=np.full(bins, np.nan), where=mass > 0)
    targets = np.bincount(level, size.ravel(), minlength=bins)
    return LevelCurve(np.arange(bins + 1) / bins, mean, targets.astype(np.int64))


def _check_shape(batch: Batch, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    found = tuple(batch.tokens.shape)
    if len(found) != 2 or tuple(batch.eligible.shape) != found:
        raise ValueError(
            "a batch needs tokens and eligible of one shape [B, L], got "
            f"{found} and {tuple(batch.eligible.shape)}"
        )
    if shape is not None and found != shape:
        raise ValueError(
            f"all batches must have the shape of the first, {shape}, got {found}; "
            "fill the last batch with rows that have no eligible token"
        )
    return found
