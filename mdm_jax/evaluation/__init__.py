"""Likelihood bounds with error bars, and exact values for models small enough to enumerate."""

from mdm_jax.evaluation.exact import any_order_log_likelihood as any_order_log_likelihood
from mdm_jax.evaluation.exact import count_losses as count_losses
from mdm_jax.evaluation.exact import exact_nelbo as exact_nelbo
from mdm_jax.evaluation.exact import exact_variance as exact_variance
from mdm_jax.evaluation.exact import mask_cross_entropies as mask_cross_entropies
from mdm_jax.evaluation.exact import mask_losses as mask_losses
from mdm_jax.evaluation.exact import rate_losses as rate_losses
from mdm_jax.evaluation.likelihood import LevelCurve as LevelCurve
from mdm_jax.evaluation.likelihood import Likelihood as Likelihood
from mdm_jax.evaluation.likelihood import make_likelihood as make_likelihood
