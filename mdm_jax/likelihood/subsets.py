"""Log-likelihoods by masked subsets: designs that choose the subsets, and their evaluation.

With ``ce_i(M) = -log p(x_i | all tokens outside M)`` for a masked token i, nats, an estimate is
``sum over views j of sum_{i in M_j} w_ij ce_i(M_j)``. A design draws the subsets M_j and weights
w_ij such that the expectation is, for a row with n eligible tokens, the any-order bound

    NELBO = sum_{k=1}^{n} (1/k) E[sum_{i in M} ce_i(M) | M uniform of size k] .

Designs differ in forward passes and variance only: on row 1 of the toy (n = 4), four passes,

    uniform_counts    0.48719781   every count alike, weight n/k
    harmonic_counts   1.85573119   count with probability 1 / (k H_n), weight H_n
    nested_prefixes   0.51424044   the prefixes of one permutation
    one_path          0.11880705   the next token of each prefix
    rotated_counts    0.35653381   counts spread evenly, one permutation rotated

The NELBO is the mean, over orders of unmasking, of the sum of ``-log p(next token | those before
it)``: ``-log p(x | prompt)`` exactly if all conditionals are those of *one* joint law. Otherwise it
bounds ``-log P(x | prompt)`` of one-by-one sampling in random order, with equality for a row iff
all orders give it the same probability (``testing.exact_nelbo``,
``testing.any_order_log_likelihood``). ``evaluation.paired_difference`` of two rows on common
subsets estimates a log-likelihood ratio.

References: Uria et al. 2014 (any-order models); Jeon et al. 2025, Information-Theoretic Discrete
Diffusion (arXiv 2510.24088), for ``harmonic_counts`` and the identity.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.corruption.masked import noise_ranks
from mdm_jax.draws import open_uniform
from mdm_jax.likelihood.estimators import (
    Likelihood,
    RowScores,
    ScoredRows,
    check_at_least_one,
    count_scores,
    logsnr_of_count,
    make_evaluate,
    pass_masks,
    row_keys,
)
from mdm_jax.models.cross_entropy import token_nats
from mdm_jax.rng import stream
from mdm_jax.types import Array

MAX_ELIGIBLE = 15
"""Largest number of eligible positions that is enumerated: 32768 forward passes."""


class SubsetDesign(NamedTuple):
    """How the subsets of one replicate are drawn.

    Attributes:
        passes: ``passes(n) -> int``, views of a row with n >= 1 eligible tokens; further ones mask
            nothing.
        draw: ``draw(keys [B], eligible [B, L], view) -> (mask [B, L] bool, weight [B, L] float32)``
            of one view, jit-able; the keys are the same in every view.
        fixed: ``fixed(n) -> bool``, whether such a row has the same subsets in every replicate.
    """

    name: str
    passes: Callable[[int], int]
    draw: Callable[[Array, Array, Array], tuple[Array, Array]]
    fixed: Callable[[int], bool]


def uniform_counts(passes: int) -> SubsetDesign:
    """F >= 1 independent subsets, their size uniform on {1..n}, weight ``n / (k F)``."""
    return _independent("uniform_counts", passes, np.ones_like)


def harmonic_counts(passes: int) -> SubsetDesign:
    """F >= 1 independent subsets of size k with probability ``1 / (k H_n)``, weight ``H_n / F``.

    The time-free form of the bound: all subsets have one weight, the harmonic number H_n. Where the
    loss grows with the number of masked tokens, uniform counts have the smaller variance; for
    differences of two rows it may be the other way round.
    """
    return _independent("harmonic_counts", passes, lambda count: 1 / count)


def rotated_counts(passes: int) -> SubsetDesign:
    """The design of ``make_likelihood``: F >= 1 counts even over {1..n}, rotated subsets."""
    check_at_least_one(passes=passes)

    def draw(keys, eligible, view):
        mask, count = pass_masks(keys, eligible, view, passes)
        mask &= view < passes
        size = jnp.sum(eligible, axis=-1)
        return mask, jnp.where(mask, (size / (count * passes))[:, None], 0.0)

    return SubsetDesign("rotated_counts", lambda _: passes, draw, lambda n: n == 1)


def nested_prefixes() -> SubsetDesign:
    """The n prefixes of one random permutation, weight ``1 / k`` on the k tokens of each."""

    def draw(keys, eligible, view):
        return prefix_view(_ranks(keys, eligible), eligible, view)

    return SubsetDesign("nested_prefixes", lambda n: n, draw, lambda n: n == 1)


def one_path() -> SubsetDesign:
    """One random order of unmasking, n passes: each token once, given those before it.

    The variance is zero exactly where the row's conditionals are those of one joint law.
    """

    def draw(keys, eligible, view):
        return path_view(_ranks(keys, eligible), eligible, view)

    return SubsetDesign("one_path", lambda n: n, draw, lambda n: n == 1)


def every_subset(max_eligible: int = MAX_ELIGIBLE) -> SubsetDesign:
    """All ``2^n - 1`` subsets, weight ``1 / (k C(n, k))``: the bound without Monte Carlo error.

    ValueError for ``max_eligible`` outside [1, 15]; by ``passes(n)``, for a longer row.
    """
    if not 1 <= max_eligible <= MAX_ELIGIBLE:
        raise ValueError(f"max_eligible must lie in [1, {MAX_ELIGIBLE}], got {max_eligible}")
    sizes = range(max_eligible + 1)
    weights = np.array(
        [[1 / (k * math.comb(n, k)) if 1 <= k <= n else 0.0 for k in sizes] for n in sizes],
        np.float32,
    )

    def passes(n: int) -> int:
        if n > max_eligible:
            raise ValueError(
                f"a row of {n} eligible tokens has 2**{n} subsets, more than the limit of "
                f"2**{max_eligible}; use a random design, or exact_when_short around one"
            )
        return 2**n - 1

    def draw(_keys, eligible, view):
        number = view + 1  # bit j masks the j-th eligible token
        order = jnp.cumsum(eligible, axis=-1) - 1
        bit = number >> jnp.clip(order, 0, max_eligible) & 1
        size = jnp.sum(eligible, axis=-1)
        in_range = (number < 1 << jnp.minimum(size, max_eligible)) & (size <= max_eligible)
        mask = eligible & (bit == 1) & in_range[:, None]
        weight = jnp.asarray(weights)[jnp.minimum(size, max_eligible), jnp.sum(mask, axis=-1)]
        return mask, jnp.where(mask, weight[:, None], 0.0)

    return SubsetDesign("every_subset", passes, draw, lambda _: True)


def exact_when_short(design: SubsetDesign, max_eligible: int) -> SubsetDesign:
    """Every subset of rows with at most ``max_eligible`` eligible tokens, else ``design``."""
    short = every_subset(max_eligible)

    def passes(n: int) -> int:
        return short.passes(n) if n <= max_eligible else design.passes(n)

    def draw(keys, eligible, view):
        is_short = jnp.sum(eligible, axis=-1, keepdims=True) <= max_eligible
        pairs = zip(short.draw(keys, eligible, view), design.draw(keys, eligible, view))
        return tuple(jnp.where(is_short, exact, random) for exact, random in pairs)

    return SubsetDesign(
        f"exact_when_short({design.name}, {max_eligible})",
        passes,
        draw,
        lambda n: n <= max_eligible or design.fixed(n),
    )


def prefix_view(ranks: Array, eligible: Array, view: Array | int) -> tuple[Array, Array]:
    """View j of ``nested_prefixes``: ranks 0..j masked, (mask, weight), both [B, L]."""
    mask = _first(ranks, eligible, view)
    return mask, jnp.where(mask, 1.0 / (view + 1), 0.0)


def path_view(ranks: Array, eligible: Array, view: Array | int) -> tuple[Array, Array]:
    """View j of ``one_path``: ranks 0..j masked, rank j weighted, (mask, weight), both [B, L]."""
    mask = _first(ranks, eligible, view)
    return mask, jnp.where(mask & (ranks == view), 1.0, 0.0)


def _first(ranks: Array, eligible: Array, view: Array | int) -> Array:
    size = jnp.sum(eligible, axis=-1, keepdims=True)
    return eligible & (ranks <= view) & (view < size)


def _ranks(keys: Array, eligible: Array) -> Array:
    noise = jax.vmap(lambda key: open_uniform(stream(key, "order"), eligible.shape[-1:]))(keys)
    return noise_ranks(noise, eligible)


def _independent(
    name: str, passes: int, density: Callable[[np.ndarray], np.ndarray]
) -> SubsetDesign:
    """Independent subsets of size k with a probability proportional to ``density(k)``."""
    check_at_least_one(passes=passes)

    def draw(keys, eligible, view):
        keys = jax.vmap(lambda key: jax.random.fold_in(key, view))(keys)
        u = jax.vmap(lambda key: open_uniform(stream(key, "count"), ()))(keys)
        size = jnp.sum(eligible, axis=-1)
        count, weight = draw_count(u, size, eligible.shape[-1], density)
        mask = eligible & (_ranks(keys, eligible) < count[:, None]) & (view < passes)
        return mask, jnp.where(mask, weight[:, None] / passes, 0.0)

    return SubsetDesign(name, lambda _: passes, draw, lambda n: n == 1)


def draw_count(
    u: Array, size: Array, length: int, density: Callable[[np.ndarray], np.ndarray]
) -> tuple[Array, Array]:
    """Count k on {1..n <= length} and weight ``1 / (k P(k))`` at quantiles u [B] of P ~ density."""
    counts = np.arange(1, length + 1, dtype=np.float64)
    mass = np.asarray(density(counts), np.float64)
    cumulative = jnp.asarray(np.cumsum(mass), jnp.float32)
    size = jnp.maximum(size, 1)
    target = u * cumulative[size - 1]
    count = 1 + jnp.sum(cumulative[None] <= target[:, None], axis=-1)
    count = jnp.minimum(count, size)
    inverse = jnp.asarray(1 / (counts * mass), jnp.float32)
    return count, inverse[count - 1] * cumulative[size - 1]


def make_subset_likelihood(
    apply_fn: Callable[..., Array],
    mask_id: int,
    design: SubsetDesign,
    *,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the any-order bound by a subset design; all else as ``make_likelihood``.

    A batch takes the passes of its costliest row, and ``passes`` of the result is that of the
    costliest batch. A batch all of whose rows are fixed by the design is computed once; its
    replicates are equal. ValueError also for a row that the design refuses.
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
        return jnp.sum(weight * nats, axis=-1), jnp.sum(nats, axis=-1), count

    def runs(rows: ScoredRows) -> tuple[int, int]:
        sizes = {int(n) for n in rows.size}
        fixed = all(design.fixed(n) for n in sizes)
        return 1 if fixed else replicates, max(design.passes(n) for n in sizes)

    def collect(arrays: tuple[np.ndarray, ...], rows: ScoredRows) -> RowScores:
        estimate, loss = (a.astype(np.float64) for a in arrays[:2])
        nats = estimate.sum(axis=1)
        nats = np.broadcast_to(nats, (replicates, nats.shape[1]))
        count = arrays[2].astype(np.int64)
        return count_scores(nats, rows, loss[..., None], count[..., None], level_bins)

    return make_evaluate(score, collect, runs)
