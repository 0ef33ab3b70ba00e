"""The mean of 1/m given how many tokens were masked, for rates m from an interval."""

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.typing import Array

_DROP = 40.0  # nats below the peak; what lies further down is invisible in float32
_HALVINGS = 30
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def expected_inverse_rate(masked: Array, count: Array, low: float, high: float) -> Array:
    """``E[1/m | k of n masked]`` for m uniform on [low, high]; 1/rates, float32, same shape.

    It is ``int m^(k-1) (1-m)^(n-k) dm / int m^k (1-m)^(n-k) dm`` over the interval, and lies
    between 1/high and 1/low. Both are Gauss sums on the two sides of the denominator's peak and
    relative to its height: as probabilities under beta laws they are 0/0 in float32 wherever the
    interval lies in a tail of these.

    Args:
        masked: k, integers. Entries with k = 0 are meaningless (k is raised to 1 there).
        count: n, integers of the same shape.
        low, high: masking rates, 0 <= low < high <= 1.
    """
    k = jnp.maximum(masked, 1).astype(jnp.float32)[..., None]
    n = jnp.maximum(jnp.asarray(count, jnp.float32)[..., None], k)
    rest = n - k
    # The peak's distances from 0 and from 1, neither obtained from the other by rounding.
    peak, left = jnp.clip(k / n, low, high), jnp.clip(rest / n, 1 - high, 1 - low)

    def log_height(offset: Array) -> Array:
        seen = jnp.where(rest > 0, rest * jnp.log1p(-offset / jnp.where(rest > 0, left, 1.0)), 0.0)
        return k * jnp.log1p(offset / peak) + seen

    def nodes(end: Array) -> tuple[Array, Array]:
        """Offsets from the peak towards an end of the interval, and their weights."""

        def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            middle = (ends[0] + ends[1]) / 2
            counts = log_height(middle) > -_DROP
            return jnp.where(counts, middle, ends[0]), jnp.where(counts, ends[1], middle)

        _, reach = jax.lax.fori_loop(0, _HALVINGS, halve, (jnp.zeros_like(end), end))
        half, each = reach / 2, (1,) * (reach.ndim - 1) + (-1,)
        places, weights = (jnp.asarray(a, half.dtype).reshape(each) for a in (_NODES, _WEIGHTS))
        return half * (1 + places), jnp.abs(half) * weights

    sides = nodes(low - peak), nodes(left - (1 - high))
    offset, weight = (jnp.concatenate(part, axis=-1) for part in zip(*sides))
    mass = weight * jnp.exp(log_height(offset))
    return jnp.sum(mass / (peak + offset), axis=-1) / jnp.sum(mass, axis=-1)
