"""Designs: which subsets of a row's eligible tokens are masked, and their weights.

With ``ce_i(M) = -log p(x_i | all tokens outside M)`` for a masked token i, nats, an estimate is
``sum over views j of sum_{i in M_j} w_ij ce_i(M_j)``. A design draws the subsets M_j and weights
w_ij such that the expectation is, for a row with n eligible tokens, the any-order bound

    NELBO = sum_{k=1}^{n} (1/k) E[sum_{i in M} ce_i(M) | M uniform of size k] .

:func:`counts` combines how the sizes k of F views are spread with how their masks are coupled.
Variance of four passes for one row, on row 1 of the toy (n = 4; three digits: of 2**18 draws):

    levels       independent   rotated      antithetic   complementary masks
    independent  0.48719781    0.359        0.321        0.622
    harmonic     1.85573119    1.73         3.34         3.74
    stratified   0.485         0.357        0.317        0.620
    lattice      0.486         0.35653381   0.316        0.617
    gauss        0.402         0.298        0.406        0.617    errors -0.003, of pairs 0.01, 0.02
    nested_prefixes, the prefixes of one permutation     0.51424044
    one_path, the next token of each prefix              0.11880705

Complementary masks lose on so few tokens, not on longer rows (experiments/benchmarks/RESULTS.md).

The NELBO is the mean, over orders of unmasking, of the sum of ``-log p(next token | those before
it)``: ``-log p(x | prompt)`` exactly if all conditionals are those of *one* joint law. Otherwise it
bounds ``-log P(x | prompt)`` of one-by-one sampling in random order, with equality for a row iff
all orders give it the same probability (``testing.exact_nelbo``,
``testing.any_order_log_likelihood``). The difference of two rows on common subsets
(``stopping.differences`` of rows under one key) estimates a log-likelihood ratio.

References: Uria et al. 2014 (any-order models); Jeon et al. 2025, Information-Theoretic Discrete
Diffusion (arXiv 2510.24088), for harmonic sizes and the identity.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.corruption.masked import noise_ranks
from mdm_jax.draws import GRID_BITS, open_uniform
from mdm_jax.likelihood.estimators import check_at_least_one
from mdm_jax.rng import stream
from mdm_jax.types import Array

MAX_ELIGIBLE = 15
"""Largest number of eligible positions that is enumerated: 32768 forward passes."""

LEVELS = {
    "independent": "exact",
    "harmonic": "exact",
    "stratified": "exact",
    "lattice": "exact",
    "gauss": "quadrature",
}
"""How the noise levels of the F views of a row are spread -> whether the mean is the bound.

independent: each uniform. harmonic: each size k with probability 1 / (k H_n). stratified: one in
each of F cells. lattice: F even steps from a random start, in integers. gauss: the F Gauss-Legendre
nodes, without any level noise; its error is that of the rule on the bound's integrand, which for
masked tokens is ``(n/k) E[S | k]`` joined by straight lines (:func:`gauss_error`).
"""

MASKS = ("independent", "rotated", "antithetic", "complementary")
"""How the masks of a row's views are coupled; each view alone is a uniform subset of its size.

