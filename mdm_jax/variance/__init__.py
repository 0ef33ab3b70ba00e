"""Variance reduction: transforms of the draw that compose like optax transformations."""

from mdm_jax.variance.couplings import (
    antithetic_pairs,
    coarse_strata,
    complement,
    stratified,
    stratified_blocks,
    systematic,
)
from mdm_jax.variance.learned.bins import ema_bins, loss_history
from mdm_jax.variance.learned.curves import cdcd_warp, cdtd_warp
from mdm_jax.variance.learned.quantile_net import learned_quantile
from mdm_jax.variance.learned.uncertainty import uncertainty_weighting
from mdm_jax.variance.ppots import (
    ppots,
    ppots_binned,
    ppots_parametric,
    ppots_slopes,
    ppots_unweighted,
)
from mdm_jax.variance.transform import VarianceTransform, chain, draw_batch, identity
from mdm_jax.variance.views import mirror, repeat, rotate, rotate_ranks, stratified_levels
from mdm_jax.variance.warps import clipped, clipped_adaptive, clipped_mixture, log_uniform
