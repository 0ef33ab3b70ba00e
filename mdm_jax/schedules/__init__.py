"""The noise coordinate logSNR, laws over it, masked schedules by name, and sampling grids."""

from mdm_jax.schedules.coordinates import (
    MaskingLevel,
    level_from_logsnr,
    level_from_masking_rate,
    log_masking_rate,
    log_survival_probability,
    logsnr_from_log_masking_rate,
    logsnr_from_log_survival_probability,
    logsnr_from_masking_rate,
    logsnr_from_survival_probability,
    masking_rate,
    survival_probability,
)
from mdm_jax.schedules.laws import (
    CurveLaw,
    Instant,
    Law,
    Tails,
    TwoSidedLaw,
    logistic,
    piecewise,
    tabulated,
    uniform,
)
from mdm_jax.schedules.masked import MASKED_SCHEDULES
from mdm_jax.schedules.schedule import LostSupport, MaskedSchedule, law_of
