"""P-POTS for the gradient, by what the network's outputs say of it."""

import jax.numpy as jnp

from mdm_jax.draws import Draw, LossStats
from mdm_jax.typing import Array
from mdm_jax.variance.moments import Target, gradient_stats, second_moment
from mdm_jax.variance.ppots import PpotsState, check_decay, running_bins
from mdm_jax.variance.quantile_density import log_spaced_edges
from mdm_jax.variance.transform import VarianceTransform


def ppots_slopes(
    num_bins: int = 32,
    smallest_rate: float = 1e-3,
    decay: float = 0.99,
    floor: float = 0.2,
    warmup_steps: int = 50,
    target: Target = second_moment,
) -> VarianceTransform:
    """Levels from bins whose masses follow running moments of the loss's slope at the outputs.

    As :func:`~mdm_jax.variance.ppots` in all but what it learns from. The best density follows the
    second moment of the row's *gradient*, which is not that of its loss: many masked tokens have a
    large loss and gradients that point all ways, one masked token has a small loss and the largest
    weight. Per-row gradients are not to be had for nothing, but their size at the network's outputs
    is: for a cross-entropy, at least ``(1 - p)^2`` and at most twice that, with p the probability
    of the right token. The objective sums these over the row's targets (``LossStats.slopes``), and
    the density follows the mean of ``weight^2 slopes`` per bin. That is the gradient's second
    moment but for a factor, as far as tokens' gradients do not line up and the network below
    stretches them alike at every level. Where that does not hold the density is not the best one;
    the estimate stays exact.

    Keeps: E[weight f(u)] = int f at every step. Couples: nothing within a step; steps through the
    state. Costs: one view, an exponential per token, and a few operations on vectors of the number
    of bins. Removes: the spread of the root of the gradient's second moment over levels, as
    :func:`~mdm_jax.variance.ppots_binned` does with a measured one. Bias: exact.
    Reference: the bound of a gradient by that at the last layer is Katharopoulos and Fleuret 2018,
    who choose rows by it; P-POTS is arXiv 2511.18159.

    Args:
        num_bins: J.
        smallest_rate: masking rate below which there is one bin.
        decay: of the moments per draw of a bin, in [0, 1).
        floor: share of uniform levels, in (0, 1]; bounds the weights by ``1 / floor``.
        warmup_steps: number of batches with uniform levels.
        target: from moments per bin to the moment whose root the density follows.

    Raises:
        ValueError: if a setting is out of range, or the target needs what is not known here; from
            ``update``, for statistics without slopes.
    """
    name = "ppots_slopes"
    check_decay(name, decay)
    edges = log_spaced_edges(num_bins, smallest_rate)
    bins = running_bins(name, edges, lambda count: decay**count, floor, warmup_steps, target)

    def update(state: PpotsState, current: Draw, stats: LossStats) -> PpotsState:
        return bins.update(state, current, gradient_stats(stats, _output_norms(stats)))

    return bins._replace(update=update)


def _output_norms(stats: LossStats) -> Array:
    """[V, B, S] size of the gradient at the outputs; NaN where the loss is no number."""
    if stats.slopes is None:
        raise ValueError(
            "ppots_slopes learns from LossStats.slopes, which this objective does not fill in; use "
            "ppots, which learns from the loss, or an objective of masked tokens"
        )
    return jnp.where(jnp.isfinite(stats.raw), jnp.sqrt(stats.slopes) * stats.weight, jnp.nan)