rotated: view j has the ranks of one permutation, rotated by floor(j n / F). antithetic: pairs of
views of one size with reversed ranks. complementary: pairs of a subset and the rest, so that every
token is predicted once per pair, with weights ``n / (2 k)`` and ``n / (2 (n - k))``, or 1 where
k = n (specification, estimators.md 2); exact for each pair.
"""


class SubsetDesign(NamedTuple):
    """How the subsets of one replicate are drawn.

    Attributes:
        passes: ``passes(n) -> int``, views of a row with n >= 1 eligible tokens; further ones mask
            nothing.
        draw: ``draw(keys [B], eligible [B, L], view) -> (mask [B, L] bool, weight [B, L] float32)``
            of one view, jit-able; the keys are the same in every view.
        fixed: ``fixed(n) -> bool``, whether such a row has the same subsets in every replicate.
        bias: "exact" where the expectation is the bound for every network, else "quadrature".
    """

    name: str
    passes: Callable[[int], int]
    draw: Callable[[Array, Array, Array], tuple[Array, Array]]
    fixed: Callable[[int], bool]
    bias: str = "exact"


def counts(passes: int, levels: str = "lattice", masks: str = "rotated") -> SubsetDesign:
    """F = ``passes`` uniform subsets, their sizes spread as ``levels``, coupled as ``masks``.

    A mean over views of weight ``n / k``, or over pairs. ValueError for an unknown name, F below 1,
    or an odd F for masks in pairs.
    """
    points, paired = check_design(passes, levels, masks)

    def draw(keys, eligible, view):
        size = jnp.sum(eligible, axis=-1)
        point = view // 2 if paired else view
        count, share = _counts(levels, keys, size, point, points, eligible.shape[-1])
        ranks = _ranks(masks, keys, eligible, view, point, passes)
        mask, weight = coupled(masks, count, ranks, eligible, view)
        mask &= view < passes
        return mask, jnp.where(mask, (share * weight / points)[:, None], 0.0)

    bias = LEVELS[levels]
    return SubsetDesign(f"{levels} levels, {masks} masks", lambda _: passes, draw, _is_one, bias)


def check_design(passes: int, levels: str, masks: str) -> tuple[int, bool]:
    """Number of levels of a row, and whether masks come in pairs; errors as :func:`counts`."""
    check_at_least_one(passes=passes)
    for what, name, known in (("levels", levels, LEVELS), ("masks", masks, MASKS)):
        if name not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")
    paired = masks in ("antithetic", "complementary")
    if paired and passes % 2:
        raise ValueError(f"{masks} masks come in pairs, so passes must be even, got {passes}")
    return passes // 2 if paired else passes, paired


def _is_one(n: int) -> bool:
    return n == 1


def uniform_counts(passes: int) -> SubsetDesign:
    """F >= 1 independent subsets, their size uniform on {1..n}, weight ``n / (k F)``."""
    return counts(passes, "independent", "independent")


def harmonic_counts(passes: int) -> SubsetDesign:
    """F >= 1 independent subsets of size k with probability ``1 / (k H_n)``, weight ``H_n / F``.

    The time-free form of the bound: all subsets have one weight, the harmonic number H_n. Where the
    loss grows with the number of masked tokens, uniform counts have the smaller variance; for
    differences of two rows it may be the other way round.
    """
    return counts(passes, "harmonic", "independent")


def rotated_counts(passes: int) -> SubsetDesign:
    """The design of ``make_likelihood``: F >= 1 counts even over {1..n}, rotated subsets.

    View j of F masks ``k_j = 1 + (k_0 - 1 + floor(j n / F)) mod n`` tokens, k_0 uniform on {1..n}:
    those whose rank in a random permutation, rotated by floor(j n / F), is below k_j. In integers
    every k_j is exactly uniform (a float lattice rounded half to even is not).
    """
    return counts(passes)


def quantile(levels: str, key: Array, point: Array, points: int) -> tuple[Array, Array]:
    """Quantile [] of a noise level in (0, 1) on the grid's range, and its share (mean 1).

    ``key`` is that of a row and replicate, ``point`` < ``points`` may be traced.
    """
    own = stream(jax.random.fold_in(key, point), "level")
    share = jnp.ones(())
    if levels == "gauss":
        nodes, weights = gauss(points)
        at = jnp.minimum(point, points - 1)
        u, share = jnp.asarray(nodes, jnp.float32)[at], jnp.asarray(weights * points)[at]
    elif levels == "lattice":
        u = (open_uniform(stream(key, "level"), ()) + point / points) % 1.0
    elif levels == "stratified":
        u = (point + open_uniform(own, ())) / points
    else:
        u = open_uniform(own, ())
    smallest = 2.0 ** -(GRID_BITS + 1)  # the ends of the grid
    return jnp.clip(u, smallest, 1 - smallest), share.astype(jnp.float32)


def gauss(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes in (0, 1) and weights (sum 1) of the Gauss-Legendre rule, [points] each."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    return (1 + nodes) / 2, weights / 2


def gauss_error(by_count: np.ndarray, points: int) -> float:
    """What gauss levels add to the bound: rule minus integral, nats.

    ``by_count`` [n]: the mean loss at k = 1..n masked, ``(n / k) E[S | k]`` (of a pair where masks
    are complementary); the bound is its mean. Zero where it is linear in k.
    """
    size = len(by_count)
    nodes, weights = gauss(points)
    joined = np.interp(size * nodes + 0.5, np.arange(1, size + 1), by_count)
    return float(weights @ joined - np.mean(by_count))


def _counts(
    levels: str, keys: Array, size: Array, point: Array, points: int, length: int
) -> tuple[Array, Array]:
    """Number of masked tokens [B] int32 in {1..n} of a level, and its share [B] (mean 1)."""
    n = jnp.maximum(size, 1)
    if levels == "lattice":
        starts = jax.vmap(lambda key, n: jax.random.randint(stream(key, "count"), (), 1, n + 1))
        return lattice_count(starts(keys, n), n, point, points), jnp.ones(n.shape)
    own = jax.vmap(lambda key: jax.random.fold_in(key, point))(keys)
    u = jax.vmap(lambda key: open_uniform(stream(key, "count"), ()))(own)
    return count_at(levels, u, n, point, points, length)


def count_at(
    levels: str, u: Array, n: Array, point: Array, points: int, length: int
) -> tuple[Array, Array]:
    """Count and share [B] of a level, from uniform numbers u [B]; any levels but the lattice's."""
    share = jnp.ones(n.shape)
    if levels == "harmonic":
        count, weight = draw_count(u, n, length, lambda k: 1 / k)
        return count, weight * count / n
    if levels == "gauss":
        nodes, weights = (jnp.asarray(a, jnp.float32) for a in gauss(points))
        at = jnp.minimum(point, points - 1)
        # Rounded at random, so that over uniform nodes the mean would be the bound.
        count = jnp.floor(n * nodes[at] + 0.5 + u).astype(jnp.int32)
        return jnp.clip(count, 1, n), share * weights[at] * points
    u = (point + u) / points if levels == "stratified" else u
    return jnp.minimum(1 + jnp.floor(n * u).astype(jnp.int32), n), share


