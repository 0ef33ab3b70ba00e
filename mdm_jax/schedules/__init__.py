"""The noise coordinate logSNR, laws over it, named schedules and sampling grids."""

from mdm_jax.pytrees import pytree_dataclass as pytree_dataclass
from mdm_jax.schedules import gaussian as gaussian
from mdm_jax.schedules import grids as grids
from mdm_jax.schedules import masked as masked
from mdm_jax.schedules import noise_scales as noise_scales
from mdm_jax.schedules import parameterisations as parameterisations
from mdm_jax.schedules import paths as paths
from mdm_jax.schedules import recipes as recipes
from mdm_jax.schedules import spacings as spacings
from mdm_jax.schedules import weightings as weightings
from mdm_jax.schedules.coordinates import MaskingLevel as MaskingLevel
from mdm_jax.schedules.coordinates import level_from_logsnr as level_from_logsnr
from mdm_jax.schedules.coordinates import level_from_masking_rate as level_from_masking_rate
from mdm_jax.schedules.coordinates import log_masking_rate as log_masking_rate
from mdm_jax.schedules.coordinates import log_survival_probability as log_survival_probability
from mdm_jax.schedules.coordinates import (
    logsnr_from_log_masking_rate as logsnr_from_log_masking_rate,
)
from mdm_jax.schedules.coordinates import (
    logsnr_from_log_survival_probability as logsnr_from_log_survival_probability,
)
from mdm_jax.schedules.coordinates import logsnr_from_masking_rate as logsnr_from_masking_rate
from mdm_jax.schedules.coordinates import (
    logsnr_from_survival_probability as logsnr_from_survival_probability,
)
from mdm_jax.schedules.coordinates import masking_rate as masking_rate
from mdm_jax.schedules.coordinates import survival_probability as survival_probability
from mdm_jax.schedules.curve_law import CurveLaw as CurveLaw
from mdm_jax.schedules.gaussian import GAUSSIAN_SCHEDULES as GAUSSIAN_SCHEDULES
from mdm_jax.schedules.gaussian_time import logsnr_at as logsnr_at
from mdm_jax.schedules.gaussian_time import logsnr_rate as logsnr_rate
from mdm_jax.schedules.gaussian_time import time_at as time_at
from mdm_jax.schedules.laws import Law as Law
from mdm_jax.schedules.laws import Tails as Tails
from mdm_jax.schedules.laws import TwoSidedLaw as TwoSidedLaw
from mdm_jax.schedules.laws import logistic as logistic
from mdm_jax.schedules.laws import uniform as uniform
from mdm_jax.schedules.masked import MASKED_SCHEDULES as MASKED_SCHEDULES
from mdm_jax.schedules.masked_schedule import Instant as Instant
from mdm_jax.schedules.masked_schedule import LostSupport as LostSupport
from mdm_jax.schedules.masked_schedule import MaskedSchedule as MaskedSchedule
from mdm_jax.schedules.masked_schedule import law_of as law_of
from mdm_jax.schedules.parameterisations import Output as Output
from mdm_jax.schedules.paths import Path as Path
from mdm_jax.schedules.piecewise import piecewise as piecewise
from mdm_jax.schedules.preconditioning import Preconditioning as Preconditioning
from mdm_jax.schedules.preconditioning import edm_preconditioning as edm_preconditioning
from mdm_jax.schedules.recipe_summary import RecipeSummary as RecipeSummary
from mdm_jax.schedules.recipe_summary import explain as explain
from mdm_jax.schedules.recipe_summary import summarise as summarise
from mdm_jax.schedules.recipes import Recipe as Recipe
from mdm_jax.schedules.tabulated import tabulated as tabulated
from mdm_jax.schedules.truncated import truncated as truncated
from mdm_jax.schedules.weighting_curves import Weighting as Weighting
