"""Masked (absorbing-state) diffusion: tokens are kept or replaced by the mask token.

At logSNR lambda a token is masked at the rate ``m = sigmoid(-lambda)``. With S the sum of the
cross-entropies of the k masked of n eligible tokens of a row, for every schedule

    NELBO = int_0^1 (1/m) E[S | m] dm = sum_{k=1}^{n} (1/k) E[S | k masked]

A process defines the mask at rate m and the weight of S. References: Shi et al. 2024 (MD4), Sahoo
et al. 2024 (MDLM), Ou et al. 2024 (RADD, any-order form).
"""

from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Rate, Real, Whole, checked
from mdm_jax.corruption.process import Corrupted, Corruption, spread_levels, sum_levels
from mdm_jax.types import Array, ArrayLike

_DROP = 40.0  # nats below the peak; what lies further down is invisible in float32
_HALVINGS = 30
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def expected_inverse_rate(masked: Array, count: Array, low: float, high: float) -> Array:
    """``E[1/m | k of n masked]`` for m uniform on [low, high]; float32, same shape.

    ``masked``, ``count``: k (0 is raised to 1) and n, of one shape; 0 <= low < high <= 1. A ratio
    of Gauss sums about the denominator's peak; as beta probabilities both are 0/0 in float32 in a
    tail.
    """
    k = jnp.maximum(masked, 1).astype(jnp.float32)[..., None]
    n = jnp.maximum(jnp.asarray(count, jnp.float32)[..., None], k)
    rest = n - k
    # The peak's distances from 0 and from 1, neither obtained from the other by rounding.
    peak, left = jnp.clip(k / n, low, high), jnp.clip(rest / n, 1 - high, 1 - low)

    def log_height(offset: Array) -> Array:
        visible = jnp.where(
            rest > 0, rest * jnp.log1p(-offset / jnp.where(rest > 0, left, 1.0)), 0.0
        )
        return k * jnp.log1p(offset / peak) + visible

    def nodes(end: Array) -> tuple[Array, Array]:
        """Offsets from the peak towards an end of the interval, and their weights."""

        def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = (ends[0] + ends[1]) / 2
            counts = log_height(middle) > -_DROP
            return jnp.where(counts, middle, ends[0]), jnp.where(counts, ends[1], middle)

        _, reach = jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(end), end))
        half, each = reach / 2, (1,) * (reach.ndim - 1) + (-1,)
        points, weights = (jnp.asarray(a, half.dtype).reshape(each) for a in (_NODES, _WEIGHTS))
        return half * (1 + points), jnp.abs(half) * weights

    sides = nodes(low - peak), nodes(left - (1 - high))
    offset, weight = (jnp.concatenate(part, axis=-1) for part in zip(*sides))
    mass = weight * jnp.exp(log_height(offset))
    return jnp.sum(mass / (peak + offset), axis=-1) / jnp.sum(mass, axis=-1)


def fixed_count(mask_id: int) -> Corruption:
    """Masks the ``k = 1 + floor(n m)`` of n tokens of lowest noise; weight n/k; exact."""

    def corrupt(x, logsnr, noise, eligible, level_ids=None) -> Corrupted:
        count = _eligible_count(eligible, logsnr, level_ids)
        masked_count = count_at_rate(jax.nn.sigmoid(-logsnr), count)
        rank = noise_ranks(noise, eligible, logsnr.shape[-1], level_ids)
        mask = eligible & (rank < spread_levels(masked_count, x.shape[-1], level_ids))
        log_weight = jnp.log(jnp.maximum(count, 1)) - jnp.log(masked_count)
        return Corrupted(jnp.where(mask, mask_id, x), mask, log_weight.astype(logsnr.dtype))

    return _masked("fixed_count", corrupt, mask_id)


