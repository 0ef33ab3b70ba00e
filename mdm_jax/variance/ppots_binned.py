"""P-POTS with measured bins."""

import numpy as np

from mdm_jax.typing import ArrayLike
from mdm_jax.variance.importance import importance
from mdm_jax.variance.moments import check_floor, moment_density
from mdm_jax.variance.transform import VarianceTransform


def ppots_binned(
    edges: ArrayLike, second_moments: ArrayLike, floor: float = 0.1
) -> VarianceTransform:
    """Levels from bins with mass in proportion to ``d_j sqrt(second_moments_j)``, d_j the width.

    The moments are measured once, of the loss or of the gradient; which one is right for a chain,
    :mod:`mdm_jax.variance.moments` says: pass ``second_moment(m)``, ``level_variance(m)`` (for
    stratified levels) or ``published_second_moment(m)`` of the measured ``m``. Bins equally wide in
    the logarithm of the rate (:func:`~mdm_jax.variance.log_spaced_edges`) reach within half a
    percent of the optimum with ten bins, where bins of equal width need fifty or more.

    Keeps: E[weight f(u)] = int f. Couples: nothing. Costs: one view.
    Removes: as much as sqrt(E f^2) varies with the level: the variance falls by the variance of
    that root under a uniform level. Bias: exact.
    Reference: P-POTS, arXiv 2511.18159, as a histogram; the optimal density is the classical one of
    importance sampling.

    Args:
        edges: [J + 1] quantiles from 0 to 1; the first bin holds the highest masking rates.
        second_moments: [J] non-negative, in any unit.
        floor: share of uniform levels, in (0, 1]; bounds the weights by ``1 / floor``.

    Raises:
        ValueError: if the edges do not cover (0, 1), there is not one moment per bin, a moment is
            negative or not finite, or the floor is out of range.
    """
    check_floor("ppots_binned", floor)
    moments = np.asarray(second_moments, np.float64)
    if not (np.all(np.isfinite(moments)) and np.all(moments >= 0)):
        raise ValueError(f"ppots_binned: moments must be finite and not negative, got {moments}")
    density = moment_density(edges, moments, floor)
    return importance(density)._replace(name="ppots_binned")
