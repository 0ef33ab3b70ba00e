"""Standard errors, running means of gradients, and JSON-safe numbers.

Adding sample i to a running mean yields ``(i - 1) / i * |G_i - mean of G_1 .. G_{i-1}|^2``, zero
for the first. For independent samples the others have the expectation ``tr Cov(G)``, and together
they add up to the sum of squared deviations from the final mean (Welford 1962).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.rng import streams
from mdm_jax.types import Array, PyTree


class Estimate(NamedTuple):
    """A number and its standard error in the same unit, or NaN."""

    value: float
    standard_error: float


def mean_estimate(values: np.ndarray) -> Estimate:
    """Mean of independent values [R] with its standard error."""
    return Estimate(float(values.mean()), standard_error_of_mean(values))


def standard_error_of_mean(values: np.ndarray) -> float:
    """Standard error of the mean of independent values [R]; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def standard_error_of_ratio(totals: np.ndarray, sizes: np.ndarray) -> float:
    """Standard error of ``sum(totals) / sum(sizes)`` to first order; NaN for N < 2 or size 0."""
    rows, size = len(totals), sizes.sum()
    if rows < 2 or size <= 0:
        return math.nan
    residual = totals - totals.sum() / size * sizes
    return float(math.sqrt(rows / (rows - 1) * np.sum(residual**2)) / size)


class Total(NamedTuple):
    """A sum of independent parts, its standard error and the error's degrees of freedom."""

    value: np.ndarray
    standard_error: np.ndarray
    freedom: np.ndarray

    def reach(self, coverage: float = 0.95) -> np.ndarray:
        """Half the width of Student's interval; NaN without an error, 0 where the error is 0."""
        from scipy import special  # slow to import

        quantile = special.stdtrit(np.maximum(self.freedom, 1), (1 + coverage) / 2)
        return quantile * self.standard_error


def total_of(values: np.ndarray, target: np.ndarray | None = None, targets: int = 1) -> Total:
    """Sums of the means of independent parts from their replicates [R, P] (Rao: variances add up).

    ``target`` [P] is the number of each part's sum, of ``targets``; by default there is one. The
    degrees of freedom are Satterthwaite's (1946), from unbiased squares of the variances: R - 1 for
    a single part, about P (R - 1) for many alike. Errors are NaN for R < 2.
    """
    runs, parts = values.shape
    target = np.zeros(parts, int) if target is None else target
    mean = np.bincount(target, values.mean(0), minlength=targets)
    if runs < 2:
        return Total(mean, np.full(targets, np.nan), np.zeros(targets))
    variances = values.var(0, ddof=1) / runs
    variance = np.bincount(target, variances, minlength=targets)
    squares = np.bincount(target, variances**2, minlength=targets)
    share = np.divide(variance**2, squares, out=np.ones(targets), where=squares > 0)
    return Total(mean, np.sqrt(variance), (runs + 1) * share - 2)


def finite_or_none(value: float) -> float | None:
    """A float for JSON: None for NaN and infinities."""
    return float(value) if math.isfinite(value) else None


class RunningMean(NamedTuple):
    """Mean of ``count`` [] samples, like one sample, in float32."""

    count: Array
    mean: PyTree


def start(like: PyTree) -> RunningMean:
    """The mean of no samples, of the structure of ``like``."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=jnp.float32), like)
    return RunningMean(jnp.zeros((), jnp.float32), zeros)


def add(running: RunningMean, sample: PyTree) -> tuple[RunningMean, Array]:
    """Add a sample to the mean; also returns its term of the squared deviations."""
    count = running.count + 1
    change = jax.tree.map(lambda x, m: x.astype(jnp.float32) - m, sample, running.mean)
    mean = jax.tree.map(lambda m, d: m + d / count, running.mean, change)
    return RunningMean(count, mean), square_norm(change) * (count - 1) / count


def square_norm(tree: PyTree) -> Array:
    """Sum of squares over all leaves, float32."""
    squares = (jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree))
    return sum(squares, jnp.zeros(()))


BUCKETS = 1024
_FOLDED = 2**16


def sketch(tree: PyTree, key: Array) -> Array:
    """Count sketch of all leaves (Charikar et al. 2002), float32 in [1024]: entries are added up in
    buckets under random signs.

    Linear; over keys, its inner products have the original ones as means. A squared norm is kept to
    about 4%, exactly for at most 1024 entries. An array of more than 2^16 entries is first summed
    along its longest axis, so that on a mesh nothing large moves between devices; what is left of
    n numbers keeps its part of the norm to sqrt(2 / n).
    """
    total, offset, leaves = jnp.zeros(BUCKETS), 0, jax.tree.leaves(tree)
    keys = streams(key, [f"leaf {number}" for number in range(len(leaves))])
    for salt, leaf in zip(jax.vmap(lambda own: jax.random.bits(own, (), jnp.uint32))(keys), leaves):
        signed = leaf.astype(jnp.float32) * _signs(leaf.shape, salt)
        if leaf.ndim > 1 and leaf.size > _FOLDED:
            signed = signed.sum(int(np.argmax(leaf.shape)))
        flat = jnp.pad(signed.ravel(), (0, -signed.size % BUCKETS)).reshape(-1, BUCKETS).sum(0)
        total, offset = total + jnp.roll(flat, offset), offset + signed.size
    return total


def _signs(shape: tuple[int, ...], salt: Array) -> Array:
    """Signs from a hash of each entry's index (the finaliser of MurmurHash3), cheaper than bits of
    a key."""
    index, stride = salt, 1
    for axis in reversed(range(len(shape))):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(
            stride % 2**32
        )
        stride *= shape[axis]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = (index ^ (index >> shift)) * np.uint32(factor)
    return 1.0 - 2.0 * (index >> 31).astype(jnp.float32)
