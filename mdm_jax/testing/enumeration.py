"""Exact values by enumeration of all masks of a row, float64, on the host.

A row with n eligible positions has 2^n masks; bit j of mask M is set iff it masks the j-th.
"""

import math

import jax
import numpy as np

from mdm_jax.likelihood.estimators import logsnr_of_count
from mdm_jax.likelihood.subsets import MAX_ELIGIBLE
from mdm_jax.types import Batch, ModelFn

_CHUNK, _SMALLEST_CHUNK = 1024, 64


def mask_cross_entropies(model_fn: ModelFn, row: Batch, mask_id: int) -> np.ndarray:
    """Cross-entropy of every masked position under every mask, nats, [2^n, n] float64.

    Entry [M, j] is that of the j-th eligible position of one row (no batch axis), 0 where M does
    not mask it. The network runs at the level of the rate (k - 1/2) / n for k masked positions, its
    mask logit excluded. ValueError for a batch axis or more than 15 eligible positions.
    """
    tokens, eligible = np.asarray(row.tokens), np.asarray(row.eligible)
    if tokens.ndim != 1:
        raise ValueError(f"one row at a time, tokens [L]; got shape {tokens.shape}")
    positions = np.flatnonzero(eligible)
    n = len(positions)
    if n > MAX_ELIGIBLE:
        raise ValueError(
            f"{n} eligible positions mean 2**{n} masks; enumeration stops at {MAX_ELIGIBLE}, "
            "use make_likelihood for longer rows"
        )
    masked = mask_bits(n)
    inputs = np.repeat(tokens[None], 2**n, axis=0)
    inputs[:, positions] = np.where(masked, mask_id, tokens[positions])
    # The empty mask contributes nothing; it runs at the level of one masked token.
    counts = np.minimum(np.arange(1, MAX_ELIGIBLE + 1), max(n, 1))  # one shape for all rows
    levels = np.asarray(logsnr_of_count(counts, max(n, 1)))
    logsnr = levels[np.maximum(masked.sum(1), 1) - 1, None]
    logits = _run(model_fn, inputs, logsnr, np.asarray(row.documents), positions)
    if logits.shape[-1] > mask_id:
        logits[..., mask_id] = -np.inf
    top = logits.max(-1, keepdims=True)
    log_total = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    target = np.take_along_axis(logits, tokens[None, positions, None], axis=-1)[..., 0]
    return np.where(masked, log_total - target, 0.0)


def mask_losses(model_fn: ModelFn, row: Batch, mask_id: int) -> np.ndarray:
    """S(x, M), the summed cross-entropy of the masked positions, nats, for every mask, [2^n]."""
    return mask_cross_entropies(model_fn, row, mask_id).sum(1)


def exact_nelbo(model_fn: ModelFn, batch: Batch, mask_id: int) -> np.ndarray:
    """``sum_k E[S | k masked] / k`` of each row [B, L], nats, [B]; 0 for a row without targets."""
    losses = [count_losses(mask_losses(model_fn, row, mask_id)) for row in _rows(batch)]
    return np.array([np.sum(loss[1:] / np.arange(1, len(loss))) for loss in losses])


def any_order_log_likelihood(model_fn: ModelFn, batch: Batch, mask_id: int) -> np.ndarray:
    """log P(x) of each row [B, L], nats, [B], under the law of ``samplers.first_hitting``.

    Positions are revealed in uniformly random order; the probability is averaged over orders, where
    the bound averages its logarithm: ``exact_nelbo >= -any_order_log_likelihood``.
    """
    return np.array([_log_law(mask_cross_entropies(model_fn, r, mask_id)) for r in _rows(batch)])


def count_losses(losses: np.ndarray) -> np.ndarray:
    """``E[S | k masked]`` for k = 0..n under uniform masks of each size, [n + 1], from S [2^n]."""
    n = _log2(losses)
    size = mask_bits(n).sum(1)
    return np.bincount(size, losses, minlength=n + 1) / np.bincount(size, minlength=n + 1)


def rate_losses(losses: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """``E[S | m]`` under Bernoulli masks, for masking rates of any shape, from S [2^n]."""
    by_count = count_losses(losses)
    n, rates = len(by_count) - 1, np.asarray(rates, np.float64)
    terms = (
        math.comb(n, k) * rates**k * (1 - rates) ** (n - k) * by_count[k] for k in range(n + 1)
    )
    return sum(terms)


def exact_variance(losses: np.ndarray) -> tuple[float, float]:
    """(pattern, count) variance of one fixed-count pass ``(n/k) S``, k uniform on 1..n, nats^2.

    Mean over k of the variance given k, and variance over k of the mean given k. F independent
    passes have variance (pattern + count) / F, or pattern / F with every count equally often.
    """
    n = _log2(losses)
    size = mask_bits(n).sum(1)
    weighted = [n / k * losses[size == k] for k in range(1, n + 1)]
    pattern = np.mean([w.var() for w in weighted])
    return float(pattern), float(np.var([w.mean() for w in weighted]))


def mask_bits(n: int) -> np.ndarray:
    """[2^n, n] bool: entry [M, j] is bit j of M."""
    return (np.arange(2**n)[:, None] >> np.arange(n)[None]) & 1 == 1


def _run(model_fn, inputs, logsnr, documents, positions) -> np.ndarray:
    total = len(inputs)
    # Rows with few eligible positions share a program, padded with the last input.
    chunk = min(max(total, _SMALLEST_CHUNK), _CHUNK)
    run = jax.jit(model_fn)
    docs, parts = np.repeat(documents[None], chunk, axis=0), []
    for start in range(0, total, chunk):
        part = np.minimum(np.arange(start, start + chunk), total - 1)
        logits = np.asarray(run(inputs[part], logsnr[part], docs))
        parts.append(logits[:, positions].astype(np.float64))
    return np.concatenate(parts)[:total]


def _log_law(cross_entropies: np.ndarray) -> float:
    # law[M] is the log-probability of filling the masked positions M, the others being given.
    num_masks, n = cross_entropies.shape
    masked = mask_bits(n)
    law = np.zeros(num_masks)
    for size in range(1, n + 1):
        for mask in np.flatnonzero(masked.sum(1) == size):
            positions = np.flatnonzero(masked[mask])
            paths = law[mask - (1 << positions)] - cross_entropies[mask, positions]
            law[mask] = np.logaddexp.reduce(paths) - math.log(size)
    return float(law[-1])


def _rows(batch: Batch) -> list[Batch]:
    if np.ndim(batch.tokens) != 2:
        raise ValueError(f"a batch of rows [B, L] is needed, got shape {np.shape(batch.tokens)}")
    return [Batch(*(np.asarray(field)[i] for field in batch)) for i in range(len(batch.tokens))]


def _log2(losses: np.ndarray) -> int:
    n = len(losses).bit_length() - 1
    if len(losses) != 2**n:
        raise ValueError(f"losses must be given for all 2**n masks, got {len(losses)}")
    return n
