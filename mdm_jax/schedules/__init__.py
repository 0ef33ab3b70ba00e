"""The noise coordinate logSNR, laws over it, named masked schedules and sampling grids."""

from mdm_jax.pytrees import pytree_dataclass as pytree_dataclass
from mdm_jax.schedules import grids as grids
from mdm_jax.schedules import masked as masked
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
from mdm_jax.schedules.piecewise import piecewise as piecewise
from mdm_jax.schedules.tabulated import tabulated as tabulated
from mdm_jax.schedules.truncated import truncated as truncated
