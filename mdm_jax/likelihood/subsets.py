"""Ways to choose the subsets that an estimate of a row's log-likelihood masks.

With ``ce_i(M) = -log p(x_i | all tokens outside M)`` for a masked token i, nats, an estimate is

    sum over views j of sum_{i in M_j} w_ij ce_i(M_j) .

A design draws the subsets M_j and the weights w_ij such that the expectation is, for a row with n
eligible tokens, the any-order bound

    NELBO = sum_{k=1}^{n} (1/k) E[sum_{i in M} ce_i(M) | M uniform of size k] .

The designs differ in forward passes and variance only. On row 1 of ``models.toy`` (n = 4), four
passes each:

    uniform_counts    0.48719781   every count alike, weight n/k
    harmonic_counts   1.85573119   count with probability 1 / (k H_n), weight H_n
    nested_prefixes   0.51424044   the prefixes of one permutation
    one_path          0.11880705   the next token of each prefix
    rotated_counts    0.35653381   counts spread evenly, one permutation rotated

Means of F passes, except for the two along a permutation, which take n passes whatever n is.

References: Uria et al. 2014 (any-order models); Jeon et al. 2025 (arXiv 2510.24088) for
``harmonic_counts``.

Log-likelihoods by denoising cross-entropy: what is exact, and what is a bound.

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

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.corruption.masked import noise_ranks
from mdm_jax.draws import open_uniform
from mdm_jax.likelihood.estimators import (
    RowScores,
    ScoredRows,
    check_at_least_one,
    count_scores,
    logsnr_of_count,
    pass_masks,
    pool,
    row_keys,
    score_batches,
)
from mdm_jax.likelihood.result import Likelihood
from mdm_jax.objectives.masked import token_nats
from mdm_jax.rng import stream
from mdm_jax.testing.enumeration import MAX_ELIGIBLE
from mdm_jax.types import Array, Batch, PyTree


class SubsetDesign(NamedTuple):
    """How the subsets of one replicate are drawn.

    Attributes:
        name: for results and messages.
        passes: ``passes(n) -> int``, views of a row with n >= 1 eligible tokens. Views beyond them
            mask nothing.
        draw: ``draw(keys [B], eligible [B, L], view) -> (mask [B, L] bool, weight [B, L] float32)``
            of one view; the keys are the same in every view, which may be traced. Jit-able.
        fixed: ``fixed(n) -> bool``, whether such a row's subsets are the same in every replicate.
    """

    name: str
    passes: Callable[[int], int]
    draw: Callable[[Array, Array, Array], tuple[Array, Array]]
    fixed: Callable[[int], bool]


def uniform_counts(passes: int) -> SubsetDesign:
    """F independent subsets, their size uniform on {1..n}, weight ``n / (k F)``.

    Raises:
        ValueError: for passes below 1.
    """
    return _independent("uniform_counts", passes, np.ones_like)


def harmonic_counts(passes: int) -> SubsetDesign:
    """F independent subsets of size k with probability ``1 / (k H_n)``, weight ``H_n / F``.

    The time-free form of the denoising cross-entropy identity: all subsets have one weight, the
    harmonic number H_n, and small ones come often. Where the loss grows with the number of masked
    tokens, uniform counts have the smaller variance; for differences of two rows it may turn.

    Raises:
        ValueError: for passes below 1.
    """
    return _independent("harmonic_counts", passes, lambda count: 1 / count)


def rotated_counts(passes: int) -> SubsetDesign:
    """The design of ``make_likelihood``: F counts spread evenly over {1..n}, rotated subsets.

    Raises:
        ValueError: for passes below 1.
    """
    _check_passes("rotated_counts", passes)

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
    """One random order of revealing, n passes: each token once, given those revealed before it.

    The variance is zero exactly where the conditionals of the row are those of one joint law: then
    every order's sum is -log p(x), the chain rule.
    """

    def draw(keys, eligible, view):
        return path_view(_ranks(keys, eligible), eligible, view)

    return SubsetDesign("one_path", lambda n: n, draw, lambda n: n == 1)


def every_subset(max_eligible: int = MAX_ELIGIBLE) -> SubsetDesign:
    """All ``2^n - 1`` subsets, weight ``1 / (k C(n, k))``: the bound itself, without chance.

    Args:
        max_eligible: longest row that is accepted, at most 15.

    Raises:
        ValueError: for max_eligible outside [1, 15]; by ``passes(n)``, for a longer row.
    """
    if not 1 <= max_eligible <= MAX_ELIGIBLE:
        raise ValueError(f"max_eligible must lie in [1, {MAX_ELIGIBLE}], got {max_eligible}")
    sizes = range(max_eligible + 1)
    weights = np.array([[_subset_weight(n, k) for k in sizes] for n in sizes], np.float32)

    def passes(n: int) -> int:
        if n > max_eligible:
            raise ValueError(
                f"a row of {n} eligible tokens has 2**{n} subsets, more than the limit of "
                f"2**{max_eligible}; use a random design, or exact_when_short around one"
            )
        return 2**n - 1

    def draw(_keys, eligible, view):
        number = view + 1
        place = jnp.cumsum(eligible, axis=-1) - 1
        bit = number >> jnp.clip(place, 0, max_eligible) & 1
        size = jnp.sum(eligible, axis=-1)
        within = (number < 1 << jnp.minimum(size, max_eligible)) & (size <= max_eligible)
        mask = eligible & (bit == 1) & within[:, None]
        count = jnp.sum(mask, axis=-1)
        weight = jnp.asarray(weights)[jnp.minimum(size, max_eligible), count]
        return mask, jnp.where(mask, weight[:, None], 0.0)

    return SubsetDesign("every_subset", passes, draw, lambda _: True)


def exact_when_short(design: SubsetDesign, max_eligible: int) -> SubsetDesign:
    """Every subset of the rows with at most ``max_eligible`` eligible tokens, else ``design``.

    A short row has no Monte Carlo error and takes ``2^n - 1`` passes: one for a single token, and
    up to seven tokens fewer than the 128 of 8 replicates of 16 passes.

    Raises:
        ValueError: for max_eligible outside [1, 15].
    """
    short = every_subset(max_eligible)

    def passes(n: int) -> int:
        return short.passes(n) if n <= max_eligible else design.passes(n)

    def draw(keys, eligible, view):
        is_short = jnp.sum(eligible, axis=-1, keepdims=True) <= max_eligible
        parts = zip(short.draw(keys, eligible, view), design.draw(keys, eligible, view))
        return tuple(jnp.where(is_short, ours, theirs) for ours, theirs in parts)

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
    """View j of ``one_path``: ranks 0..j masked and rank j scored, (mask, weight), both [B, L]."""
    mask = _first(ranks, eligible, view)
    return mask, jnp.where(mask & (ranks == view), 1.0, 0.0)


def _independent(
    name: str, passes: int, density: Callable[[np.ndarray], np.ndarray]
) -> SubsetDesign:
    """Independent subsets of size k with a probability proportional to ``density(k)``."""
    _check_passes(name, passes)

    def draw(keys, eligible, view):
        keys = jax.vmap(lambda key: jax.random.fold_in(key, view))(keys)
        u = jax.vmap(lambda key: open_uniform(stream(key, "count"), ()))(keys)
        size = jnp.sum(eligible, axis=-1)
        count, weight = draw_count(u, size, eligible.shape[-1], density)
        ranks = _ranks(keys, eligible)
        mask = eligible & (ranks < count[:, None]) & (view < passes)
        return mask, jnp.where(mask, weight[:, None] / passes, 0.0)

    return SubsetDesign(name, lambda _: passes, draw, lambda n: n == 1)


def draw_count(
    u: Array, size: Array, length: int, density: Callable[[np.ndarray], np.ndarray]
) -> tuple[Array, Array]:
    """Count k on {1..n} and weight ``1 / (k P(k))`` at quantiles u [B] of P ~ density.

    Args:
        u: [B] in (0, 1).
        size: [B] n of each row, at most ``length``.
        length: L.
        density: of the counts 1..L, up to a factor.
    """
    counts = np.arange(1, length + 1, dtype=np.float64)
    mass = np.asarray(density(counts), np.float64)
    total = np.cumsum(mass)
    below = jnp.asarray(total, jnp.float32)
    size = jnp.maximum(size, 1)
    goal = u * below[size - 1]
    count = 1 + jnp.sum(below[None] <= goal[:, None], axis=-1)
    count = jnp.minimum(count, size)
    inverse = jnp.asarray(1 / (counts * mass), jnp.float32)
    return count, inverse[count - 1] * below[size - 1]


def _first(ranks: Array, eligible: Array, view: Array | int) -> Array:
    size = jnp.sum(eligible, axis=-1, keepdims=True)
    return eligible & (ranks <= view) & (view < size)


def _ranks(keys: Array, eligible: Array) -> Array:
    noise = jax.vmap(lambda key: open_uniform(stream(key, "order"), eligible.shape[-1:]))(keys)
    return noise_ranks(noise, eligible)


def _subset_weight(n: int, k: int) -> float:
    return 1 / (k * math.comb(n, k)) if 1 <= k <= n else 0.0


def _check_passes(name: str, passes: int) -> None:
    if passes < 1:
        raise ValueError(f"{name}: passes must be at least 1, got {passes}")


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
