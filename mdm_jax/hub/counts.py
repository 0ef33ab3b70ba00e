"""Tokens per step of the families' decoding loops, in NumPy, rounded as they round."""

import numpy as np

from mdm_jax.types import ArrayLike


def llada_counts(masks: ArrayLike, steps: int) -> np.ndarray:
    """[..., steps] tokens per step of LLaDA: ``n // steps``, one more in the first ``n % steps``.

    Zeros are steps that fill nothing; they are skipped here, and cost a pass in the original.
    """
    masks = np.asarray(masks)[..., None]
    return masks // steps + (np.arange(steps) < masks % steps)


def dllm_counts(masks: ArrayLike, steps: int) -> np.ndarray:
    """[..., steps] tokens per step of dllm with its linear schedule, zeros moved to the end.

    ``round(left p)`` of the masks left, ``p = 1 - (1 - alpha(s)) / (1 - alpha(t))`` with alpha in
    float32, the product in float64, half to even: not the counts of LLaDA, and not as even.
    """
    left = np.asarray(masks, np.int64).copy()
    counts = np.zeros((*left.shape, steps), np.int64)
    time = (np.arange(steps, -1, -1) / steps).astype(np.float32)
    rate = np.float32(1) - (np.float32(1) - time)
    for j in range(steps):
        share = 1 - float(rate[j + 1] / rate[j])
        counts[..., j] = np.minimum(np.round(left * share).astype(np.int64), left)
        left -= counts[..., j]
    order = np.argsort(counts == 0, axis=-1, kind="stable")
    return np.take_along_axis(counts, order, axis=-1)


def dream_shares(steps: int, smallest_time: float = 1e-3) -> np.ndarray:
    """[steps] float32 shares of the masks left that Dream fills, rounded down; all in the last."""
    time = even_times(steps, smallest_time)
    return np.append(1 - time[1:-1] / time[:-2], np.float32(1))


def even_times(steps: int, smallest_time: float) -> np.ndarray:
    """[steps + 1] float32 times from 1 down to the smallest, as torch.linspace rounds them."""
    last = np.float32(smallest_time)
    index, step = np.arange(steps + 1, dtype=np.float32), (last - np.float32(1)) / np.float32(steps)
    first_half = index < (steps + 1) // 2
    return np.where(first_half, 1 + step * index, last - step * (steps - index)).astype(np.float32)