def rounded_count(mask_id: int) -> Corruption:
    """Masks the ``k = round(n m)`` of n tokens of lowest noise; exact.

    The weight is n/k, 2 if all are masked and 1 if none are, which happens half as often as other
    counts. Rates m and 1 - m give k and n - k: under ``variance.complement()`` and a uniform rate
    the two views predict every token once, and constant token losses add up to the same for every
    k, without noise of the count. Alone it is noisier than :func:`fixed_count`. Source: pairs of k
    and n - k masked tokens with weights n/(2k) and n/(2(n - k)), or 1 for k = n.
    """

    def corrupt(x, logsnr, noise, eligible, level_ids=None) -> Corrupted:
        count = _eligible_count(eligible, logsnr, level_ids)
        rounded = jnp.floor(jax.nn.sigmoid(-logsnr) * count + 0.5)
        masked_count = jnp.clip(rounded.astype(jnp.int32), 0, count)
        rank = noise_ranks(noise, eligible, logsnr.shape[-1], level_ids)
        mask = eligible & (rank < spread_levels(masked_count, x.shape[-1], level_ids))
        weight = jnp.where(masked_count == count, 2.0, count / jnp.maximum(masked_count, 1))
        log_weight = jnp.where(masked_count > 0, jnp.log(jnp.maximum(weight, 1.0)), 0.0)
        return Corrupted(jnp.where(mask, mask_id, x), mask, log_weight.astype(logsnr.dtype))

    return _masked("rounded_count", corrupt, mask_id)


def bernoulli(mask_id: int) -> Corruption:
    """Masks each eligible token independently at the rate m, with weight 1/m.

    The variance is infinite under laws (or warps) whose density of the rate is bounded at m = 0,
    such as the uniform one; finite under ``schedules.masked.power(2.0)`` and "truncated" laws.
    """

    def corrupt(x, logsnr, noise, eligible, level_ids=None) -> Corrupted:
        mask = bernoulli_mask(noise, logsnr, eligible, level_ids)
        log_rate = jax.nn.log_sigmoid(-logsnr)
        log_weight = jnp.broadcast_to(-log_rate, _level_shape(mask, logsnr))
        return Corrupted(jnp.where(mask, mask_id, x), mask, log_weight)

    return _masked("bernoulli", corrupt, mask_id)


def rao_blackwell(mask_id: int) -> Corruption:
    """Bernoulli masks with the weight 1/m averaged over the rates that give the same count.

    For m uniform on (0, 1), ``E[1/m | k of n] = (n+1)/k``. Exact, finite variance; the second
    moment is (n+1)/n times that of :func:`fixed_count`. For laws of all rates; else
    :func:`rao_blackwell_clipped`.
    """

    def log_weight(masked: Array, count: Array) -> Array:
        return jnp.log(count + 1.0) - jnp.log(jnp.maximum(masked, 1).astype(jnp.float32))

    return _averaged_weight("rao_blackwell", mask_id, log_weight)


