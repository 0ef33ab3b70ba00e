"""Importance sampling of the level."""

from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.typing import Array
from mdm_jax.variance.quantile_density import QuantileDensity, density_profile, warp
from mdm_jax.variance.transform import Phase, VarianceTransform, stateless


def importance(density: QuantileDensity) -> VarianceTransform:
    """Draws quantiles from ``density`` and pays ``-log density`` into ``log_weight``.

    The quantiles that stand before it go through the inverse of the distribution function, so that
    strata become strata of equal probability under the density.

    Keeps: E[weight f(u)] = int f, for every positive density. Couples: nothing. Costs: one view.
    Removes: variance of level and pattern where the density follows the root of the integrand's
    second moment, see :func:`~mdm_jax.variance.second_moment`; a poor density adds variance.
    Bias: exact if the density covers (0, 1), truncated to its support otherwise.
    Reference: importance sampling (Kahn and Marshall 1953).

    Args:
        density: of the quantile u, near 1 = clean; for a uniform masking rate m = 1 - u.
    """
    low, high = density.support

    def draw(_key: Array, current: Draw, _spec: DrawSpec) -> Draw:
        return warp(current, density)

    bias = "exact" if low <= 0 and high >= 1 else "truncated"
    return stateless(
        "importance", Phase.WARP, draw, bias=bias, profile=lambda u: density_profile(density, u)
    )