def lattice_count(first_count: Array, n: Array, point: Array | int, points: int) -> Array:
    """Count [B] of a level of the integer lattice that starts at first_count [B] in {1..n}."""
    return 1 + (first_count - 1 + point * n // points) % n


def _ranks(masks: str, keys: Array, eligible: Array, view: Array, point: Array, passes: int):
    """Ranks [B, L] of the eligible tokens in the view's permutation, coupled over views."""
    size = jnp.maximum(jnp.sum(eligible, axis=-1), 1)
    if masks == "rotated":
        lap = view_lap(size, view, passes)
        keys = jax.vmap(lambda key, lap: jax.random.fold_in(stream(key, "order"), lap))(keys, lap)
        return rotate(draw_ranks(keys, eligible), size, view, passes)
    number = view if masks == "independent" else point
    keys = jax.vmap(lambda key: stream(jax.random.fold_in(key, number), "order"))(keys)
    return draw_ranks(keys, eligible)


def draw_ranks(keys: Array, eligible: Array) -> Array:
    """Ranks [B, L] of a uniform permutation of the eligible tokens; one key per row.

    Noise goes by number among the eligible tokens, not by position: a row's masks do not depend on
    how its prompt is padded.
    """
    noise = jax.vmap(lambda key: open_uniform(key, eligible.shape[-1:]))(keys)
    order = jnp.maximum(jnp.cumsum(eligible, axis=-1) - 1, 0)
    return noise_ranks(jnp.take_along_axis(noise, order, axis=-1), eligible)


def rotate(ranks: Array, size: Array, view: Array | int, passes: int) -> Array:
    """Ranks [B, L] of a permutation rotated by floor(j n / F) for view j."""
    return (ranks - (view * size // passes)[:, None]) % size[:, None]


def view_lap(num_eligible: Array, view: Array | int, passes: int) -> Array:
    """[B] number of earlier views that rotate as view j does, zero for F <= n."""
    num_eligible = jnp.maximum(num_eligible, 1)
    offset = view * num_eligible // passes
    first_view = (offset * passes + num_eligible - 1) // num_eligible
    return view - first_view


def coupled(masks: str, count: Array, ranks: Array, eligible: Array, view: Array):
    """Mask [B, L] of a view with ``count`` [B], and its weight [B] in the mean over levels."""
    size = jnp.sum(eligible, axis=-1)
    low, second = ranks < count[:, None], view % 2 == 1
    if masks == "antithetic":
        high = ranks >= (size - count)[:, None]
        return eligible & jnp.where(second, high, low), size / (2 * count)
    if masks == "complementary":
        rest = size - count
        first = jnp.where(rest == 0, 1.0, size / (2 * count))
        weight = jnp.where(second, size / (2 * jnp.maximum(rest, 1)), first)
        return eligible & jnp.where(second, ~low, low), weight
    return eligible & low, size / count


def nested_prefixes() -> SubsetDesign:
    """The n prefixes of one random permutation, weight ``1 / k`` on the k tokens of each."""

    def draw(keys, eligible, view):
        return prefix_view(_path_ranks(keys, eligible), eligible, view)

    return SubsetDesign("nested_prefixes", lambda n: n, draw, _is_one)


def one_path() -> SubsetDesign:
    """One random order of unmasking, n passes: each token once, given those before it.

    The variance is zero exactly where the row's conditionals are those of one joint law.
    """

    def draw(keys, eligible, view):
        return path_view(_path_ranks(keys, eligible), eligible, view)

    return SubsetDesign("one_path", lambda n: n, draw, _is_one)


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


def _path_ranks(keys: Array, eligible: Array) -> Array:
    return draw_ranks(jax.vmap(lambda key: stream(key, "order"))(keys), eligible)


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
