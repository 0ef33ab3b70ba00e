"""Likelihood bounds with error bars, exact values for small models, and the variance meter."""

from mdm_jax.evaluation import nested as nested
from mdm_jax.evaluation.clip_search import ClipChoice as ClipChoice
from mdm_jax.evaluation.clip_search import candidate_intervals as candidate_intervals
from mdm_jax.evaluation.clip_search import check_feasible as check_feasible
from mdm_jax.evaluation.clip_search import gradient_noise_to_signal as gradient_noise_to_signal
from mdm_jax.evaluation.clip_search import make_clip_search as make_clip_search
from mdm_jax.evaluation.clip_search import raw_variance as raw_variance
from mdm_jax.evaluation.clip_search import relative_variance as relative_variance
from mdm_jax.evaluation.decoders import grey_value_decoder as grey_value_decoder
from mdm_jax.evaluation.decoders import normal_decoder as normal_decoder
from mdm_jax.evaluation.decompose import Decomposition as Decomposition
from mdm_jax.evaluation.decompose import decompose as decompose
from mdm_jax.evaluation.decompose import decompose_by_probes as decompose_by_probes
from mdm_jax.evaluation.decompose import decompose_gradients as decompose_gradients
from mdm_jax.evaluation.efficiency import Comparison as Comparison
from mdm_jax.evaluation.efficiency import Efficiency as Efficiency
from mdm_jax.evaluation.efficiency import compare as compare
from mdm_jax.evaluation.efficiency import efficiency as efficiency
from mdm_jax.evaluation.efficiency import efficiency_with_data as efficiency_with_data
from mdm_jax.evaluation.estimator import Estimator as Estimator
from mdm_jax.evaluation.estimator import make_estimator as make_estimator
from mdm_jax.evaluation.exact import any_order_log_likelihood as any_order_log_likelihood
from mdm_jax.evaluation.exact import count_losses as count_losses
from mdm_jax.evaluation.exact import exact_nelbo as exact_nelbo
from mdm_jax.evaluation.exact import exact_variance as exact_variance
from mdm_jax.evaluation.exact import mask_cross_entropies as mask_cross_entropies
from mdm_jax.evaluation.exact import mask_losses as mask_losses
from mdm_jax.evaluation.exact import rate_losses as rate_losses
from mdm_jax.evaluation.gaussian_likelihood import GaussianLikelihood as GaussianLikelihood
from mdm_jax.evaluation.gaussian_likelihood import (
    make_gaussian_likelihood as make_gaussian_likelihood,
)
from mdm_jax.evaluation.levels import LevelTable as LevelTable
from mdm_jax.evaluation.levels import binned_moments as binned_moments
from mdm_jax.evaluation.levels import measure_levels as measure_levels
from mdm_jax.evaluation.levels import optimal_density as optimal_density
from mdm_jax.evaluation.levels import rate_grid as rate_grid
from mdm_jax.evaluation.levels import warp_density as warp_density
from mdm_jax.evaluation.likelihood import LevelCurve as LevelCurve
from mdm_jax.evaluation.likelihood import Likelihood as Likelihood
from mdm_jax.evaluation.likelihood import make_likelihood as make_likelihood
from mdm_jax.evaluation.ode_likelihood import OdeLikelihood as OdeLikelihood
from mdm_jax.evaluation.ode_likelihood import ode_likelihood as ode_likelihood
