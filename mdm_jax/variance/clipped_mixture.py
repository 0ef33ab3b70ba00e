"""A preferred range of levels, and now and then any."""

import numpy as np

from mdm_jax.variance.clipped import check_range
from mdm_jax.variance.importance import importance
from mdm_jax.variance.quantile_density import NARROWEST, piecewise_density
from mdm_jax.variance.transform import VarianceTransform

_LEAST = 2 * NARROWEST  # so that it is wide enough after the rounding of both ends, too


def clipped_mixture(low: float, high: float, share: float = 0.1) -> VarianceTransform:
    """Masking rates from [low, high], but with probability ``share`` from all of (0, 1).

    The density is ``(1 - share) U[low, high] + share U[0, 1]``, hence the weight ``1 / share``
    outside the range and ``1 / (share + (1 - share) / (high - low))`` inside.

    Keeps: E[weight f(u)] = int f, the whole bound. Couples: nothing. Costs: one view.
    Removes: what a preference for the range can remove; it pays by weights of ``1 / share``
    outside, so a small share buys little variance there for a high price.
    Bias: exact.
    Reference: defensive importance sampling (Hesterberg 1995), for the ranges of BD3-LM.

    Args:
        low: smallest masking rate of the range; one below 2**-21 is taken as 0, which float32
            quantiles cannot tell from it.
        high: largest masking rate of the range; one above 1 - 2**-21 is taken as 1.
        share: probability in (0, 1] of drawing from the whole interval.

    Raises:
        ValueError: unless 0 <= low < high <= 1, high - low >= 2**-21 and 0 < share <= 1.
    """
    check_range("clipped_mixture", low, high)
    if not 0 < share <= 1:
        raise ValueError(
            f"clipped_mixture needs a share in (0, 1], got {share}; with none at all the range "
            "would be clipped(low, high), which is not exact"
        )
    low, high = (0.0 if low < _LEAST else low), (1.0 if high > 1.0 - _LEAST else high)
    if high - low < _LEAST:
        raise ValueError(
            f"clipped_mixture needs a range of masking rates at least {_LEAST:.2g} wide, got "
            f"{low} to {high}; widen it"
        )
    widths = np.array([1.0 - high, high - low, low])
    masses = share * widths + np.array([0.0, 1.0 - share, 0.0])
    kept = widths > 0
    edges = np.concatenate([[0.0], np.cumsum(widths[kept])])
    edges[-1] = 1.0
    density = piecewise_density(edges, masses[kept])
    return importance(density)._replace(name="clipped_mixture")
