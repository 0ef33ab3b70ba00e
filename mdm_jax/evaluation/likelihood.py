"""The masked diffusion bound of held-out data, by a fixed estimator and with error bars.

The estimator is the count design of ``design.py`` and never depends on how the model was trained.
With S_j the summed cross-entropy of the k_j of n tokens that view j masks, every ``(n / k_j) S_j``
is an unbiased estimate of

    NELBO(x) = sum_{k=1}^{n} (1/k) E[S | k masked]   (nats)

and a row's estimate is the mean over its F views. The views are negatively correlated, so their
spread says nothing about the error of the mean: the whole design is repeated R times with fresh
randomness, and the spread of the R totals gives the standard error.

References: Ou et al. 2024 (RADD) and Nie et al. 2025 (LLaDA) for the fixed-count form of the bound.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.batches import Batch
from mdm_jax.corruption import cross_entropy
from mdm_jax.evaluation.design import logsnr_of_count, pass_masks, row_keys
from mdm_jax.evaluation.likelihood_result import LevelCurve as LevelCurve
from mdm_jax.evaluation.likelihood_result import Likelihood as Likelihood
from mdm_jax.streams import stream
from mdm_jax.typing import Array, PyTree


def make_likelihood(
    apply_fn: Callable[..., Array],
    mask_id: int,
    *,
    passes: int,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the bound; the forward pass is compiled once.

    Args:
        apply_fn: ``apply_fn(params, inputs, logsnr [B, 1], documents) -> logits [B, L, K]``. The
            level shown for k of n masked tokens is that of the rate (k - 1/2) / n.
        mask_id: the mask token; it is excluded from the softmax.
        passes: F >= 1, forward passes per row and replicate. May exceed n.
        replicates: R >= 1, repetitions of the design; 8 or more for a usable standard error.
        level_bins: bins of the loss curve over the masking rate.

    Returns:
        ``evaluate(params, key, batches, progress=None) -> Likelihood``. All batches have one shape
        (fill the last with rows that have no eligible token). The randomness of a row depends on
        the key and its number in the stream, not on the batch size: two models evaluated with one
        key see the same masks. ``progress(rows)`` is called after each batch (``tqdm.update``). A
        forward pass holds the logits of one batch.

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
        logits = apply_fn(params, inputs, logsnr[:, None], batch.documents)
        nats = cross_entropy(logits, tokens, mask_id)
        return count[:, None], jnp.sum(jnp.where(mask, nats, 0.0), axis=-1, keepdims=True)

    return make_evaluation(score, passes=passes, replicates=replicates, level_bins=level_bins)


def make_evaluation(
    score: Callable[..., tuple[Array, Array]],
    *,
    passes: int,
    replicates: int,
    level_bins: int,
    exact: bool = False,
) -> Callable[..., Likelihood]:
    """Runs a compiled pass over a data set and pools what it finds.

    Args:
        score: ``score(params, key, batch, first_row, replicate, view) -> (count [B, S], nats
            [B, S])`` for S contiguous segments of every row: how many of a segment's n eligible
            tokens are masked, and their summed cross-entropy, of which ``n / count`` times as much
            estimates the segment's bound.
        passes: F, as in :func:`make_likelihood`.
        replicates: R, likewise.
        level_bins: likewise.
        exact: the pass draws nothing: one stands for all passes and replicates, which are equal.

    Returns:
        ``evaluate``, as :func:`make_likelihood` describes it.

    Raises:
        ValueError: likewise.
    """
    for name, value in (("passes", passes), ("replicates", replicates), ("level_bins", level_bins)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    num_passes, num_runs = (1, 1) if exact else (passes, replicates)

    def evaluate(
        params: PyTree,
        key: Array | None,
        batches: Iterable[Batch],
        progress: Callable[[int], None] | None = None,
    ) -> Likelihood:
        key = None if exact else stream(key, "likelihood")
        shape, seen, parts = None, 0, []
        for batch in batches:
            shape = _check_shape(batch, shape, num_passes)
            num_rows = shape[0]
            if np.any(batch.eligible):
                batch = jax.tree.map(jnp.asarray, batch)
                passed = [
                    [score(params, key, batch, seen, r, j) for j in range(num_passes)]
                    for r in range(num_runs)
                ]
                parts.append(_collect(passed, batch, seen, level_bins))
            seen += num_rows
            if progress is not None:
                progress(num_rows)
        if not parts:
            raise ValueError(f"nothing to score: none of {seen} rows has an eligible token")
        return _pool(parts, seen, num_passes, replicates // num_runs, level_bins)

    return evaluate


class _Part(NamedTuple):
    row_nats: np.ndarray
    tokens: np.ndarray
    units: np.ndarray
    index: np.ndarray
    level_nats: np.ndarray
    level_targets: np.ndarray


def _collect(passed, batch: Batch, first_row: int, bins: int) -> _Part:
    count = np.array([[np.asarray(c) for c, _ in row] for row in passed], np.int64)
    loss = np.array([[np.asarray(s) for _, s in row] for row in passed], np.float64)
    rows, segments = count.shape[-2:]
    n = np.asarray(batch.eligible).reshape(rows, segments, -1).sum(-1).astype(np.int64)
    scored = n.any(-1)
    n, count, loss = n[scored], count[..., scored, :], loss[..., scored, :]
    count = np.where(n > 0, count, 0)
    # Bin b holds b/bins < k/n <= (b+1)/bins, decided in integers.
    level = np.maximum(-(-count * bins // np.maximum(n, 1)) - 1, 0)
    return _Part(
        row_nats=(n / np.maximum(count, 1) * loss).sum(-1).mean(axis=1),
        tokens=n.sum(-1),
        units=np.asarray(batch.units, np.int64)[scored],
        index=first_row + np.flatnonzero(scored),
        level_nats=np.bincount(level.ravel(), loss.ravel(), minlength=bins),
        level_targets=np.bincount(level.ravel(), count.ravel(), minlength=bins),
    )


def _pool(parts: list[_Part], rows_seen: int, passes: int, repeats: int, bins: int) -> Likelihood:
    nats = sum(part.level_nats for part in parts)
    targets = sum(part.level_targets for part in parts)
    mean = np.divide(nats, targets, out=np.full(bins, np.nan), where=targets > 0)
    return Likelihood(
        replicate_row_nats=np.tile(np.concatenate([p.row_nats for p in parts], 1), (repeats, 1)),
        row_tokens=np.concatenate([part.tokens for part in parts]),
        row_units=np.concatenate([part.units for part in parts]),
        row_index=np.concatenate([part.index for part in parts]),
        rows_seen=rows_seen,
        passes=passes,
        levels=LevelCurve(np.arange(bins + 1) / bins, mean, targets.astype(np.int64)),
    )


def _check_shape(batch: Batch, shape: tuple | None, passes: int) -> tuple[int, int]:
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
    if passes * found[1] >= 2**31:
        raise ValueError(f"passes * length must stay below 2**31, got {passes} * {found[1]}")
    return found