@checked
def rao_blackwell_clipped(mask_id: int, low: Rate, high: Rate) -> Corruption:
    """:func:`rao_blackwell` for rates uniform on [low, high], 0 <= low < high <= 1 (ValueError).

    Weight ``E[1/m | k, m ~ U(low, high)]``. Objectives refuse laws that do not cover just these
    rates, as ``schedules.masked.clipped(low, high)`` does. "truncated", and "exact" for all rates.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"rao_blackwell_clipped needs 0 <= low < high <= 1, got {low}, {high}")

    def log_weight(masked: Array, count: Array) -> Array:
        return jnp.log(expected_inverse_rate(masked, count, low, high))

    bias = "exact" if (low, high) == (0, 1) else "truncated"
    process = _averaged_weight("rao_blackwell_clipped", mask_id, log_weight)
    return process._replace(bias=bias, rates=(low, high))


def _averaged_weight(name: str, mask_id: int, log_weight: Callable) -> Corruption:
    """Bernoulli masks weighted by a function of the masked and the eligible count."""

    def corrupt(x, logsnr, noise, eligible, level_ids=None) -> Corrupted:
        mask = bernoulli_mask(noise, logsnr, eligible, level_ids)
        count = _eligible_count(eligible, logsnr, level_ids)
        masked = sum_levels(mask.astype(jnp.int32), logsnr.shape[-1], level_ids)
        weight = jnp.where(masked > 0, log_weight(masked, count), 0.0)
        return Corrupted(jnp.where(mask, mask_id, x), mask, weight)

    return _masked(name, corrupt, mask_id)


def count_at_rate(rate: Array, count: Array) -> Array:
    """``1 + floor(n m)`` clipped to [1, max(n, 1)], int32; ``rate`` and ``count`` broadcast."""
    masked = 1 + jnp.floor(rate * count.astype(rate.dtype)).astype(jnp.int32)
    return jnp.clip(masked, 1, jnp.maximum(count, 1))


def noise_ranks(
    noise: Array, eligible: Array, num_levels: int = 1, level_ids: Array | None = None
) -> Array:
    """Noise rank within each level, [..., L] int32; ineligible elements last, ties by position."""
    noise, eligible = jnp.broadcast_arrays(noise, eligible)
    key = jnp.where(eligible, noise, jnp.inf)
    if level_ids is None:
        sections = key.reshape(*key.shape[:-1], num_levels, -1)
        return jnp.argsort(jnp.argsort(sections, axis=-1), axis=-1).reshape(key.shape)
    level_ids = jnp.broadcast_to(level_ids, key.shape)
    position = jnp.argsort(jnp.lexsort((key, level_ids), axis=-1), axis=-1)
    size = sum_levels(jnp.ones_like(level_ids), num_levels, level_ids)
    return position - spread_levels(jnp.cumsum(size, -1) - size, key.shape[-1], level_ids)


def bernoulli_mask(
    noise: Array, logsnr: Array, eligible: Array, level_ids: Array | None = None
) -> Array:
    """Eligible elements whose base noise falls below the rate, [..., L] bool."""
    rate = spread_levels(jax.nn.sigmoid(-logsnr), noise.shape[-1], level_ids)
    return eligible & (noise < rate)


def _eligible_count(eligible: Array, logsnr: Array, level_ids: Array | None) -> Array:
    count = sum_levels(eligible.astype(jnp.int32), logsnr.shape[-1], level_ids)
    return jnp.broadcast_to(count, jnp.broadcast_shapes(count.shape, logsnr.shape))


def _level_shape(mask: Array, logsnr: Array) -> tuple[int, ...]:
    return (*jnp.broadcast_shapes(mask.shape[:-1], logsnr.shape[:-1]), logsnr.shape[-1])


def _masked(name: str, corrupt: Callable[..., Corrupted], mask_id: int) -> Corruption:
    if mask_id < 0:
        raise ValueError(f"{name}: mask_id must be a token id, got {mask_id}")
    return Corruption(name, corrupt, lambda length: (length,), mask_id)


@checked
def bernoulli_shifted_rate(
    mask_id: int,
    rare: ArrayLike,
    delta: Annotated[float, Real("[0, 1]", "masking rate", "added for rare tokens")] = 0.2,
) -> Corruption:
    """Masks rare tokens at ``min(m + delta, 1)``, others at m, with weight 1/q_i on each loss.

    q_i is the token's own rate. Raising it makes rare targets more frequent and hides them more
    often as context; 1/q_i corrects the former only: "biased", with expectation ``sum_i E[ce_i |
    other positions masked at q]``. :func:`bernoulli_shifted_logit` is exact. Our reading of a
    training script in the repository of arXiv 2511.18159 (ISAD).

    ``rare``: [K] bool, the tokens masked more often. ValueError for other shapes or delta outside
    [0, 1].
    """
    rare = _check_rare("bernoulli_shifted_rate", rare)

    def corrupt(x, logsnr, noise, eligible, level_ids=None) -> Corrupted:
        rate = spread_levels(jax.nn.sigmoid(-logsnr), x.shape[-1], level_ids)
        shifted = jnp.where(rare[x], jnp.minimum(rate + delta, 1.0), rate)
        mask = eligible & (noise < shifted)
        own = -jnp.log(jnp.broadcast_to(shifted, mask.shape))
        return Corrupted(jnp.where(mask, mask_id, x), mask, jnp.zeros_like(logsnr), own)

    return Corruption(
        "bernoulli_shifted_rate", corrupt, lambda length: (length,), mask_id, "biased"
    )


@checked
def bernoulli_shifted_logit(
    mask_id: int,
    rare: ArrayLike,
    shift: Annotated[float, Real("[-30, 30]", "logits", "added to the rate of rare tokens")],
    max_shifted: Annotated[int, Whole("[0, 2e9]", "tokens", "shifted in a row; None: all")]
    | None = None,
) -> Corruption:
    """Masks rare tokens at ``sigmoid(logit(m) + shift)``, weighted by the whole mask's ratio.

    With M_i = 1 for a masked element the weight is

        1/m  prod_i (m / q_i)^M_i ((1 - m) / (1 - q_i))^(1 - M_i) .

    Exact for every model, with infinite variance under the same laws as :func:`bernoulli`. The
    product degenerates with many shifted positions: ``max_shifted`` caps them per level, to the
    first ones. ``rare`` [K] bool; a negative shift masks them less often. Raises ValueError if
    ``rare`` is not a bool vector, the shift not finite or the cap negative.
    """
    rare = _check_rare("bernoulli_shifted_logit", rare)

    def corrupt(x, logsnr, noise, eligible, level_ids=None) -> Corrupted:
        levels, length = logsnr.shape[-1], x.shape[-1]
        shifted = rare[x] & eligible
        if max_shifted is not None:
            shifted &= _count_before(shifted, levels, level_ids) < max_shifted
        logit = spread_levels(-logsnr, length, level_ids)
        moved = logit + jnp.where(shifted, shift, 0.0)
        mask = eligible & (noise < jax.nn.sigmoid(moved))
        # Computed from logits: q and m are both near 1 at one end, near 0 at the other.
        masked = jax.nn.log_sigmoid(logit) - jax.nn.log_sigmoid(moved)
        visible = jax.nn.log_sigmoid(-logit) - jax.nn.log_sigmoid(-moved)
        ratio = jnp.where(shifted, jnp.where(mask, masked, visible), 0.0)
        total = sum_levels(jnp.broadcast_to(ratio, mask.shape), levels, level_ids)
        log_weight = total - jax.nn.log_sigmoid(-logsnr)
        return Corrupted(jnp.where(mask, mask_id, x), mask, log_weight)

    return Corruption("bernoulli_shifted_logit", corrupt, lambda length: (length,), mask_id)


def _count_before(flags: Array, levels: int, level_ids: Array | None) -> Array:
    """Number of set flags before each element in its level, [..., L] int32."""
    if level_ids is None:
        sections = flags.reshape(*flags.shape[:-1], levels, -1).astype(jnp.int32)
        return (jnp.cumsum(sections, axis=-1) - sections).reshape(flags.shape)
    one_hot = jax.nn.one_hot(level_ids, levels, dtype=jnp.int32) * flags[..., None]
    before = jnp.cumsum(one_hot, axis=-2) - one_hot
    ids = jnp.broadcast_to(level_ids, flags.shape)
    return jnp.take_along_axis(before, ids[..., None], axis=-1)[..., 0]


def _check_rare(name: str, rare: ArrayLike) -> Array:
    rare = jnp.asarray(rare)
    if rare.ndim != 1 or rare.dtype != jnp.bool_:
        raise ValueError(f"{name} needs rare as a bool vector [K], got {rare.dtype} {rare.shape}")
    return rare
