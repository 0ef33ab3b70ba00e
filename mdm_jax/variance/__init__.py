"""Variance reduction by transforms of the draw that compose like optax transformations."""

from mdm_jax.variance.couplings import (
    antithetic_pairs,
    coarse_strata,
    complement,
    stratified,
    stratified_blocks,
    systematic,
)
from mdm_jax.variance.densities import (
    PiecewiseDensity,
    QuantileDensity,
    log_spaced_edges,
    piecewise_density,
)
from mdm_jax.variance.epr import EprFit, EprParameters, epr_curve, fit_epr
from mdm_jax.variance.learned.bins import LossHistory, ema_bins, loss_history
from mdm_jax.variance.learned.curves import (
    CurveState,
    LogisticShape,
    LossCurve,
    PiecewiseLinear,
    cdcd_warp,
    cdtd_warp,
    logistic_curve,
    piecewise_linear_curve,
)
from mdm_jax.variance.learned.quantile_net import (
    LearnedQuantile,
    MonotoneNet,
    learned_quantile,
    monotone_net,
)
from mdm_jax.variance.learned.uncertainty import UncertaintyState, uncertainty_weighting
from mdm_jax.variance.moments import (
    LevelMoments,
    Target,
    gradient_stats,
    level_variance,
    moment_density,
    published_second_moment,
    second_moment,
    squared_mean,
)
from mdm_jax.variance.ppots import (
    PpotsState,
    epr_density,
    level_moments,
    ppots,
    ppots_binned,
    ppots_parametric,
    ppots_slopes,
)
from mdm_jax.variance.transform import (
    EmptyState,
    LevelProfile,
    Phase,
    VarianceTransform,
    chain,
    draw_batch,
    identity,
    replicate_views,
    stateless,
)
from mdm_jax.variance.views import mirror, repeat, rotate, rotate_ranks, stratified_levels
from mdm_jax.variance.warps import (
    ClippedDensity,
    ClipRange,
    LogUniformDensity,
    clipped,
    clipped_adaptive,
    clipped_mixture,
    importance,
    log_uniform,
    set_clip_range,
)
