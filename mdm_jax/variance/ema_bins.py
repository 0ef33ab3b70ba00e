"""Exponential averages of the loss in equal bins of the level."""

import jax.numpy as jnp
import numpy as np

from mdm_jax.typing import Array
from mdm_jax.variance.moments import Target, squared_mean
from mdm_jax.variance.ppots import check_decay, running_bins
from mdm_jax.variance.quantile_density import check_edges
from mdm_jax.variance.transform import VarianceTransform


def ema_bins(
    num_bins: int = 100,
    decay: float = 0.99,
    floor: float = 0.01,
    warmup_steps: int = 100,
    target: Target = squared_mean,
) -> VarianceTransform:
    """Levels in proportion to an exponential average of the loss in bins of equal width.

    Bins are equally wide in the quantile u, hence in the logSNR where the objective's law is
    uniform. A step moves the average of every bin that it visited, once, towards the mean of the
    integrand over its draws there, and leaves the others. The integrand is the raw loss times the
    objective's weight, per scored element. So the density is proportional to W E[l] over the
    logSNR, and it is paid for exactly.

    The published target is the first moment. ``target=second_moment`` follows the root of the mean
    square instead, which is the optimum, at the same cost; ``level_variance`` is for stratified
    levels. The state is that of :func:`~mdm_jax.variance.ppots`, which differs in its bins and in
    that its averages decay per draw. Averages start from the first visit of a bin; until then it
    counts as average, instead of as 1, which would be in another unit than the loss.

    Keeps: E[weight f(u)] = int f at every step. Couples: nothing within a step; steps through the
    state. Costs: one view, and a few operations on vectors of the number of bins.
    Removes: what sampling in proportion to the mean loss can, the whole excess over the optimum
    where E f^2 / (E f)^2 does not depend on the level. Bias: exact.
    Reference: Kingma and Gao 2023, appendix F.

    Args:
        num_bins: J, at least 1.
        decay: of a bin's average per step that visits it, in [0, 1).
        floor: share of uniform levels, in (0, 1]; bounds the weights by ``1 / floor``.
        warmup_steps: number of batches with uniform levels.
        target: from moments per bin to the moment whose root the density follows.

    Raises:
        ValueError: if a setting is out of range, or the target needs what is not known here.
    """
    check_decay("ema_bins", decay)
    edges = equal_edges("ema_bins", num_bins)

    def keep(count: Array) -> Array:
        return jnp.where(count > 0, decay, 1.0)

    return running_bins("ema_bins", edges, keep, floor, warmup_steps, target)


def equal_edges(name: str, num_bins: int) -> np.ndarray:
    """[J + 1] edges of bins equally wide in the quantile.

    Raises:
        ValueError: unless ``num_bins`` is positive and the bins are no narrower than 2**-22.
    """
    if num_bins < 1:
        raise ValueError(f"{name} needs num_bins >= 1, got {num_bins}")
    return check_edges(np.linspace(0.0, 1.0, num_bins + 1))
